"""A feed in an event loop: waits that are cancelled, errors, ends, a loop that is gone."""

from __future__ import annotations

import asyncio

import pytest
from feeding import LONG
from streaming import Gate, amid_blocks, same, within

import echo_rt


def test_async_for_and_cancelled_waits(stream: echo_rt.Stream, expected: list[echo_rt.Chunk]) -> None:
    async def consume() -> list[echo_rt.Chunk]:
        made: list[echo_rt.Chunk] = []
        timeouts = 0
        async with echo_rt.Feed(stream, depth=1) as feed:
            while len(made) < 4:

                async def more(feed: echo_rt.Feed = feed) -> None:
                    async for chunk in feed:
                        made.append(chunk)

                try:
                    await asyncio.wait_for(more(), 0.03)
                except asyncio.TimeoutError:
                    timeouts += 1
            assert not feed._ready.news.cancelled(), "a wait that is cancelled ends those of others"
        assert timeouts > 1
        return made

    made = asyncio.run(asyncio.wait_for(consume(), LONG))
    assert same(made[:4], expected[:4])
    assert next(stream).index == made[-1].index + 1


def test_an_async_consumer_sees_errors_and_ends(stream: echo_rt.Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    async def consume(feed: echo_rt.Feed) -> int:
        return len([chunk async for chunk in feed])

    async def closed_meanwhile() -> list[int]:
        feed = echo_rt.Feed(stream)
        tasks = [asyncio.create_task(consume(feed)) for _ in range(2)]
        while stream.next_block == 0:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(feed.close)
        return await asyncio.wait_for(asyncio.gather(*tasks), LONG)

    assert sum(asyncio.run(closed_meanwhile())) > 0

    def fail(block: int, step: int) -> None:
        raise RuntimeError("out of order")

    amid_blocks(stream, fail, monkeypatch)
    with pytest.raises(RuntimeError, match="out of order"):
        asyncio.run(asyncio.wait_for(consume(echo_rt.Feed(stream)), LONG))


def test_a_loop_that_is_gone_does_not_stop_the_feed(stream: echo_rt.Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(stream, monkeypatch)
    with echo_rt.Feed(stream) as feed:
        assert gate.reached.wait(LONG)
        loop = asyncio.new_event_loop()
        waiting = feed._take_async()
        task = loop.create_task(waiting)
        loop.run_until_complete(asyncio.sleep(0.01))
        assert not task.done()
        loop.close()
        gate.open()
        assert within(LONG, lambda: next(feed)).index == 0
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    waiting.close()
