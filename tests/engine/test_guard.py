"""Blocks that go wrong: found before anyone sees them, told with evidence, and gone back from where that was chosen."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from streaming import amid_blocks, embeds, load, poison, same, take, video

import echo_rt
from echo_rt import ConfigError, Guard, NumericalError, Snapshot, StallError
from echo_rt.engine.pipeline import _nonfinite
from echo_rt.model.vae_decoder import VaeDecoder

FEW_STEPS = {"denoising_steps": (1000, 500)}


@pytest.fixture(scope="module", params=[0, 1])
def runtime(request: pytest.FixtureRequest, small_model: Path) -> echo_rt.Runtime:
    """With and without a block that is begun ahead."""
    with load(small_model, lookahead=request.param, overrides=FEW_STEPS) as runtime:
        yield runtime


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_not_finite_are_counted(dtype: torch.dtype) -> None:
    video = torch.linspace(-2, 2, 360).to(dtype).reshape(2, 12, 5, 3)
    video[0, 0, 0, 0] = torch.finfo(dtype).max
    assert int(_nonfinite(video)) == 0
    video[0, 1, 2], video[1, 11, 4, 2], video[1, 0, 0, 0] = float("nan"), float("inf"), -float("inf")
    assert int(_nonfinite(video)) == 5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_stream_stops_with_evidence(
    runtime: echo_rt.Runtime, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = video(runtime, 2)
    stream = runtime.stream(prompt_embeds=embeds(runtime), guard=Guard(evidence=tmp_path / "evidence"))
    with monkeypatch.context() as patch:
        poison(stream, patch, {2}, value=value)
        assert same(take(stream, 2), expected)
        with pytest.raises(
            NumericalError, match=r"block 2: latent: \d+ of \d+ values .*; evidence: .*block-00000002"
        ) as e:
            next(stream)
    state, figures = (tmp_path / "evidence" / f"block-00000002.{kind}" for kind in ("safetensors", "json"))
    assert str(state) in str(e.value) and str(figures) in str(e.value)
    told = json.loads(figures.read_text())
    assert told["block"] == 2 and told["states"] == {state.name: 2 + runtime.lookahead} and told["seed"] == 0
    assert told["vitals"]["latent_nonfinite"] > 0 and told["found"] in str(e.value)
    spoiled = Snapshot.load(state)
    assert spoiled.block == 2 + runtime.lookahead
    assert not torch.isfinite(spoiled.tensors["rollout.latents"]).all()
    assert same(video(runtime, 2), expected), "the runtime goes on"


def test_a_single_value_of_the_pictures_is_found(runtime: echo_rt.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a decoder's numbers run over, the latents are as they should be."""
    decode, calls = VaeDecoder.decode_next, [0]

    def spoilt(decoder: VaeDecoder, *arguments: Any, is_start: bool) -> torch.Tensor:
        made = decode(decoder, *arguments, is_start=is_start)
        calls[0] += 1
        if calls[0] == 2:
            made[-1, -1, -1, -1] = float("nan")
        return made

    monkeypatch.setattr(VaeDecoder, "decode_next", spoilt)
    with runtime.stream(prompt_embeds=embeds(runtime)) as stream:
        take(stream, 1)
        with pytest.raises(NumericalError, match=r"block 1: decoded video: 1 of \d+ values"):
            next(stream)


def test_a_stream_goes_back_and_on(
    runtime: echo_rt.Runtime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = video(runtime, 14)
    guard = Guard("roll_back", keep_every=4)
    with runtime.stream(prompt_embeds=embeds(runtime), guard=guard) as stream, monkeypatch.context() as patch:
        poison(stream, patch, {10})
        with caplog.at_level(logging.WARNING, "echo_rt.engine.guard"):
            chunks = take(stream, 14)
        assert stream.rollbacks == 1
        snapshot = stream.snapshot()
    assert [chunk.index for chunk in chunks] == list(range(14))
    ends = [chunk.first_frame + len(chunk.frames) for chunk in chunks]
    assert [chunk.first_frame for chunk in chunks[1:]] == ends[:-1]
    assert same(chunks[:10], expected[:10])
    assert all(torch.isfinite(chunk.latents).all() for chunk in chunks)
    assert not torch.equal(chunks[10].latents, expected[10].latents), "the same noise again"
    assert "block 10: latent" in caplog.text and f"back to the state after block {8 + runtime.lookahead}" in caplog.text
    # What comes after it is what a stream makes that was there at that time and has the other noise.
    assert snapshot.offset == 1 - runtime.lookahead and snapshot.next_block == 14 and snapshot.seed != 0
    with runtime.resume(snapshot) as again:
        assert again.next_block == 14 and next(again).index == 14 and again.rollbacks == 0


def test_going_back_is_going_back(runtime: echo_rt.Runtime, small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a rollback comes what a stream makes that stands at the good state and is given the new seed."""
    with runtime.stream(prompt_embeds=embeds(runtime), guard=Guard("roll_back", keep_every=100)) as stream:
        next(stream)
        # The good state is kept when the next block is asked for, behind all that were begun by then.
        with monkeypatch.context() as patch:
            poison(stream, patch, {3})
            chunks = take(stream, 5)
        seed = stream.snapshot().seed
    # A twin that begins no block ahead: one begun ahead would still have the old seed.
    with load(small_model, overrides=FEW_STEPS) as twin, twin.stream(prompt_embeds=embeds(twin)) as plain:
        take(plain, 1 + runtime.lookahead)
        plain._engine.rollout.set_seed(seed)  # type: ignore[union-attr]
        expected = take(plain, 3)
    made = [chunk.latents for chunk in chunks[2:]]
    assert all(torch.equal(a, b.latents) for a, b in zip(made, expected, strict=True))


def test_the_prompt_is_not_lost_by_going_back(runtime: echo_rt.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    guard = Guard("roll_back", keep_every=100)
    with runtime.stream(prompt_embeds=embeds(runtime), guard=guard) as stream, monkeypatch.context() as patch:
        next(stream)
        poison(stream, patch, {6})
        stream.set_prompt(prompt_embeds=embeds(runtime, 5), block=4)
        take(stream, 8)
        assert stream.rollbacks == 1
        told = stream._engine.rollout.state.text_kv.clone()  # type: ignore[union-attr]
    with runtime.stream(prompt_embeds=embeds(runtime, 5)) as other:
        next(other)
        assert torch.equal(told, other._engine.rollout.state.text_kv)  # type: ignore[union-attr]


def test_it_gives_up_in_the_end(runtime: echo_rt.Runtime, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    guard = Guard("roll_back", attempts=2, evidence=tmp_path)
    with runtime.stream(prompt_embeds=embeds(runtime), guard=guard) as stream, monkeypatch.context() as patch:
        next(stream)
        poison(stream, patch, set(range(1, 100)), times=100)
        with pytest.raises(NumericalError, match=r"after 2 rollbacks in a row"):
            take(stream, 3 + runtime.lookahead)
        assert stream.rollbacks == 2
    assert len(list(tmp_path.glob("*.json"))) >= 1


def test_the_first_block_has_nothing_to_go_back_to(runtime: echo_rt.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    with runtime.stream(prompt_embeds=embeds(runtime), guard=Guard("roll_back")) as stream:
        poison(stream, monkeypatch, {0})
        with pytest.raises(NumericalError, match="block 0: latent"):
            next(stream)
    monkeypatch.undo()


def test_a_block_that_takes_too_long(runtime: echo_rt.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    with runtime.stream(prompt_embeds=embeds(runtime), guard=Guard(block_seconds=20.0)) as stream:
        next(stream)
    with runtime.stream(prompt_embeds=embeds(runtime), guard=Guard(block_seconds=0.05)) as stream:
        amid_blocks(stream, lambda block, step: time.sleep(0.1), monkeypatch)
        with pytest.raises(StallError, match=r"block 0 took .* s; a block may take 0.05 s"):
            next(stream)
        with pytest.raises(echo_rt.StreamError, match="block 0 failed"):
            next(stream)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"policy": "hope"}, "policy must be 'stop' or 'roll_back', got 'hope'"),
        ({"keep_every": 0}, "keep_every must be a positive integer, got 0"),
        ({"attempts": True}, "attempts must be a positive integer, got True"),
        ({"block_seconds": 0}, "block_seconds must be a positive number or None, got 0"),
        ({"block_seconds": float("nan")}, "block_seconds must be a positive number"),
        ({"block_seconds": "3"}, "block_seconds must be a positive number"),
    ],
)
def test_odd_guards_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Guard(**options)  # type: ignore[arg-type]


def test_evidence_that_cannot_be_written_is_an_error(
    runtime: echo_rt.Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    guard = Guard(evidence=tmp_path / "file" / "evidence")
    with runtime.stream(prompt_embeds=embeds(runtime), guard=guard) as stream, monkeypatch.context() as patch:
        poison(stream, patch, {0})
        with pytest.raises(NumericalError, match=r"block 0: latent.*; no evidence: .*cannot make the folder"):
            next(stream)
