"""A stream on a thread of its own: slow, quick, vanished and failing consumers, and what is left after them."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from streaming import Gate, amid_blocks, embeds, load, same, small_model_in, take, video, within

import echo_rt
from echo_rt.errors import ConfigError, NumericalError, StreamError
from echo_rt.tiny import CHECKPOINT_FILE

LONG = 30.0  # seconds; only a deadlock takes that long


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model_in(tmp_path_factory)


@pytest.fixture(scope="module")
def runtime(small_model: Path) -> Iterator[echo_rt.Runtime]:
    with load(small_model) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def expected(runtime: echo_rt.Runtime) -> list[echo_rt.Chunk]:
    return video(runtime, 6)


@pytest.fixture
def stream(runtime: echo_rt.Runtime) -> Iterator[echo_rt.Stream]:
    with runtime.stream(prompt_embeds=embeds(runtime)) as stream:
        yield stream


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def feed_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "echo_rt feed"]


# ---------------------------------------------------------------- pace


def test_a_slow_consumer_makes_the_stream_wait(stream: echo_rt.Stream, expected: list[echo_rt.Chunk]) -> None:
    with echo_rt.Feed(stream, depth=2) as feed:
        until(lambda: feed.waiting == 2)
        time.sleep(0.3)  # blocks take a third of that
        assert stream.next_block == 2, "made more than may wait"
        made = within(LONG, lambda: [next(feed) for _ in range(5)])
        assert feed.dropped == 0
    assert same(made, expected[:5])


def test_or_the_oldest_blocks_are_dropped(stream: echo_rt.Stream, expected: list[echo_rt.Chunk]) -> None:
    with echo_rt.Feed(stream, depth=2, when_full="drop") as feed:
        until(lambda: feed.dropped == 3)
        chunk = next(feed)
        assert chunk.index >= 3 and feed.waiting <= 2
        if chunk.index == 3:
            assert same([chunk], expected[3:4])
    assert stream.next_block == chunk.index + 1, "what was not taken is not given back"


def test_depth_and_pace_must_be_ones_there_are(stream: echo_rt.Stream) -> None:
    for depth in (0, -1, 1.0, True, "2"):
        with pytest.raises(ConfigError, match=r"depth must be a number of blocks, 1 or more, got"):
            echo_rt.Feed(stream, depth=depth)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="when_full must be 'wait' or 'drop', got 'block'"):
        echo_rt.Feed(stream, when_full="block")  # type: ignore[arg-type]
    stream.close()
    with pytest.raises(StreamError, match="the stream is closed"):
        echo_rt.Feed(stream)
    assert feed_threads() == []


# ---------------------------------------------------------------- consumers


def test_several_consumers_get_each_block_once(stream: echo_rt.Stream, expected: list[echo_rt.Chunk]) -> None:
    taken: list[echo_rt.Chunk] = []
    with echo_rt.Feed(stream) as feed:

        def consume() -> None:
            for chunk in feed:
                taken.append(chunk)
                if len(taken) >= 5:
                    feed.close()

        consumers = [threading.Thread(target=consume, daemon=True) for _ in range(3)]
        for consumer in consumers:
            consumer.start()
        for consumer in consumers:
            consumer.join(LONG)
            assert not consumer.is_alive()
    taken.sort(key=lambda chunk: chunk.index)
    assert [chunk.index for chunk in taken] == list(range(len(taken)))
    assert same(taken[:5], expected[:5])


def test_polling_never_waits_longer_than_asked(stream: echo_rt.Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(stream, monkeypatch)
    with echo_rt.Feed(stream) as feed:
        assert gate.reached.wait(LONG)
        assert feed.poll() is None and feed.poll(timeout=0.05) is None
        gate.open()
        assert feed.poll(timeout=LONG).index == 0  # type: ignore[union-attr]
    with pytest.raises(StreamError, match="the feed is closed"):
        feed.poll()


def test_a_closed_feed_leaves_the_stream_where_the_consumer_stopped(
    stream: echo_rt.Stream, expected: list[echo_rt.Chunk]
) -> None:
    with echo_rt.Feed(stream, depth=3) as feed:
        made = [next(feed), next(feed)]
        until(lambda: feed.waiting == 3)
    assert feed.closed and feed_threads() == []
    made += take(stream, 1)
    snapshot = stream.snapshot()
    assert snapshot.next_block == 3, "blocks that wait are part of the state"
    with echo_rt.Feed(stream) as feed:
        made += [next(feed) for _ in range(3)]
    assert same(made, expected)
    for use in (lambda: next(feed), lambda: list(feed)):
        with pytest.raises(StreamError, match="the feed is closed"):
            use()


def test_a_forgotten_feed_ends_its_thread_and_loses_no_block(
    stream: echo_rt.Stream, expected: list[echo_rt.Chunk]
) -> None:
    gc.disable()  # none of this may need the collector
    try:
        feed = echo_rt.Feed(stream)
        made = [next(feed)]
        until(lambda: feed.waiting == 2)  # its thread waits for room
        del feed
        until(lambda: feed_threads() == [])
        for chunk in echo_rt.Feed(stream):
            made.append(chunk)
            break
        made.append(next(stream))  # at once, while the thread may be amid a block
        feed = echo_rt.Feed(stream)
        made.append(next(feed))
        until(lambda feed=feed: feed.waiting == 2)
        del feed
        made.append(next(stream))  # at once, while the thread waits for room
        until(lambda: feed_threads() == [])
        with pytest.raises(ZeroDivisionError), echo_rt.Feed(stream) as feed:
            made.append(next(feed))
            raise ZeroDivisionError
        until(lambda: feed_threads() == [])
    finally:
        gc.enable()
    assert same(made, expected)


def test_prompts_reach_the_block_that_is_not_begun(runtime: echo_rt.Runtime, stream: echo_rt.Stream) -> None:
    with echo_rt.Feed(stream, depth=2) as feed:
        until(lambda: feed.waiting == 2)
        assert stream.next_prompt_block == 2
        stream.set_prompt(prompt_embeds=embeds(runtime, 1))
        made = [next(feed) for _ in range(4)]
    stream.close()
    with runtime.stream(prompt_embeds=embeds(runtime)) as plain:
        plain.set_prompt(prompt_embeds=embeds(runtime, 1), block=2)
        assert same(take(plain, 4), made)


# ---------------------------------------------------------------- errors and ends


def test_an_error_comes_after_the_blocks_before_it(
    runtime: echo_rt.Runtime,
    stream: echo_rt.Stream,
    expected: list[echo_rt.Chunk],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def poisoned(block: int, step: int) -> None:
        if block == 2:
            runtime._engine.rollout.state.x.fill_(float("nan"))  # type: ignore[union-attr]

    with monkeypatch.context() as patch, echo_rt.Feed(stream, depth=4) as feed:
        amid_blocks(stream, poisoned, patch)
        until(lambda: stream.failure is not None)
        made = [next(feed), next(feed)]
        with pytest.raises(NumericalError, match="block 2: latent"):
            next(feed)
        for use in (lambda: next(feed), feed.poll, lambda: list(feed)):
            with pytest.raises(StreamError, match="the stream cannot go on: block 2 failed"):
                use()
    assert same(made, expected[:2])
    assert same(video(runtime, 2), expected[:2])


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_a_thread_that_dies_is_an_error_and_not_a_silence(
    stream: echo_rt.Stream, kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(block: int, step: int) -> None:
        raise kind("pulled out")

    with echo_rt.Feed(stream, depth=1) as feed:
        next(feed)
        amid_blocks(stream, die, monkeypatch)
        with pytest.raises(StreamError, match=f"the feed's thread died of {kind.__name__}: pulled out"):
            within(LONG, lambda: list(feed))
    assert feed_threads() == []


def test_closing_the_stream_or_the_runtime_ends_the_loop(small_model: Path) -> None:
    with load(small_model) as runtime:
        for close in ("stream", "runtime"):
            stream = runtime.stream(prompt_embeds=embeds(runtime))
            with echo_rt.Feed(stream) as feed:
                next(feed)
                (stream if close == "stream" else runtime).close()
                # What was made before still comes, then the end.
                assert within(LONG, lambda feed=feed: [chunk.index for chunk in feed])[:1] in ([], [1])
                with pytest.raises(StreamError, match="the stream is closed"):
                    feed.poll()


def test_closing_from_another_thread_ends_a_wait(stream: echo_rt.Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(stream, monkeypatch)
    feed = echo_rt.Feed(stream)
    assert gate.reached.wait(LONG)
    closer = threading.Timer(0.1, feed.close)
    closer.start()
    assert within(LONG, lambda: list(feed)) == []
    assert closer.is_alive(), "close did not wait for the block"
    gate.open()
    closer.join(LONG)
    feed.close()
    assert next(stream).index == 0


def test_a_failure_keeps_nothing_alive(small_model: Path) -> None:
    runtime = load(small_model)
    stream = runtime.stream(prompt_embeds=embeds(runtime))
    kv = weakref.ref(runtime._engine.rollout.state.kv)  # type: ignore[union-attr]
    rollout = weakref.ref(runtime._engine.rollout)  # type: ignore[union-attr]

    def fail() -> None:
        raise ValueError("broken")

    gc.collect()
    gc.disable()
    try:
        rollout().next_block = fail  # type: ignore[method-assign, union-attr]
        feed = echo_rt.Feed(stream)
        until(lambda feed=feed: feed._channel.over)
        runtime.close()
        del feed, stream  # the error was never asked for
        until(lambda: feed_threads() == [])
        assert kv() is None
    finally:
        gc.enable()


# ---------------------------------------------------------------- asyncio


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
            assert feed._channel.sleepers == set(), "a cancelled wait is still waited for"
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
        await asyncio.sleep(0.3)
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
        assert len(feed._channel.sleepers) == 1
        loop.close()
        gate.open()
        assert within(LONG, lambda: next(feed)).index == 0
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    waiting.close()


# ---------------------------------------------------------------- processes


PROGRAM = """
    import sys, echo_rt, torch
    runtime = echo_rt.Runtime.from_pretrained(sys.argv[1], checkpoint=sys.argv[2], device="cpu")
    embeds = torch.zeros(1, runtime.config.transformer.text_dim)
    feed = echo_rt.Feed(runtime.stream(prompt_embeds=embeds), when_full=sys.argv[3])
    print(next(feed).index, flush=True)
    if sys.argv[4] == "error":
        raise ZeroDivisionError
"""


@pytest.mark.parametrize(("when_full", "end"), [("wait", "end"), ("drop", "error")])
def test_a_program_may_end_while_its_feed_runs(small_model: Path, when_full: str, end: str) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-c", textwrap.dedent(PROGRAM), small_model, small_model / CHECKPOINT_FILE),
            *(when_full, end),
        ],
        capture_output=True,
        text=True,
        timeout=2 * LONG,
        env={**os.environ, "PYTHONPATH": str(Path(echo_rt.__file__).parent.parent)},
    )
    assert done.stdout == "0\n"
    if end == "end":
        assert (done.returncode, done.stderr) == (0, "")
    else:
        assert done.returncode == 1 and done.stderr.rstrip().endswith("ZeroDivisionError")


def test_a_fork_has_no_thread_to_wait_for(stream: echo_rt.Stream) -> None:
    with echo_rt.Feed(stream) as feed:
        until(lambda: feed.waiting == 2)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for use in (lambda: next(feed), feed.poll, lambda: list(feed)):
                    with pytest.raises(StreamError, match="no thread in this process"):
                        use()
                feed.close()
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        assert next(feed).index == 0
