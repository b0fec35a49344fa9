"""By what a snapshot's video was computed: it goes on by the same or not at all, unless its user asks for others."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from streaming import embeds, load, require, same, take

import echo_rt
from echo_rt.errors import BackendError, ConfigError, StreamError
from echo_rt.ops.backends import BACKEND_VARIABLE, available_backends
from echo_rt.snapshot.fit import BACKEND, IMPLEMENTATIONS, VAE_ATTENTION, implementations_of
from echo_rt.snapshot.snapshot import Snapshot

# None of which a CPU is given by itself in float32.
OTHERS = {"attention": "sdpa-math", "convolution": "conv3d,phases"}


def begun(folder: Path, path: Path | None = None, **options: Any) -> tuple[Snapshot, list[echo_rt.Chunk]]:
    """A snapshot after five blocks, and the next three."""
    with load(folder, **options) as runtime, runtime.stream(prompt_embeds=embeds(runtime), seed=4) as stream:
        take(stream, 5)
        snapshot = stream.snapshot(path)
        return snapshot, take(stream, 3)


def by_others(snapshot: Snapshot, names: dict[str, str]) -> Snapshot:
    named = {**snapshot.model[IMPLEMENTATIONS], **names}
    return dataclasses.replace(snapshot, model={**snapshot.model, IMPLEMENTATIONS: named})


@pytest.fixture(scope="module")
def other(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Snapshot, list[echo_rt.Chunk]]:
    """Of a video that was computed by other implementations than a trial finds here, and read from its file."""
    path = tmp_path_factory.mktemp("other") / "s.safetensors"
    _, further = begun(small_model, path, **OTHERS)
    return Snapshot.load(path), further


def test_a_snapshot_names_every_way(other: tuple[Snapshot, list[echo_rt.Chunk]]) -> None:
    named = other[0].model[IMPLEMENTATIONS]
    assert named["backend"] == "torch"
    assert named["attention"] == named["attention to the text"] == named["attention of the VAE"] == "sdpa-math"
    convolutions = {label: name for label, name in named.items() if label.startswith("convolution of ")}
    assert len(convolutions) == len(named) - 4 and set(convolutions.values()) == {"conv3d", "phases"}
    assert all(name == "phases" for label, name in convolutions.items() if label.endswith("after enlarging"))


def test_a_runtime_like_a_snapshot_goes_on_bit_for_bit(
    small_model: Path, other: tuple[Snapshot, list[echo_rt.Chunk]]
) -> None:
    snapshot, expected = other
    with load(small_model, like=snapshot) as runtime:
        choices = (runtime.attention, runtime.text_attention, runtime.vae_attention)
        assert {choice.reason for choice in choices if choice is not None} == {"as in the snapshot"}
        assert runtime.vae_attention is not None and runtime.vae_attention.name == "sdpa-math"
        assert {choice.reason for choice in runtime.convolutions.values()} == {"as in the snapshot"}
        with runtime.resume(snapshot) as stream:
            assert same(take(stream, 3), expected)
            assert stream.snapshot().model == snapshot.model


def test_one_that_computes_otherwise_refuses(small_model: Path, other: tuple[Snapshot, list[echo_rt.Chunk]]) -> None:
    """For the attention, and for a single convolution."""
    snapshot, _ = other
    with load(small_model) as runtime:
        with pytest.raises(StreamError) as caught:
            runtime.resume(snapshot)
        assert "attention was sdpa-math for its video and is sdpa here" in str(caught.value)
        assert "load the runtime with like=snapshot" in str(caught.value) and "\n" not in str(caught.value)
        with runtime.stream(prompt_embeds=embeds(runtime)) as stream:
            own = stream.snapshot()
        label = next(label for label in own.model[IMPLEMENTATIONS] if label.startswith("convolution of "))
        changed = dataclasses.replace(
            own, model={**own.model, IMPLEMENTATIONS: {**own.model[IMPLEMENTATIONS], label: "conv3d"}}
        )
        with pytest.raises(StreamError, match=r"convolution of .* was conv3d for its video and is three-products here"):
            runtime.resume(changed)
        changed = by_others(own, {VAE_ATTENTION: "products"})
        with pytest.raises(StreamError, match="attention of the VAE was products for its video and is sdpa here"):
            runtime.resume(changed)
        runtime.resume(own).close()


def test_who_asks_by_name_goes_on_by_that(small_model: Path, other: tuple[Snapshot, list[echo_rt.Chunk]]) -> None:
    snapshot, expected = other
    asked = {"attention": "sdpa", "convolution": "three-products"}
    with (
        load(small_model, **asked) as runtime,
        pytest.raises(StreamError, match="after enlarging was phases for its video"),
    ):
        runtime.resume(snapshot)  # the enlarging ones were not asked for
    with load(small_model, **asked, like=snapshot) as runtime:
        kinds = {(shape.enlarge, choice.name) for shape, choice in runtime.convolutions.items()}
        assert runtime.attention.name == "sdpa" and kinds == {(False, "three-products"), (True, "phases")}
        with runtime.resume(snapshot) as stream:
            made = take(stream, 3)
    assert not same(made, expected), "rounded otherwise"
    assert all((a.latents - b.latents).norm() < 1e-2 * b.latents.norm() for a, b in zip(made, expected, strict=True))


@pytest.mark.parametrize("named", [None, "x", {"attention": 3}])
def test_snapshots_of_before_implementations_were_kept(small_model: Path, named: object) -> None:
    """Nothing is known of them, so nothing is held against them."""
    snapshot, expected = begun(small_model)
    model = {name: fact for name, fact in snapshot.model.items() if name != IMPLEMENTATIONS}
    old = dataclasses.replace(snapshot, model=model if named is None else {**model, IMPLEMENTATIONS: named})
    assert implementations_of(old.model) == {BACKEND: "torch"}
    with load(small_model, like=old) as runtime, runtime.resume(old) as stream:
        assert same(take(stream, 3), expected)


def test_snapshots_of_before_the_attention_of_the_vae_was_chosen(small_model: Path) -> None:
    """It was torch's own, as it is on a CPU; nothing is held against another one."""
    snapshot, expected = begun(small_model)
    named = {label: name for label, name in implementations_of(snapshot.model).items() if label != VAE_ATTENTION}
    old = dataclasses.replace(snapshot, model={**snapshot.model, IMPLEMENTATIONS: named})
    with load(small_model, like=old) as runtime, runtime.resume(old) as stream:
        assert runtime.vae_attention is not None and runtime.vae_attention.reason == "torch's own on a CPU"
        assert same(take(stream, 3), expected)
    with load(small_model, attention="products", like=old) as runtime:
        runtime.resume(old).close()


def test_a_tiny_decoder_has_no_attention(small_model: Path) -> None:
    snapshot, expected = begun(small_model, vae="tiny", attention="products")
    named = {"backend": "torch", "attention": "products", "attention to the text": "products"}
    assert implementations_of(snapshot.model) == named
    with load(small_model, vae="tiny", like=snapshot) as runtime, runtime.resume(snapshot) as stream:
        assert runtime.vae_attention is None and same(take(stream, 3), expected)


def test_shapes_that_a_snapshot_does_not_have(small_model: Path) -> None:
    """As those of another number of bands are: nothing is known of them, so they are computed as ever."""
    snapshot, expected = begun(small_model)
    named = {
        f"{label}0" if label.startswith("convolution") else label: name
        for label, name in implementations_of(snapshot.model).items()
    }
    foreign = dataclasses.replace(snapshot, model={**snapshot.model, IMPLEMENTATIONS: named})
    with load(small_model, like=foreign) as runtime, runtime.resume(foreign) as stream:
        assert {choice.reason for choice in runtime.convolutions.values()} == {"torch's own on a CPU"}
        assert same(take(stream, 3), expected)


@pytest.mark.parametrize(
    ("option", "name", "why"),
    [
        ("attention", "sdpa-cudnn", "it runs on cuda"),
        ("attention", "x", "attention must be one of"),
        ("attention of the VAE", "sdpa-cudnn", "it runs on cuda"),
        ("convolution", "kernel", "it is an operation of the backends"),
        ("convolution", "phases", "convolution must be one of conv3d, three-products"),
    ],
)
def test_a_way_that_is_not_to_be_had(
    small_model: Path, other: tuple[Snapshot, list[echo_rt.Chunk]], option: str, name: str, why: str
) -> None:
    label = next(label for label in other[0].model[IMPLEMENTATIONS] if label.startswith(option))
    like = dataclasses.replace(other[0], model={IMPLEMENTATIONS: {label: name}})
    with pytest.raises(BackendError) as caught:
        load(small_model, like=like)
    assert why in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).endswith("made with it; ask for another by name to go on, rounded otherwise")


def test_like_what(small_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"like must be a Snapshot, .* got str"):
        load(small_model, like="s.safetensors")


# ---- the backend, which is one of them

EMULATED = pytest.mark.skipif(
    available_backends()["emulated"] != "available", reason="this build has no emulated kernels"
)
STEADY = {"memory": "prior"}  # one that evolves is not updated in float32 by the kernels


@pytest.fixture(scope="module")
def of_kernels(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Snapshot, list[echo_rt.Chunk]]:
    """Of a video that the emulated kernels made, read from its file."""
    path = tmp_path_factory.mktemp("kernels") / "s.safetensors"
    _, further = begun(small_model, path, backend="emulated", **STEADY)
    return Snapshot.load(path), further


@EMULATED
@pytest.mark.parametrize("environment", ["", "torch"])
def test_the_backend_is_taken_over(
    small_model: Path,
    of_kernels: tuple[Snapshot, list[echo_rt.Chunk]],
    monkeypatch: pytest.MonkeyPatch,
    environment: str,
) -> None:
    """Before that of the environment, which is there for all videos."""
    snapshot, expected = of_kernels
    monkeypatch.setenv(BACKEND_VARIABLE, environment)
    with load(small_model, like=snapshot, **STEADY) as runtime, runtime.resume(snapshot) as stream:
        assert (runtime.backend, runtime.backend_reason) == ("emulated", "as in the snapshot")
        assert same(take(stream, 3), expected)
        assert stream.snapshot().model == snapshot.model


@EMULATED
def test_another_backend_refuses_unless_it_was_named(
    small_model: Path, of_kernels: tuple[Snapshot, list[echo_rt.Chunk]], monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot, expected = of_kernels
    for environment in ("", "torch"):
        monkeypatch.setenv(BACKEND_VARIABLE, environment)
        with load(small_model, **STEADY) as runtime, pytest.raises(StreamError) as caught:
            runtime.resume(snapshot)
        assert "backend was emulated for its video and is torch here" in str(caught.value)
        assert "like=snapshot" in str(caught.value) and "backend=" in str(caught.value)
        assert "\n" not in str(caught.value)
    for like in (None, snapshot):
        with load(small_model, backend="torch", like=like, **STEADY) as runtime, runtime.resume(snapshot) as stream:
            assert runtime.backend == "torch"
            made = take(stream, 3)
        assert not same(made, expected), "rounded otherwise"
        pairs = zip(made, expected, strict=True)
        assert all((a.latents - b.latents).norm() < 1e-4 * b.latents.norm() for a, b in pairs)


@EMULATED
@pytest.mark.parametrize("before", ["all of them", "the backend"])
def test_snapshots_of_before_the_backend_was_kept(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    """It was torch, whatever the environment says now."""
    snapshot, expected = begun(small_model, **STEADY)
    gone = IMPLEMENTATIONS if before == "all of them" else None
    named = {label: name for label, name in implementations_of(snapshot.model).items() if label != BACKEND}
    model = {name: named if name == IMPLEMENTATIONS else fact for name, fact in snapshot.model.items() if name != gone}
    old = dataclasses.replace(snapshot, model=model)
    monkeypatch.setenv(BACKEND_VARIABLE, "emulated")
    with load(small_model, like=old, **STEADY) as runtime, runtime.resume(old) as stream:
        assert runtime.backend == "torch" and same(take(stream, 3), expected)
    with (
        load(small_model, **STEADY) as runtime,
        pytest.raises(StreamError, match="backend was torch for its video and is emulated here"),
    ):
        runtime.resume(old)


@pytest.mark.parametrize(
    ("name", "why"), [("cuda", "backend 'cuda' "), ("opencl", "backend must be one of torch, emulated, cuda;")]
)
def test_a_backend_that_is_not_to_be_had(tmp_path: Path, name: str, why: str) -> None:
    """Found out before any weights are read: there are none."""
    like = Snapshot({IMPLEMENTATIONS: {BACKEND: name}}, 0, 0, True, 3, {}, {})
    with pytest.raises(BackendError) as caught:
        load(tmp_path, like=like)
    assert str(caught.value).startswith(why) and "\n" not in str(caught.value)
    assert str(caught.value).endswith("name another with backend= (--backend) to go on, rounded otherwise")


@pytest.mark.cuda
def test_what_a_trial_finds_later_does_not_matter(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The file that remembers is gone, and whatever the next trials find, the video is the same."""
    device = require("cuda")
    monkeypatch.setenv("ECHO_RT_CACHE_DIR", str(tmp_path / "first"))
    snapshot, expected = begun(small_model, device=device, dtype="bfloat16")
    for cache in ("second", "third"):
        monkeypatch.setenv("ECHO_RT_CACHE_DIR", str(tmp_path / cache))
        with load(small_model, device=device, dtype="bfloat16", like=snapshot) as runtime:
            assert runtime.attention.timings == {}, "nothing is timed"
            with runtime.resume(snapshot) as stream:
                assert same(take(stream, 3), expected)
