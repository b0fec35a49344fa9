"""Closing, forgetting and asking again, amid a block, a prompt, or a signal's handler."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from streaming import amid_blocks, embeds, load, within
from torch import Tensor

from echo_rt.engine.executor import Executor
from echo_rt.errors import StreamError
from echo_rt.model.text import TextEncoder

FEW_STEPS = {"denoising_steps": (1000, 500)}
LONG = 20.0


def test_two_threads_close_a_runtime_one_of_them_amid_a_block(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that shuts down while SIGTERM's handler, in the thread that makes the blocks, does so too."""
    runtime = load(small_model, overrides=FEW_STEPS)
    stream = runtime.stream(prompt_embeds=embeds(runtime))
    closer = threading.Thread(target=runtime.close, daemon=True)

    def handler(block: int, step: int) -> None:
        if not closer.ident:
            closer.start()
            while not stream.closed:
                closer.join(0.01)
            runtime.close()

    amid_blocks(stream, handler, monkeypatch)
    within(LONG, lambda: list(stream))
    closer.join(LONG)
    assert not closer.is_alive()


@pytest.mark.parametrize("moment", ["__enter__", "__exit__"])
def test_closing_while_this_thread_takes_or_leaves_the_stream(small_model: Path, moment: str) -> None:
    """A signal may come between two steps of Python, where a block is not begun yet, or over."""
    runtime = load(small_model, overrides=FEW_STEPS)
    stream: Any = runtime.stream(prompt_embeds=embeds(runtime))
    held = stream._lock

    class Interrupted:
        def __enter__(self) -> None:
            held.acquire()
            self._close("__enter__")

        def __exit__(self, *error: object) -> None:
            self._close("__exit__")
            held.release()

        def _close(self, now: str) -> None:
            if now == moment and not stream.closed:
                stream.close()

    stream._lock = Interrupted()
    # A block that was over when the signal came still comes.
    assert within(LONG, lambda: [chunk.index for chunk in stream]) == ([] if moment == "__enter__" else [0])
    assert stream.closed and stream._engine is None
    runtime.stream(prompt_embeds=embeds(runtime)).close()


def test_a_stream_asked_for_and_a_runtime_closed_amid_the_last_ones_block(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = load(small_model, overrides=FEW_STEPS)
    stream = runtime.stream(prompt_embeds=embeds(runtime))
    prompt = embeds(runtime)
    refused: list[BaseException] = []

    def ask() -> None:
        try:
            runtime.stream(prompt_embeds=prompt)
        except StreamError as error:
            refused.append(error)

    asker = threading.Thread(target=ask, daemon=True)

    def handler(block: int, step: int) -> None:
        if not asker.ident:
            stream.close()
            asker.start()
            asker.join(0.3)
            runtime.close()

    amid_blocks(stream, handler, monkeypatch)
    within(LONG, lambda: list(stream))
    asker.join(LONG)
    assert not asker.is_alive() and "the runtime is closed" in str(refused[0])


def test_a_stream_that_is_closed_just_as_another_is_asked_for(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for its last block must not hold what closing the runtime amid that block asks for."""
    runtime: Any = load(small_model, overrides=FEW_STEPS)
    stream = runtime.stream(prompt_embeds=embeds(runtime))
    prompt = embeds(runtime)
    asker = threading.Thread(target=lambda: runtime.stream(prompt_embeds=prompt), daemon=True)
    closer = threading.Thread(target=stream.close, daemon=True)
    require_open, asked = runtime._require_open, threading.Event()

    def closed_meanwhile() -> Any:
        if threading.current_thread() is asker and not closer.ident:
            closer.start()
            while not stream.closed:
                closer.join(0.01)
            asked.set()
        return require_open()

    def handler(block: int, step: int) -> None:
        if not asker.ident:
            asker.start()
            assert asked.wait(LONG)
            asker.join(0.3)
            runtime.close()

    monkeypatch.setattr(runtime, "_require_open", closed_meanwhile)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # the asker is refused: the runtime is closed
    amid_blocks(stream, handler, monkeypatch)
    within(LONG, lambda: list(stream))
    asker.join(LONG)
    assert not asker.is_alive()


def test_what_is_under_way_ends_before_a_forgotten_runtime_gives_its_memory_back(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settled: list[bool] = []

    class Watched(Executor):
        def synchronize(self) -> None:
            settled.append(True)

    monkeypatch.setattr("echo_rt.engine.engine.make_executor", lambda device, graphs: Watched())
    runtime: Any = load(small_model, lookahead=1, overrides=FEW_STEPS)
    stream: Any = runtime.stream(prompt_embeds=embeds(runtime))
    next(stream)
    assert runtime._engine.pipeline.in_flight == 1
    settled.clear()
    del runtime, stream
    gc.collect()
    assert settled, "buffers went while a block was under way in them"


def test_closing_while_this_thread_encodes_a_prompt(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the handler of a signal does; a text encoder takes seconds."""
    runtime = load(small_model, overrides=FEW_STEPS)
    encode = TextEncoder.encode

    def interrupted(self: TextEncoder, text: str) -> Tensor:
        runtime.close()
        return encode(self, text)

    monkeypatch.setattr(TextEncoder, "encode", interrupted)
    with pytest.raises(StreamError, match="the runtime is closed"):
        within(LONG, lambda: runtime.stream("a fox"))


def test_a_closed_stream_keeps_no_block_that_nobody_waits_for(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An awaited block is there, and its consumer cancelled, when the stream has been closed meanwhile."""
    with load(small_model, overrides=FEW_STEPS) as runtime:
        stream = runtime.stream(prompt_embeds=embeds(runtime))

        async def film() -> None:
            loop = asyncio.get_running_loop()

            async def made_and_cancelled(make: Callable[[int], bool], depth: int) -> None:
                make(depth)
                stream.close()
                assert len(stream._ready) == 1, "whoever waits for a block gets it"
                raise asyncio.CancelledError

            monkeypatch.setattr(loop, "run_in_executor", lambda _, make, depth: made_and_cancelled(make, depth))
            async for _ in stream:
                pass

        with pytest.raises(asyncio.CancelledError):
            asyncio.run(film())
        assert len(stream._ready) == 0 and stream.next_block == 0
