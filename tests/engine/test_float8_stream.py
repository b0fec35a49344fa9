"""Streams in float8: the same promises as in any dtype, and another model than that of bfloat16."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recorder import Recorder
from streaming import DEVICES, embeds, load, require, same, take, video

import echo_rt
from echo_rt.errors import BackendError, ConfigError, StreamError
from echo_rt.model.linear import Float8Linear, Linear
from echo_rt.ops.backends import available_backends
from echo_rt.utils.device import FLOAT8

BACKENDS = [name for name in ("torch", "emulated") if available_backends()[name] == "available"]
FEW_STEPS = {"denoising_steps": [1000, 500]}
BLOCKS = 6  # in the last of them nothing comes for the first time


def float8(folder: Path, **options: object) -> echo_rt.Runtime:
    return load(folder, **{"dtype": "float8", "overrides": FEW_STEPS} | options)


def require_float8(device: str) -> str:
    """``device``, or the test is skipped."""
    if require(device) == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU does not multiply float8")
    return device


@pytest.mark.parametrize("device", DEVICES)
def test_resume_bit_for_bit(small_model: Path, tmp_path: Path, device: str) -> None:
    with float8(small_model, device=require_float8(device)) as runtime:
        assert runtime.dtype == FLOAT8
        with runtime.stream(prompt_embeds=embeds(runtime), seed=5) as stream:
            take(stream, 4)  # the window is full, the memory has been updated
            snapshot = stream.snapshot(tmp_path / "s.safetensors")
            expected = take(stream, 3)
        assert all(chunk.frames.any() for chunk in expected)
        states = {t.dtype for t in snapshot.tensors.values() if t.is_floating_point()}
        assert states == {FLOAT8, torch.bfloat16, torch.float32}
        assert len(snapshot.tensors["rollout.kv_float8"]) == runtime.config.transformer.num_layers - 1
        video(runtime, 3, seed=6, prompt=1)
    with float8(small_model, device=device) as fresh:
        for source in (snapshot, tmp_path / "s.safetensors"):
            with fresh.resume(source) as stream:
                assert same(take(stream, 3), expected)


@pytest.mark.skipif("emulated" not in BACKENDS, reason="this build has no emulated kernels")
def test_resume_on_the_kernels(small_model: Path) -> None:
    options = {"backend": "emulated", "memory": "prior", "overrides": {"denoising_steps": [1000]}}
    with float8(small_model, **options) as runtime:
        with runtime.stream(prompt_embeds=embeds(runtime), seed=5) as stream:
            take(stream, 1)
            snapshot = stream.snapshot()
            expected = take(stream, 1)
        with runtime.resume(snapshot) as stream:
            assert same(take(stream, 1), expected)


def test_a_snapshot_is_of_its_own_dtype_and_layers(small_model: Path) -> None:
    with float8(small_model) as runtime, runtime.stream(prompt_embeds=embeds(runtime)) as stream:
        take(stream, 1)
        snapshot = stream.snapshot()
    for options, words in (
        ({"dtype": "bfloat16"}, "dtype is 'float8' in the snapshot and 'bfloat16' here"),
        ({"float8_except": ["*.ffn.2"]}, r"float8_except is \[\] in the snapshot and \['blocks\.0\.ffn\.2'"),
    ):
        with float8(small_model, **options) as other, pytest.raises(StreamError, match=words):
            other.resume(snapshot)


def test_a_snapshot_of_a_version_with_a_16_bit_cache(small_model: Path) -> None:
    """It is that of a model whose attention is kept from float8, bit for bit, and is refused elsewhere."""
    with float8(small_model, float8_except=["*.attention"]) as runtime:
        assert not len(runtime._engine.rollout.state.kv_float8)
        with runtime.stream(prompt_embeds=embeds(runtime), seed=5) as stream:
            take(stream, 2)
            snapshot = stream.snapshot()
            expected = take(stream, 1)
        assert "rollout.kv_float8" not in snapshot.tensors
        old = replace(snapshot, model={k: v for k, v in snapshot.model.items() if k != "float8_attention"})
        with runtime.resume(old) as stream:
            assert same(take(stream, 1), expected)
    layers = list(range(len(snapshot.tensors["rollout.sink_k"]) - 1))
    words = re.escape(f"float8_attention is [] in the snapshot and {layers} here")
    with float8(small_model) as other, pytest.raises(StreamError, match=words):
        other.resume(old)


def test_layers_that_attend_in_16_bits(small_model: Path) -> None:
    """Their cache is in 16 bits, and so is the last layer's, which the memory reads."""
    with float8(small_model, float8_except=["blocks.1.self_attn.attention"]) as runtime:
        state, products = runtime._engine.rollout.state, runtime._engine.rollout._transformer.layers
        dtypes = [kv.dtype for kv, _ in state.layers]
        assert dtypes[0] == FLOAT8 and dtypes[1] == dtypes[-1] == torch.bfloat16
        assert isinstance(products[1].qkv, Float8Linear), "its products are float8 all the same"
        some = video(runtime, 3)
    with float8(small_model) as runtime:
        assert not same(video(runtime, 3), some)


def test_steps_that_attend_in_16_bits(small_model: Path) -> None:
    """Their layers have a cache in 16 bits, which the other passes round."""
    kept = ["*.attention@0"]
    with float8(small_model, float8_except=kept) as runtime:
        rollout, schedule = runtime._engine.rollout, runtime._engine.rollout._schedule
        assert not len(rollout.state.kv_float8)
        layers = set(range(runtime.config.transformer.num_layers - 1))
        assert [set(rollout._rounding[row]) for row in (0, 1, schedule.context)] == [set(), layers, layers]
        with runtime.stream(prompt_embeds=embeds(runtime), seed=5) as stream:
            videos = [take(stream, 1)]
            snapshot = stream.snapshot()
            stream.set_prompt(prompt_embeds=embeds(runtime, 1))
            some = take(stream, 1)
        with runtime.resume(snapshot) as stream:
            stream.set_prompt(prompt_embeds=embeds(runtime, 1))
            assert same(take(stream, 1), some)
    for other in ([], ["*.attention"]):
        with float8(small_model, float8_except=other) as runtime:
            videos.append(video(runtime, 1, seed=5))
            with pytest.raises(StreamError, match=r"float8_except is \['blocks\.0\..*@0'.* and \[\] here"):
                runtime.resume(snapshot)
    assert not any(same(one, two) for one, two in itertools.combinations(videos, 2))


def test_steps_of_a_first_block_that_has_its_own(small_model: Path) -> None:
    overrides = {"denoising_steps": [1000, 500], "first_block_steps": [1000, 750, 250]}
    with float8(small_model, float8_except=["blocks.0.*@1"], overrides=overrides) as runtime:
        rounding = runtime._engine.rollout._rounding
        assert [0 in rounding[row] for row in range(6)] == [True, False, True, False, True, True]
    with pytest.raises(ConfigError, match=r"'\*@3' matches no layer .* S in 0\.\.2$"):
        float8(small_model, float8_except=["*@3"], overrides=overrides)


def test_what_is_not_finite_in_the_cache_is_seen(small_model: Path) -> None:
    with float8(small_model) as runtime, runtime.stream(prompt_embeds=embeds(runtime)) as stream:
        take(stream, 1)
        assert runtime._engine.finite()
        runtime._engine.rollout.state.kv_float8[0, 1, 0, 0, 0] = float("nan")
        assert not runtime._engine.finite()


def test_layers_that_are_kept_by_name(small_model: Path) -> None:
    kept = ("blocks.0.*", "*.ffn.2")
    with float8(small_model, float8_except=kept) as runtime:
        transformer = runtime._engine.rollout._transformer
        kinds = [[type(p) for p in (m.qkv, m.cross_q, m.ffn_in, m.ffn_out)] for m in transformer.layers]
        assert kinds[0] == [Linear] * 4
        assert all(layer == [Float8Linear] * 3 + [Linear] for layer in kinds[1:])
        some = video(runtime, 2)
    with float8(small_model) as runtime:
        everything = video(runtime, 2)
    with float8(small_model, float8_except=["*"]) as runtime:
        nothing = video(runtime, 2)
    with float8(small_model, dtype="bfloat16") as runtime:
        plain = video(runtime, 2)
    assert same(nothing, plain), "without a layer in float8 it is bfloat16, bit for bit"
    assert not same(some, plain) and not same(everything, plain) and not same(some, everything)


def test_what_is_refused_at_load(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"'blocks\.9\.\*' matches no layer"):
        float8(small_model, float8_except=["blocks.9.*"])
    with pytest.raises(ConfigError, match="for dtype 'float8', and the dtype is 'float32'"):
        float8(small_model, dtype="float32", float8_except=["*"])
    for patterns in ("*.ffn.2", None, iter(["*.ffn.2"]), [2]):
        with pytest.raises(ConfigError, match="float8_except must be a sequence of patterns"):
            float8(small_model, float8_except=patterns)
    monkeypatch.setattr("echo_rt.runtime.parse_device", lambda device: torch.device("cuda:0"))
    monkeypatch.setattr("echo_rt.runtime.note_loading", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(BackendError, match="cuda:0 is sm_86"):
        float8(small_model)


@pytest.mark.parametrize("kept", [(), ("*.attention@1",)], ids=["all", "step 0"])
def test_a_replayed_video_is_the_video(small_model: Path, kept: tuple[str, ...]) -> None:
    """Stages as lists of operations over fixed addresses, as a graph is: those of float8 among them."""
    steps = [1000, 500] if kept else [1000]
    options = {"memory": "off", "overrides": {"denoising_steps": steps}, "float8_except": kept}
    with float8(small_model, **options) as runtime:
        expected = video(runtime, BLOCKS, seed=3)
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("echo_rt.engine.engine.make_executor", lambda device, graphs: recorder)
        with float8(small_model, **options) as runtime:
            recorder.watch(runtime._engine.pipeline.buffers())
            with runtime.stream(prompt_embeds=embeds(runtime), seed=3) as stream, recorder:
                made = take(stream, BLOCKS)
    assert same(made, expected)
    assert recorder.replays > BLOCKS and recorder.races() == []
