"""One runtime, several threads, and what happens in the middle of a block."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from streaming import OTHER, PROMPT, Gate, amid_blocks, embeds, load, same, take, video, within
from torch import Tensor

import echo_rt
from echo_rt.engine.prompts import Prompt
from echo_rt.engine.rollout import Rollout
from echo_rt.engine.scheduler import Blocks
from echo_rt.errors import NumericalError, StreamError
from echo_rt.model.text import TextEncoder

LONG = 30.0  # seconds; only a deadlock takes that long


@pytest.fixture
def runtime(small_model: Path) -> Iterator[echo_rt.Runtime]:
    """Of its own for each test, so that one deadlock is one failure."""
    runtime = load(small_model)
    yield runtime
    within(LONG, runtime.close)


def thread(act: object) -> threading.Thread:
    made = threading.Thread(target=act, daemon=True)  # type: ignore[arg-type]
    made.start()
    return made


# ---------------------------------------------------------------- closing


def test_close_waits_for_the_block_that_is_being_made(
    runtime: echo_rt.Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = runtime.stream(prompt_embeds=embeds(runtime))
    gate = Gate(stream, monkeypatch)
    made: list[echo_rt.Chunk] = []
    maker = thread(lambda: made.append(next(stream)))
    assert gate.reached.wait(LONG)
    closer = thread(stream.close)
    closer.join(0.3)
    assert closer.is_alive(), "close did not wait"
    assert stream.closed and stream.next_block == 0
    gate.open()
    closer.join(LONG)
    assert not closer.is_alive()
    assert stream.next_block == 1, "closed before the block was whole"
    maker.join(LONG)
    assert [chunk.index for chunk in made] == [0]
    with pytest.raises(StreamError, match="the stream is closed"):
        next(stream)


@pytest.mark.parametrize("closed_by", ["this thread", "another thread", "the runtime"])
def test_a_new_stream_after_a_close_amid_a_block(
    small_model: Path, runtime: echo_rt.Runtime, closed_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old block still fills the buffers when the new stream is asked for: it must not fill them any more after."""
    expected = video(runtime, 3, seed=5, prompt=1)
    stream = runtime.stream(prompt_embeds=embeds(runtime))
    next(stream)
    gate = Gate(stream, monkeypatch)
    maker = thread(lambda: list(stream))
    assert gate.reached.wait(LONG)
    gate.open(after=0.2)
    if closed_by == "this thread":
        stream.close()
    elif closed_by == "another thread":
        thread(stream.close)
        while not stream.closed:
            time.sleep(0.001)
    else:
        runtime.close()
        assert stream.next_block == 2, "closed before the block was whole"
        runtime = load(small_model)
    try:
        assert same(video(runtime, 3, seed=5, prompt=1), expected)
    finally:
        maker.join(LONG)
        runtime.close()
    assert not maker.is_alive()
    # What was closed counts its own blocks, not those of whoever came after it.
    frames = runtime.vae_config.video_frames(2 * runtime.config.window.frames_per_block)
    assert (stream.next_block, stream.video_frames) == (2, frames)


# ---------------------------------------------------------------- many at once


def test_of_two_that_race_for_the_runtime_one_wins(runtime: echo_rt.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    start = Blocks.start

    def slow(*arguments: Any) -> None:
        time.sleep(0.02)  # long enough for the other to come between
        start(*arguments)

    # Both have found the runtime free before either has its prompt.
    barrier = threading.Barrier(2)

    def resolve(prompt: None, prompt_embeds: Tensor) -> Prompt:
        barrier.wait(LONG)
        return Prompt(embeds=prompt_embeds)

    assert runtime._engine is not None
    monkeypatch.setattr(Blocks, "start", slow)
    monkeypatch.setattr(runtime._engine.prompts, "resolve", resolve)
    for attempt in range(10):
        won: list[echo_rt.Stream] = []
        lost: list[BaseException] = []

        def race(won: list = won, lost: list = lost) -> None:  # type: ignore[type-arg]
            try:
                won.append(runtime.stream(prompt_embeds=embeds(runtime)))
            except BaseException as error:
                lost.append(error)

        racers = [thread(race) for _ in range(2)]
        for racer in racers:
            racer.join(LONG)
        assert len(won) == len(lost) == 1, f"attempt {attempt}: {won}, {lost}"
        assert isinstance(lost[0], StreamError) and "has a live stream" in str(lost[0])
        won[0].close()


def test_prompts_from_many_threads_while_blocks_are_made(
    runtime: echo_rt.Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [PROMPT, OTHER, "a bear on the moon"]
    expected = {text: runtime.encode_prompt(text) for text in texts}
    stream = runtime.stream(PROMPT)
    encoded: list[tuple[str, Tensor]] = []
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(texts))
    inside: list[str] = []
    encode = TextEncoder.encode

    def watched(self: TextEncoder, text: str) -> Tensor:
        inside.append(text)
        time.sleep(0.05)  # long enough for another to come between
        assert inside == [text], "two prompts at a time"
        inside.remove(text)
        return encode(self, text)

    monkeypatch.setattr(TextEncoder, "encode", watched)

    def ask(text: str) -> None:
        try:
            barrier.wait(LONG)
            encoded.append((text, runtime.encode_prompt(text)))
            stream.set_prompt(text)
        except BaseException as error:
            errors.append(error)

    askers = [thread(lambda text=text: ask(text)) for text in texts]
    made = take(stream, 3)
    for asker in askers:
        asker.join(LONG)
    assert not errors and len(encoded) == len(texts)
    assert all(torch.equal(embedding, expected[text]) for text, embedding in encoded)
    # Whichever came last counts, whole.
    pending = stream.snapshot().prompts
    assert all(any(torch.equal(tensor, embedding) for embedding in expected.values()) for tensor in pending.values())
    made += take(stream, 2)
    assert all(torch.isfinite(chunk.latents).all() for chunk in made)


# ---------------------------------------------------------------- amid a block


def test_a_block_cannot_be_asked_for_amid_a_block_of_the_same_thread(
    runtime: echo_rt.Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a signal handler would: refused rather than waiting for itself for ever, and the block goes on."""
    expected = video(runtime, 2)
    stream = runtime.stream(prompt_embeds=embeds(runtime))
    refused = []

    def nosy(block: int, step: int) -> None:
        for ask in (lambda: next(stream), stream.snapshot):
            with pytest.raises(StreamError, match="in the middle of a block"):
                ask()
            refused.append(step)
        with pytest.raises(StreamError, match="has a live stream"):
            runtime.stream(prompt_embeds=embeds(runtime))

    amid_blocks(stream, nosy, monkeypatch)
    assert same(within(LONG, lambda: take(stream, 2)), expected)
    assert len(refused) == 2 * 2 * len(runtime.config.sampler.denoising_steps)


@pytest.mark.parametrize("through", ["stream", "runtime"])
def test_closing_amid_a_block_of_the_same_thread(
    runtime: echo_rt.Runtime, through: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = video(runtime, 2)
    stream = runtime.stream(prompt_embeds=embeds(runtime))

    def closing(block: int, step: int) -> None:
        if block == 1:
            (stream if through == "stream" else runtime).close()

    amid_blocks(stream, closing, monkeypatch)
    # The block in which it was closed is whole and still comes.
    assert same(within(LONG, lambda: list(stream)), expected)
    assert stream.closed and stream._engine is None
    with pytest.raises(StreamError, match=f"the {through} is closed"):
        next(stream)
    if through == "stream":
        assert same(video(runtime, 2), expected)


def test_ctrl_c_ends_the_video_and_not_the_runtime(runtime: echo_rt.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = video(runtime, 3)
    assert runtime._engine is not None
    rollout = runtime._engine.rollout
    next_block, made = rollout.next_block, []

    def interrupted(noise: Tensor | None) -> Tensor:
        latents = next_block(noise)
        if len(made) == 2:
            raise KeyboardInterrupt
        return latents

    with monkeypatch.context() as patch:
        patch.setattr(rollout, "next_block", interrupted)
        stream = runtime.stream(prompt_embeds=embeds(runtime))
        with pytest.raises(KeyboardInterrupt) as error:
            for chunk in stream:
                made.append(chunk)
    assert same(made, expected[:2])
    assert stream.failure is not None and "block 2 failed (KeyboardInterrupt" in stream.failure
    with pytest.raises(StreamError, match="block 2 failed"):
        next(stream)
    assert same(video(runtime, 3), expected)  # ``error`` still holds the failed stream's frames
    assert error.value is not None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_video_with_nan_is_not_shown(runtime: echo_rt.Runtime, bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = video(runtime, 2)
    assert runtime._engine is not None
    decoder = runtime._engine.pipeline._decoder
    decode = decoder.decode_next

    def spoiled(*arguments: object, is_start: bool) -> Tensor:
        frames = decode(*arguments, is_start=is_start)  # type: ignore[arg-type]
        frames[-1, 3, 5, 1] = bad
        return frames

    with monkeypatch.context() as patch:
        patch.setattr(decoder, "decode_next", spoiled)
        stream = runtime.stream(prompt_embeds=embeds(runtime))
        with pytest.raises(NumericalError, match=r"block 0: decoded video: 1 of \d+ values are NaN or infinite"):
            next(stream)
        with pytest.raises(StreamError, match="block 0 failed"):
            next(stream)
    assert same(video(runtime, 2), expected)


def test_no_new_stream_amid_a_block_of_the_same_thread(
    runtime: echo_rt.Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = video(runtime, 2)
    stream = runtime.stream(prompt_embeds=embeds(runtime))

    def restarting(block: int, step: int) -> None:
        if (block, step) == (1, 1):
            stream.close()
            with pytest.raises(StreamError, match="in the middle of a block"):
                runtime.stream(prompt_embeds=embeds(runtime))

    amid_blocks(stream, restarting, monkeypatch)
    assert same(within(LONG, lambda: list(stream)), expected)


def test_closing_the_runtime_while_a_stream_begins(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = load(small_model)
    prompt = embeds(runtime)
    start = Rollout.start

    def closing(self: Rollout, prompt_embeds: Tensor, seed: int) -> None:
        start(self, prompt_embeds, seed)
        runtime.close()  # what a signal handler of this thread may do

    monkeypatch.setattr(Rollout, "start", closing)
    with pytest.raises(StreamError, match="the runtime is closed"):
        within(LONG, lambda: runtime.stream(prompt_embeds=prompt))
