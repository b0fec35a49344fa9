"""Streams that begin with a given video: what is handed out, prompts, snapshots amid it and behind it, rollbacks."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from streaming import embeds, load, poison, same, take
from torch import Tensor

import echo_rt
from echo_rt import ConfigError, Guard, NumericalError, Snapshot, StreamError
from echo_rt.weights.folder import VAE_FILE

FEW_STEPS = {"denoising_steps": (1000, 500)}
GIVEN, FRAMES, BLOCKS = 3, 33, 9  # blocks, and their frames; blocks of the whole video


@pytest.fixture(scope="module", params=[0, 2], ids=lambda ahead: f"lookahead {ahead}")
def runtime(request: pytest.FixtureRequest, small_model: Path) -> Iterator[echo_rt.Runtime]:
    with load(small_model, overrides=FEW_STEPS, lookahead=request.param) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def clip(small_model: Path) -> Tensor:
    """Frames of a video of the model's own: 33 of them, three blocks."""
    with load(small_model, overrides=FEW_STEPS) as runtime:
        stream = runtime.stream(prompt_embeds=embeds(runtime, 8), seed=8)
        return torch.cat([chunk.frames for chunk in take(stream, GIVEN)])


def begin(runtime: echo_rt.Runtime, clip: Tensor, **options: Any) -> echo_rt.Stream:
    return runtime.stream(prompt_embeds=embeds(runtime), seed=3, initial_video=clip, **options)


@pytest.fixture(scope="module")
def film(runtime: echo_rt.Runtime, clip: Tensor) -> list[echo_rt.Chunk]:
    with begin(runtime, clip) as stream:
        return take(stream, BLOCKS)


def test_it_begins_with_the_given_frames(runtime: echo_rt.Runtime, clip: Tensor, film: list[echo_rt.Chunk]) -> None:
    """As they come out of the VAE, whose weights are random here: their latents are exact, and their numbers."""
    latents = runtime._engine.initial_video.encode(clip)  # type: ignore[union-attr]
    assert torch.equal(torch.cat([chunk.latents for chunk in film[:GIVEN]]), latents)
    assert [chunk.index for chunk in film] == list(range(BLOCKS))
    assert [chunk.first_frame for chunk in film] == [0, *range(9, 12 * BLOCKS - 9, 12)]
    assert sum(len(chunk.frames) for chunk in film[:GIVEN]) == FRAMES == film[GIVEN].first_frame


def test_latents_in_place_of_frames(runtime: echo_rt.Runtime, film: list[echo_rt.Chunk]) -> None:
    latents = torch.cat([chunk.latents for chunk in film[:GIVEN]])
    options = {"prompt_embeds": embeds(runtime), "seed": 3, "initial_latents": latents}
    with runtime.stream(**options) as stream:
        first = take(stream, 1)
        latents.zero_()  # they were copied
        assert same(first + take(stream, BLOCKS - 1), film)
    latents.copy_(torch.cat([chunk.latents for chunk in film[:GIVEN]]))
    with runtime.stream(**options, include_initial=False) as stream:
        assert same(take(stream, BLOCKS - GIVEN), film[GIVEN:])


def test_what_comes_behind_depends_on_them(runtime: echo_rt.Runtime, clip: Tensor, film: list[echo_rt.Chunk]) -> None:
    with begin(runtime, 255 - clip) as stream:
        other = take(stream, GIVEN + 1)
    assert not torch.equal(other[GIVEN].latents, film[GIVEN].latents)
    with begin(runtime, clip.numpy()) as stream:
        assert same(take(stream, BLOCKS), film)


def test_without_the_given_frames(runtime: echo_rt.Runtime, clip: Tensor, film: list[echo_rt.Chunk]) -> None:
    with begin(runtime, clip, include_initial=False) as stream:
        assert (stream.next_block, stream.next_prompt_block, stream.video_frames) == (GIVEN, GIVEN, FRAMES)
        assert stream.first_frame_seconds is None
        state = stream.snapshot()
        made = take(stream, BLOCKS - GIVEN)
        assert stream.first_frame_seconds is not None
    assert same(made, film[GIVEN:]) and made[0].index == GIVEN and made[0].first_frame == FRAMES
    with runtime.resume(state) as stream:
        assert same(take(stream, BLOCKS - GIVEN), film[GIVEN:])


@pytest.mark.parametrize("at", [0, 1, GIVEN, GIVEN + 1])
def test_a_snapshot_amid_it_and_behind_it(
    runtime: echo_rt.Runtime, clip: Tensor, film: list[echo_rt.Chunk], at: int, tmp_path: Path
) -> None:
    with begin(runtime, clip) as stream:
        take(stream, at)
        stream.snapshot(tmp_path / "s.safetensors")
        assert same(take(stream, BLOCKS - at), film[at:])
    snapshot = Snapshot.load(tmp_path / "s.safetensors")
    waiting = 0 if snapshot.initial_latents is None else len(snapshot.initial_latents) // 3
    begun = min(GIVEN, at + (runtime.lookahead if at else 0))
    assert (snapshot.initial_blocks, waiting) == (begun, GIVEN - begun)
    with runtime.resume(snapshot) as stream:
        assert same(take(stream, BLOCKS - at), film[at:])
        assert runtime._engine.initial_blocks == GIVEN  # type: ignore[union-attr]


def test_a_video_without_one_has_the_files_of_before(runtime: echo_rt.Runtime, tmp_path: Path) -> None:
    with runtime.stream(prompt_embeds=embeds(runtime)) as stream:
        next(stream)
        stream.snapshot(tmp_path / "s.safetensors")
    data = (tmp_path / "s.safetensors").read_bytes()
    assert b"initial" not in data
    again = Snapshot.load(tmp_path / "s.safetensors")
    assert again.initial_blocks == 0 and again.initial_latents is None


def test_a_snapshot_that_contradicts_itself(runtime: echo_rt.Runtime, clip: Tensor, tmp_path: Path) -> None:
    with begin(runtime, clip) as stream:
        next(stream)
        snapshot = stream.snapshot()
        take(stream, GIVEN)
        behind = stream.snapshot()
    waiting = torch.zeros(3, *runtime.config.latent_shape)
    for changed, words in (
        (dataclasses.replace(behind, initial_blocks=99), "contradicts itself"),
        (dataclasses.replace(behind, initial_blocks=-1), "contradicts itself"),
        (dataclasses.replace(behind, initial_latents=waiting), "contradicts itself"),
        (dataclasses.replace(behind, initial_blocks=behind.block + 1, initial_latents=waiting[:2]), "initial video"),
        (dataclasses.replace(snapshot, initial_latents=waiting[0]), r"initial video: .*float32 \[16, 4, 4\]"),
    ):
        changed.save(tmp_path / "s")
        with pytest.raises(StreamError, match=words):
            runtime.resume(Snapshot.load(tmp_path / "s"))


def test_prompts_amid_it(runtime: echo_rt.Runtime, clip: Tensor, film: list[echo_rt.Chunk]) -> None:
    """A prompt for a given block changes what comes behind; those of blocks that have passed are refused."""
    with begin(runtime, clip) as stream:
        stream.set_prompt(prompt_embeds=embeds(runtime, 5), block=1)
        made = take(stream, GIVEN + 1)
        with pytest.raises(StreamError, match="block 1 has been begun"):
            stream.set_prompt(prompt_embeds=embeds(runtime, 5), block=1)
    assert same(made[:GIVEN], film[:GIVEN]) and not torch.equal(made[GIVEN].latents, film[GIVEN].latents)
    with begin(runtime, clip, include_initial=False) as stream:
        with pytest.raises(StreamError, match="block 1 has been begun"):
            stream.set_prompt(prompt_embeds=embeds(runtime, 5), block=1)
        stream.set_prompt(prompt_embeds=embeds(runtime, 5))
        switched = next(stream)
    assert switched.index == GIVEN and not torch.equal(switched.latents, film[GIVEN].latents)


def test_a_feed_hands_it_out(runtime: echo_rt.Runtime, clip: Tensor, film: list[echo_rt.Chunk]) -> None:
    with begin(runtime, clip) as stream:
        with stream.feed(depth=2) as feed:
            made = [next(feed) for _ in range(2)]
        made += take(stream, BLOCKS - 2)
    assert same(made, film)


def test_going_back_goes_back_to_behind_it_at_most(
    runtime: echo_rt.Runtime, clip: Tensor, film: list[echo_rt.Chunk], monkeypatch: pytest.MonkeyPatch
) -> None:
    with begin(runtime, clip, guard=Guard("roll_back", keep_every=100)) as stream:
        poison(stream, monkeypatch, {GIVEN + 2})
        made = take(stream, BLOCKS)
        good = stream._blocks._good
        assert good is not None and good.block == GIVEN - 1 and good.initial_blocks == GIVEN
        assert stream.rollbacks == 1 and [chunk.index for chunk in made] == list(range(BLOCKS))
    assert same(made[: GIVEN + 2], film[: GIVEN + 2])
    assert not torch.equal(made[GIVEN + 2].latents, film[GIVEN + 2].latents)
    assert not torch.equal(made[GIVEN + 2].latents, film[GIVEN].latents)  # other noise


@pytest.mark.parametrize("shown", [True, False])
def test_a_given_block_that_is_not_finite_ends_the_video(
    runtime: echo_rt.Runtime, clip: Tensor, monkeypatch: pytest.MonkeyPatch, shown: bool
) -> None:
    rollout = runtime._engine.rollout  # type: ignore[union-attr]
    given_block = rollout.given_block

    def spoilt(latents: Tensor) -> Tensor:
        return given_block(latents * (float("nan") if rollout.state.block == 0 else 1.0))

    monkeypatch.setattr(rollout, "given_block", spoilt)
    with pytest.raises(NumericalError, match="block 1: latent: "):
        take(begin(runtime, clip, include_initial=shown, guard=Guard("roll_back")), GIVEN)
    monkeypatch.undo()
    with runtime.stream(prompt_embeds=embeds(runtime)) as stream:  # it ended the video, not the runtime
        next(stream)


def test_the_next_video_knows_nothing_of_it(runtime: echo_rt.Runtime, clip: Tensor) -> None:
    with runtime.stream(prompt_embeds=embeds(runtime), seed=3) as stream:
        expected = take(stream, 5)
    with begin(runtime, clip) as stream:
        next(stream)  # two that are given still wait
    with runtime.stream(prompt_embeds=embeds(runtime), seed=3) as stream:
        assert same(take(stream, 5), expected)


def test_a_picture_where_blocks_are_one_frame(small_model: Path, clip: Tensor) -> None:
    overrides = {**FEW_STEPS, "frames_per_block": 1}
    with load(small_model, memory="off", overrides=overrides) as runtime:
        with begin(runtime, clip[:1]) as stream:
            made = take(stream, 4)
        assert [len(chunk.frames) for chunk in made] == [1, 4, 4, 4]
        with begin(runtime, 255 - clip[:1]) as stream:
            assert not torch.equal(next(stream).frames, made[0].frames)
            assert not torch.equal(next(stream).latents, made[1].latents)


def test_bad_arguments_leave_the_runtime_as_it_was(runtime: echo_rt.Runtime, clip: Tensor) -> None:
    for options, words in (
        ({"initial_video": clip[:10]}, "expected 9 or 21 frames, got 10"),
        ({"initial_video": clip, "fit": "stretch"}, "fit must be 'crop' or 'pad', or None; got 'stretch'"),
        ({"initial_video": clip, "include_initial": 1}, "include_initial must be True or False, got 1"),
        ({"fit": "crop"}, "fit is about an initial_video: expected one, got None"),
        ({"initial_latents": [1]}, "initial_latents must be a tensor or None, got a list"),
        ({"initial_latents": torch.zeros(3, 16, 4, 4).to_sparse()}, "a dense tensor with values, found torch.sparse"),
        ({"initial_latents": torch.zeros(3, 16, 4, 4, device="meta")}, "a dense tensor with values, found .* on meta"),
        ({"initial_latents": torch.zeros(3, 16, 4, 5)}, r"float32 \[k\*3, 16, 4, 4\], got float32 \[3, 16, 4, 5\]"),
        ({"initial_latents": torch.zeros(3, 16, 4, 4), "initial_video": clip}, "one of the two; got both"),
        ({"include_initial": False}, "about an initial_video: expected one, got None"),
        ({"initial_video": iter([clip[:4], np.zeros(3)])}, r"uint8 \[F, H, W, 3\], got float64 \[3\]"),
    ):
        with pytest.raises(ConfigError, match=words):
            runtime.stream(prompt_embeds=embeds(runtime), **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="expected 9 or 21 frames"):
        runtime.stream("a prompt that is not even encoded", initial_video=clip[:10])
    with runtime.stream(prompt_embeds=embeds(runtime)) as stream:
        next(stream)


def test_a_preview_begins_with_one_too(small_model: Path, clip: Tensor, film: list[echo_rt.Chunk]) -> None:
    with load(small_model, overrides=FEW_STEPS, vae="tiny") as runtime, begin(runtime, clip) as stream:
        made = take(stream, BLOCKS)
    for chunk, plain in zip(made, film, strict=True):
        assert torch.equal(chunk.latents, plain.latents) and chunk.frames.shape == plain.frames.shape


def test_a_resumed_video_needs_no_encoder(
    small_model: Path, clip: Tensor, film: list[echo_rt.Chunk], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(small_model, folder)
    with load(folder, overrides=FEW_STEPS, vae="tiny") as runtime:
        with begin(runtime, clip) as stream:
            next(stream)
            snapshot = stream.snapshot()
            rest = take(stream, BLOCKS - 1)
        (folder / VAE_FILE).unlink()
        with runtime.resume(snapshot) as stream:
            assert same(take(stream, BLOCKS - 1), rest)
