"""Noise that a caller gives in the place of the seed's: which block it is asked for, and what becomes of a video."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_model import drawn_noise
from streaming import embeds, load, poison, same, take, video
from torch import Tensor

import echo_rt
from echo_rt.errors import ConfigError, StreamError
from echo_rt.snapshot.snapshot import Snapshot

STEPS = {"denoising_steps": (1000, 500), "first_block_steps": (1000, 750, 250)}
Noise = Callable[[int, tuple[int, ...]], Tensor]


def as_seed(seed: int, asked: list[tuple[int, int]] | None = None, given: int = 0) -> Noise:
    """What a stream of ``seed`` draws behind ``given`` blocks; (block, steps) of each call go to ``asked``."""

    def noise(block: int, shape: tuple[int, ...]) -> Tensor:
        if asked is not None:
            asked.append((block, shape[0]))
        return drawn_noise(torch.Size(shape), seed, block + given)

    return noise


@pytest.mark.parametrize("lookahead", [0, 2])
def test_the_seeds_own_noise_makes_the_seeds_video(small_model: Path, lookahead: int) -> None:
    asked: list[tuple[int, int]] = []
    with load(small_model, overrides=STEPS, lookahead=lookahead, check=True) as runtime:
        expected = video(runtime, 6, seed=9)
        with runtime.stream(prompt_embeds=embeds(runtime), noise=as_seed(9, asked)) as stream:
            stream.set_prompt(prompt_embeds=embeds(runtime, 1), block=6)
            assert same(take(stream, 6), expected)
    assert asked == [(block, 3 if block == 0 else 2) for block in range(6 + lookahead)]


ODD: dict[str, tuple[object, str]] = {
    "text": ("noise", "found a str"),
    "half": (torch.zeros(2, 3, 4, 4, 4, dtype=torch.float16), r"found float16 \[2, 3, 4, 4, 4\]"),
    "short": (torch.zeros(1), r"found float32 \[1\]"),
    "sparse": (None, "expected a dense tensor with values, found torch.sparse_coo on cpu"),
    "meta": (None, "expected a dense tensor with values, found torch.strided on meta"),
    "infinite": (None, "of finite values, found 2 that are NaN or infinite"),
}


@pytest.mark.parametrize("odd", ODD)
def test_noise_that_no_block_can_begin_with_ends_the_stream_alone(runtime: echo_rt.Runtime, odd: str) -> None:
    value, words = ODD[odd]

    def noise(block: int, shape: tuple[int, ...]) -> object:
        if block == 0:
            return torch.zeros(shape)
        wrong = torch.zeros(shape)
        wrong[0, 0, 0, 0, :2] = float("nan")
        made = {"sparse": torch.zeros(shape).to_sparse(), "meta": torch.zeros(shape, device="meta"), "infinite": wrong}
        return made.get(odd, value)

    with runtime.stream(prompt_embeds=embeds(runtime), noise=noise) as stream:  # type: ignore[arg-type]
        next(stream)
        with pytest.raises(ConfigError, match=f"noise for block 1: expected a float32 tensor .*{words}") as error:
            next(stream)
        assert "\n" not in str(error.value)
        with pytest.raises(StreamError, match="cannot go on: block 1 failed"):
            next(stream)
    video(runtime, 1)


def test_what_is_no_function_is_refused_before_a_stream_begins(runtime: echo_rt.Runtime) -> None:
    with pytest.raises(ConfigError, match="noise must be a function of a block and a shape, or None; got 3"):
        runtime.stream(prompt_embeds=embeds(runtime), noise=3)  # type: ignore[arg-type]


def test_an_error_of_the_callers_own_comes_through(runtime: echo_rt.Runtime) -> None:
    def noise(block: int, shape: tuple[int, ...]) -> Tensor:
        raise KeyError(f"noise.{block}")

    with runtime.stream(prompt_embeds=embeds(runtime), noise=noise) as stream, pytest.raises(KeyError, match=r"e\.0"):
        next(stream)


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_resumed_stream_is_given_its_noise_again(small_model: Path, tmp_path: Path, lookahead: int) -> None:
    path = tmp_path / "s.safetensors"
    with load(small_model, overrides=STEPS, lookahead=lookahead) as runtime:
        with runtime.stream(prompt_embeds=embeds(runtime), noise=as_seed(5)) as stream:
            take(stream, 3)
            stream.snapshot(path)
            expected = take(stream, 3)
        snapshot = Snapshot.load(path)
        assert snapshot.caller_noise and len(snapshot.held) == lookahead
        with pytest.raises(StreamError, match="noise that its caller gives: expected noise=, found none"):
            runtime.resume(snapshot)
        asked: list[tuple[int, int]] = []
        with runtime.resume(snapshot, noise=as_seed(5, asked)) as stream:
            assert same(take(stream, 3), expected)
            assert stream.snapshot().caller_noise
        assert asked[0] == (3 + lookahead, 2)
        with runtime.stream(prompt_embeds=embeds(runtime), seed=5) as stream:
            next(stream)
            own = stream.snapshot()
        with pytest.raises(StreamError, match="its seed's noise: expected no noise=, found one"):
            runtime.resume(own, noise=as_seed(5))


def test_after_a_rollback_the_numbers_are_the_videos(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guard = echo_rt.Guard(policy="roll_back", keep_every=2)
    asked: list[tuple[int, int]] = []
    with (
        load(small_model, overrides=STEPS) as runtime,
        runtime.stream(prompt_embeds=embeds(runtime), noise=as_seed(5, asked), guard=guard) as stream,
    ):
        poison(stream, monkeypatch, {4})
        assert [chunk.index for chunk in take(stream, 6)] == list(range(6))
        assert stream.rollbacks == 1
    assert [block for block, _ in asked] == [0, 1, 2, 3, 4, 4, 5]


@pytest.mark.parametrize("lookahead", [0, 2])
def test_given_blocks_need_no_noise(small_model: Path, lookahead: int) -> None:
    """The first generated block is the caller's block 0, also where the given ones are interrupted or not shown."""
    asked: list[tuple[int, int]] = []
    generator = torch.Generator().manual_seed(2)
    with load(small_model, overrides=STEPS, lookahead=lookahead, check=True) as runtime:
        options: dict[str, Any] = {
            "prompt_embeds": embeds(runtime),
            "initial_latents": torch.randn(9, *runtime.config.latent_shape, generator=generator),
        }
        with runtime.stream(**options, seed=9) as stream:
            expected = take(stream, 7)
        with runtime.stream(**options, noise=as_seed(9, asked, given=3)) as stream:
            made = take(stream, 1)
            snapshot = stream.snapshot()
            assert same(made + take(stream, 6), expected)
        assert asked == [(block, 3 if block == 0 else 2) for block in range(4 + lookahead)]
        assert snapshot.caller_noise and snapshot.initial_blocks == 1 + lookahead
        with runtime.resume(snapshot, noise=as_seed(9, given=3)) as stream:
            assert same(take(stream, 6), expected[1:])
        with runtime.stream(**options, noise=as_seed(9, given=3), include_initial=False) as stream:
            assert same(take(stream, 4), expected[3:])


def test_going_back_to_given_blocks_asks_for_the_first_blocks_steps_again(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = echo_rt.Guard(policy="roll_back", keep_every=100)
    asked: list[tuple[int, int]] = []
    with load(small_model, overrides=STEPS) as runtime:
        options: dict[str, Any] = {
            "prompt_embeds": embeds(runtime),
            "initial_latents": torch.zeros(6, *runtime.config.latent_shape),
            "guard": guard,
        }
        with runtime.stream(**options, noise=as_seed(9, asked)) as stream:
            poison(stream, monkeypatch, {4})
            assert [chunk.index for chunk in take(stream, 6)] == list(range(6))
            assert stream.rollbacks == 1
    assert asked == [(0, 3), (1, 2), (2, 2), (2, 3), (3, 2)]
