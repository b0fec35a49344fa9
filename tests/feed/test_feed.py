"""A stream on a thread of its own: its pace, and consumers that are slow, quick, many or vanished."""

from __future__ import annotations

import gc
import threading
import time
from pathlib import Path
from typing import Literal

import pytest
from feeding import LONG, feed_threads, until
from streaming import Gate, embeds, load, same, take, video, within

import echo_rt
from echo_rt.errors import ConfigError, StreamError

# ---------------------------------------------------------------- pace


def test_a_slow_consumer_makes_the_stream_wait(stream: echo_rt.Stream, expected: list[echo_rt.Chunk]) -> None:
    with echo_rt.Feed(stream, depth=2) as feed:
        until(lambda: feed.waiting == 2)
        time.sleep(0.3)  # blocks take a third of that
        assert (stream.next_block, stream.next_prompt_block) == (0, 2), "made more than may wait"
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


def test_a_snapshot_holds_what_waits_in_the_feed(
    runtime: echo_rt.Runtime, stream: echo_rt.Stream, expected: list[echo_rt.Chunk]
) -> None:
    with echo_rt.Feed(stream, depth=2) as feed:
        made = [next(feed)]
        until(lambda: feed.waiting == 2)
        snapshot = stream.snapshot()
        assert (snapshot.next_block, stream.next_block) == (1, 1)
        made.append(next(feed))
    stream.close()
    with runtime.resume(snapshot) as resumed:
        assert same(made[:1] + take(resumed, 5), expected) and same(made, expected[:2])


@pytest.mark.parametrize("when_full", ["wait", "drop"])
def test_snapshots_beside_a_feed_that_is_being_emptied(small_model: Path, when_full: Literal["wait", "drop"]) -> None:
    """Each is the video from the block it names on, whoever took or dropped blocks while it was made."""
    with load(small_model, lookahead=1, overrides={"denoising_steps": (1000, 500)}) as runtime:
        expected = video(runtime, 16)
        snapshots: list[echo_rt.Snapshot] = []
        with runtime.stream(prompt_embeds=embeds(runtime)) as stream:
            with stream.feed(depth=2, when_full=when_full) as feed:

                def consume() -> None:
                    while next(feed).index < 8:
                        pass

                consumer = threading.Thread(target=consume)
                consumer.start()
                while consumer.is_alive() and len(snapshots) < 4:
                    snapshots.append(stream.snapshot())
                consumer.join()
            snapshots.append(stream.snapshot())
        assert len(snapshots) > 1
        for snapshot in snapshots:
            at = snapshot.next_block
            assert [chunk.index for chunk in snapshot.held] == list(range(at, at + len(snapshot.held)))
            if at + 3 <= len(expected):
                with runtime.resume(snapshot) as resumed:
                    assert same(take(resumed, 3), expected[at : at + 3])


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
