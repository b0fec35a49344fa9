"""Blocks begun before an earlier one is handed out: the same video, prompts at the blocks they were meant for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from streaming import embeds, load, same, take

import echo_rt
from echo_rt import BackendError, ConfigError, StreamError

FEW_STEPS = {"denoising_steps": (1000, 500)}
BLOCKS = 8


@pytest.fixture(scope="module")
def runtimes(small_model: Path) -> list[echo_rt.Runtime]:
    """With 0, 1 and 3 blocks begun ahead."""
    return [load(small_model, lookahead=ahead, overrides=FEW_STEPS) for ahead in (0, 1, 3)]


def film(runtime: echo_rt.Runtime) -> list[echo_rt.Chunk]:
    """A video with two switches, each at a block that is named long before it comes."""
    with runtime.stream(prompt_embeds=embeds(runtime), seed=9) as stream:
        for block in (6, 2):
            stream.set_prompt(prompt_embeds=embeds(runtime, block), block=block)
        return take(stream, BLOCKS)


def test_the_video_does_not_depend_on_it(runtimes: list[echo_rt.Runtime]) -> None:
    plain, *ahead = [film(runtime) for runtime in runtimes]
    assert all(same(video, plain) for video in ahead)
    for chunk in plain:
        assert chunk.stats.generate_seconds > 0 and chunk.stats.decode_seconds > 0


def test_no_more_blocks_are_begun_than_that(runtimes: list[echo_rt.Runtime]) -> None:
    for runtime in runtimes:
        with runtime.stream(prompt_embeds=embeds(runtime)) as stream:
            assert stream.first_frame_seconds is None
            for block in range(4):
                assert stream.next_block == block
                next(stream)
                # The one that was handed out is no longer ahead.
                assert stream.next_prompt_block == block + 1 + runtime.lookahead
                assert runtime._engine.pipeline.in_flight == runtime.lookahead  # type: ignore[union-attr]
            assert stream.first_frame_seconds is not None and stream.first_frame_seconds > 0


def test_a_prompt_reaches_the_first_block_that_is_not_begun(runtimes: list[echo_rt.Runtime]) -> None:
    for runtime in runtimes:
        with runtime.stream(prompt_embeds=embeds(runtime), seed=9) as stream:
            made = take(stream, 2)
            at = stream.next_prompt_block
            stream.set_prompt(prompt_embeds=embeds(runtime, 5))
            made += take(stream, BLOCKS - 2)
            if runtime.lookahead:
                with pytest.raises(StreamError, match=rf"block {at} has been begun; a prompt can begin with block \d+"):
                    stream.set_prompt(prompt_embeds=embeds(runtime, 5), block=at)
        with runtime.stream(prompt_embeds=embeds(runtime), seed=9) as stream:
            stream.set_prompt(prompt_embeds=embeds(runtime, 1), block=at)
            stream.set_prompt(prompt_embeds=embeds(runtime, 5), block=at)  # the last call counts
            assert same(take(stream, BLOCKS), made)


@pytest.mark.parametrize("block", [1.5, "2", True])
def test_odd_blocks_are_refused(runtimes: list[echo_rt.Runtime], block: object) -> None:
    with runtimes[0].stream(prompt_embeds=embeds(runtimes[0])) as stream:
        with pytest.raises(ConfigError, match="block must be a block's number or None"):
            stream.set_prompt(prompt_embeds=embeds(runtimes[0]), block=block)  # type: ignore[arg-type]
        with pytest.raises(StreamError, match="block -1 has been begun"):
            stream.set_prompt(prompt_embeds=embeds(runtimes[0]), block=-1)


@pytest.mark.parametrize("taken", [0, 1, 4])
def test_a_snapshot_loses_no_block_that_was_begun(runtimes: list[echo_rt.Runtime], taken: int, tmp_path: Path) -> None:
    """It is handed out by the stream that goes on and by the one that is resumed, whatever that one begins ahead."""
    expected = film(runtimes[0])
    for runtime in runtimes:
        with runtime.stream(prompt_embeds=embeds(runtime), seed=9) as stream:
            for block in (6, 2):
                stream.set_prompt(prompt_embeds=embeds(runtime, block), block=block)
            made = take(stream, taken)
            snapshot = stream.snapshot(tmp_path / "state.safetensors")
            assert len(snapshot.held) == (runtime.lookahead if taken else 0)
            assert snapshot.next_block == taken
            assert same(made + take(stream, BLOCKS - taken), expected)
        loaded = echo_rt.Snapshot.load(tmp_path / "state.safetensors")
        for other in runtimes:
            with other.resume(loaded) as resumed:
                assert resumed.next_block == taken
                assert same(made + take(resumed, BLOCKS - taken), expected)


def test_vitals_are_those_of_the_block(runtimes: list[echo_rt.Runtime]) -> None:
    for runtime in runtimes:
        with runtime.stream(prompt_embeds=embeds(runtime)) as stream:
            for chunk in take(stream, BLOCKS):
                v = chunk.stats.vitals
                assert v.latent_mean == pytest.approx(float(chunk.latents.mean()), abs=1e-6)
                assert v.latent_std == pytest.approx(float(chunk.latents.std()), rel=1e-5)
                assert v.latent_nonfinite == v.video_nonfinite == 0
                assert v.video_min < v.video_max
                darkest, brightest = (min(1.0, max(-1.0, value)) for value in (v.video_min, v.video_max))
                assert int(chunk.frames.min()) == pytest.approx((darkest + 1) * 127.5, abs=0.51)
                assert int(chunk.frames.max()) == pytest.approx((brightest + 1) * 127.5, abs=0.51)
            assert v.gate_mean is not None and 0 < v.gate_mean < 1
            state = runtime._engine.rollout.state  # type: ignore[union-attr]
            if not runtime.lookahead:
                assert v.memory_norm == pytest.approx(float(state.memory.square().mean().sqrt()), rel=1e-5)


@pytest.mark.parametrize("lookahead", [-1, 1.0, True, "2"])
def test_odd_lookaheads_are_refused(small_model: Path, lookahead: object) -> None:
    with pytest.raises(ConfigError, match="lookahead must be a number of blocks, 0 or more"):
        load(small_model, lookahead=lookahead)


def test_graphs_need_a_gpu(small_model: Path) -> None:
    with pytest.raises(BackendError, match=r"graphs=True needs a CUDA device, and this model is on 'cpu'"):
        load(small_model, graphs=True)
    with load(small_model, graphs=False) as runtime:
        assert torch.is_tensor(next(runtime.stream(prompt_embeds=embeds(runtime))).frames)


def test_the_attention_can_be_chosen(small_model: Path) -> None:
    with load(small_model, attention="sdpa-math") as runtime:
        assert runtime.attention.name == "sdpa-math"
        next(runtime.stream(prompt_embeds=embeds(runtime)))
    with pytest.raises(BackendError, match="sdpa-flash"):
        load(small_model, attention="sdpa-flash")
