"""The queue of finished blocks: who takes one has it, what is not taken stays, what is closed keeps nothing."""

from __future__ import annotations

import asyncio
import gc
import threading
from typing import Any

import pytest
from streaming import within

from echo_rt.chunk import Chunk
from echo_rt.engine.ready import Feeder, ReadyQueue

LONG = 30.0  # seconds; only a deadlock takes that long


def block(index: int) -> Chunk:
    none: Any = None
    return Chunk(index=index, frames=none, first_frame=0, latents=none, stats=none)


def filled(*indices: int) -> ReadyQueue:
    queue = ReadyQueue(end=indices[0])
    for index in indices:
        queue.append(block(index))
    return queue


def indices(queue: ReadyQueue) -> list[int]:
    return [chunk.index for chunk in queue.blocks]


def test_blocks_are_taken_in_order_and_numbers_follow() -> None:
    queue = ReadyQueue((block(5), block(6)), end=7)
    assert (queue.next_block, len(queue)) == (5, 2)
    assert queue.take() is not None and queue.next_block == 6
    queue.append(block(7))
    assert (queue.next_block, queue.end, indices(queue)) == (6, 8, [6, 7])
    queue.take(), queue.take()
    assert queue.take() is None and queue.next_block == queue.end == 8


def test_a_feeder_that_drops_keeps_the_newest() -> None:
    queue = filled(0, 1, 2)
    seen: list[list[int]] = []

    def make_ahead(depth: float) -> bool:
        seen.append(indices(queue))
        queue.append(block(queue.end))
        return queue.end < 6

    feeder = Feeder(queue, make_ahead, depth=2, drop=True)
    within(LONG, feeder.join)
    assert seen == [[0, 1, 2], [1, 2, 3], [2, 3, 4]], "what was there before it is not its to drop"
    assert feeder.dropped == 2


def test_what_is_skipped_is_dropped_now_and_when_it_is_finished() -> None:
    queue = filled(2, 3, 4)
    queue.skip_to(6)
    assert (queue.next_block, len(queue), queue.skipped, queue.end) == (6, 0, 4, 5)
    queue.append(block(5))
    assert (queue.next_block, len(queue), queue.skipped) == (6, 0, 4)
    queue.append(block(6))
    queue.skip_to(6)
    assert (queue.next_block, indices(queue), queue.skipped, queue.end) == (6, [6], 4, 7)


def test_a_closed_queue_keeps_blocks_only_for_who_is_attached() -> None:
    queue = filled(3, 4)
    queue.attach(1)
    queue.close()
    assert indices(queue) == [3, 4]
    queue.take()
    queue.attach(-1)
    assert len(queue) == 0 and queue.next_block == 4, "the one that was not taken"
    queue = filled(3, 4)
    queue.attach(1)
    queue.attach(-1)
    assert indices(queue) == [3, 4], "an open queue keeps them for others"


def test_threads_that_take_while_others_append_get_each_block_once() -> None:
    queue, taken, count = ReadyQueue(), [], 2000
    numbers: list[int] = []

    def take() -> None:
        while len(taken) < count:
            numbers.append(queue.next_block)
            if (chunk := queue.take()) is not None:
                taken.append(chunk.index)

    takers = [threading.Thread(target=take, daemon=True) for _ in range(3)]
    for taker in takers:
        taker.start()
    for index in range(count):
        queue.append(block(index))
    for taker in takers:
        within(LONG, taker.join)
    assert sorted(taken) == list(range(count))
    assert numbers[0] == 0 and max(numbers) <= count


def test_every_change_wakes_an_event_loop_and_one_that_is_gone_is_no_error() -> None:
    queue = ReadyQueue()

    async def wait() -> int:
        threading.Timer(0.01, queue.append, (block(0),)).start()
        await asyncio.wait_for(asyncio.wrap_future(queue.news), LONG)
        return len(queue)

    assert asyncio.run(wait()) == 1 and not queue.news.done()
    loop = asyncio.new_event_loop()

    async def hang() -> None:
        await asyncio.wait([asyncio.wrap_future(queue.news)])

    waiting = hang()
    task = loop.create_task(waiting)
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    queue.append(block(1))
    assert len(queue) == 2
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    waiting.close()


@pytest.mark.parametrize("drop", [False, True])
def test_a_feeder_keeps_its_depth_and_leaves_all_of_it(drop: bool) -> None:
    queue, made, enough = ReadyQueue(), [0], threading.Event()

    def make_ahead(depth: float) -> bool:
        assert drop or len(queue) < depth == 3
        if made[0] == 10:  # and there are no more
            enough.set()
            return False
        queue.append(block(made[0]))
        made[0] += 1
        if made[0] == 3 and not drop:
            enough.set()
        return True

    feeder = Feeder(queue, make_ahead, 3, drop)
    assert enough.wait(LONG)
    feeder.stop()
    within(LONG, feeder.join)
    assert indices(queue) == ([7, 8, 9] if drop else [0, 1, 2]) and feeder.dropped == (7 if drop else 0)
    assert feeder.take() is None and len(queue) == 3
    queue.attach(1)
    feeder.close()  # once more: it lets go of the blocks for itself only
    queue.close()
    assert len(queue) == 3


def test_a_feeder_that_failed_tells_it_once_and_holds_nothing() -> None:
    class Held:
        pass

    def fail(depth: float) -> bool:
        held = Held()
        raise ValueError(f"broken with {held}")

    gc.collect()
    gc.disable()
    try:
        feeder = Feeder(ReadyQueue(), fail, 1, drop=False)
        within(LONG, feeder.join)
        assert not [one for one in gc.get_objects() if type(one) is Held]
        with pytest.raises(ValueError, match="broken"):
            feeder.take()
        assert feeder.has_news() and feeder.take() is None
    finally:
        gc.enable()
