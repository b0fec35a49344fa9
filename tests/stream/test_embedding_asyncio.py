"""Streams in event loops: waits that are cancelled or time out lose no block."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

import pytest
from streaming import Gate, embeds, load, same, take, video

import echo_rt

LONG = 60.0  # seconds; only a deadlock takes that long


def test_async_for(runtime: echo_rt.Runtime, expected: list[echo_rt.Chunk]) -> None:
    async def consume(stream: echo_rt.Stream) -> list[echo_rt.Chunk]:
        made = []
        async for chunk in stream:
            made.append(chunk)
            if len(made) == 3:
                break
        with pytest.raises(ZeroDivisionError):
            async for chunk in stream:
                made.append(chunk)
                raise ZeroDivisionError
        return made

    with runtime.stream(prompt_embeds=embeds(runtime)) as stream:
        made = asyncio.run(asyncio.wait_for(consume(stream), LONG))
        made += take(stream, 1)  # by another way, after the loop has gone
    assert same(made, expected[:5])
    with pytest.raises(echo_rt.StreamError, match="the stream is closed"):
        asyncio.run(consume(stream))


@pytest.mark.parametrize("then", ["next", "snapshot", "async for"])
@pytest.mark.parametrize("opened", ["before the cancel", "after it"])
def test_a_cancelled_wait_loses_no_block(
    runtime: echo_rt.Runtime,
    expected: list[echo_rt.Chunk],
    monkeypatch: pytest.MonkeyPatch,
    then: str,
    opened: str,
) -> None:
    """Whether the block is made before the wait is cancelled or after it, it comes next, whichever way is taken."""

    async def first(stream: echo_rt.Stream) -> echo_rt.Chunk:
        async for chunk in stream:
            return chunk
        raise AssertionError("the stream ended")

    async def scene(stream: echo_rt.Stream, gate: Gate) -> list[echo_rt.Chunk]:
        wait = asyncio.create_task(first(stream))
        await asyncio.to_thread(gate.reached.wait, LONG)
        if opened == "before the cancel":
            gate.open()
            end = time.monotonic() + LONG
            while not stream._ready and time.monotonic() < end:
                time.sleep(0.001)  # the block is made while the loop does not run
            wait.cancel()
        else:
            wait.cancel()
            gate.open(after=0.1)
        with pytest.raises(asyncio.CancelledError):
            await wait
        if then == "async for":
            return [await first(stream)]
        if then == "snapshot":
            snapshot = stream.snapshot()
            assert snapshot.next_block == 1
            stream.close()
            with runtime.resume(snapshot) as resumed:
                return take(resumed, 1)
        return take(stream, 1)

    with runtime.stream(prompt_embeds=embeds(runtime)) as stream:
        made = take(stream, 1)
        with monkeypatch.context() as patch:
            made += asyncio.run(asyncio.wait_for(scene(stream, Gate(stream, patch)), LONG))
    assert same(made, expected[:2])


def test_a_stream_that_is_closed_amid_an_awaited_block_hands_it_out(
    runtime: echo_rt.Runtime, expected: list[echo_rt.Chunk], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As to a thread that waits; and then the loop ends."""

    async def scene(stream: echo_rt.Stream, gate: Gate) -> list[echo_rt.Chunk]:
        async def consume() -> list[echo_rt.Chunk]:
            return [chunk async for chunk in stream]

        consumer = asyncio.create_task(consume())
        await asyncio.to_thread(gate.reached.wait, LONG)
        closer = asyncio.create_task(asyncio.to_thread(stream.close))
        while not stream.closed:
            await asyncio.sleep(0.001)
        gate.open()
        await closer
        return await consumer

    stream = runtime.stream(prompt_embeds=embeds(runtime))
    made = asyncio.run(asyncio.wait_for(scene(stream, Gate(stream, monkeypatch)), LONG))
    assert same(made, expected[:1]) and stream.next_block == 1


def test_timeouts_lose_no_block(runtime: echo_rt.Runtime, expected: list[echo_rt.Chunk]) -> None:
    async def consume(stream: echo_rt.Stream) -> list[echo_rt.Chunk]:
        made: list[echo_rt.Chunk] = []
        timeouts = 0

        async def collect() -> None:
            async for chunk in stream:
                made.append(chunk)

        while len(made) < 5:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(collect(), 0.02)
            timeouts += 1
        assert timeouts > 1
        return made[:5]

    with runtime.stream(prompt_embeds=embeds(runtime)) as stream:
        assert same(asyncio.run(asyncio.wait_for(consume(stream), LONG)), expected[:5])


def test_two_streams_of_two_runtimes_in_one_loop(
    small_model: Path, runtime: echo_rt.Runtime, expected: list[echo_rt.Chunk]
) -> None:
    order: list[str] = []

    async def consume(name: str, stream: echo_rt.Stream) -> list[echo_rt.Chunk]:
        made = []
        async for chunk in stream:
            order.append(name)
            made.append(chunk)
            if len(made) == 4:
                break
        return made

    async def both(a: echo_rt.Stream, b: echo_rt.Stream) -> list[list[echo_rt.Chunk]]:
        return await asyncio.wait_for(asyncio.gather(consume("a", a), consume("b", b)), LONG)

    with load(small_model) as other:
        plain = video(other, 4, seed=1, prompt=1)
        with (
            runtime.stream(prompt_embeds=embeds(runtime)) as a,
            other.stream(prompt_embeds=embeds(other, 1), seed=1) as b,
        ):
            made = asyncio.run(both(a, b))
    assert same(made[0], expected[:4]) and same(made[1], plain)
    assert set(order[:-4]) == {"a", "b"}, f"one after the other: {order}"
