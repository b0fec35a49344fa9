"""The ring's arithmetic against lists of frames that are walked one block after the other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from echo_rt._C import RingLayout

Window = dict[str, int]
RELEASED: Window = dict(frames_per_block=3, sink_frames=3, local_frames=9, memory_frames=3, max_temporal_id=20)

# Blocks that hold: a day of the released recipe (325,000 latent frames), ten million frames, frame 2^31 and 2^40.
FAR_FRAMES = (325_000, 10_000_000, 2**31, 2**40)


def windows() -> Iterator[Window]:
    """Every valid window of 1-4 frames a block, 0-3 blocks of sink, 1-4 of ring, with no, one or all memory frames.

    No sink goes with no memory alone.
    """
    for per_block, sink, local in itertools.product((1, 2, 3, 4), (0, 1, 2, 3), (1, 2, 3, 4)):
        for memory, spare in itertools.product(sorted({0, 1, per_block}) if sink else (0,), (0, 1, 5)):
            yield dict(
                frames_per_block=per_block,
                sink_frames=sink * per_block,
                local_frames=local * per_block,
                memory_frames=memory,
                max_temporal_id=max(1, (sink + local) * per_block + memory - 1 + spare),
            )


class Walk:
    """A buffer of slots, each with the frame it holds, that is written one block after the other."""

    def __init__(self, window: Window) -> None:
        self.window = window
        self.block = -1
        self.frame = 0
        self.sink: list[int] = []
        self.ring: list[int | None] = [None] * window["local_frames"]
        self.cursor = 0

    def write_block(self) -> None:
        """Writes the next block, and notes where it went and what it overwrote."""
        self.block += 1
        self.written: list[int] = []
        self.evicted: list[int] = []
        self.slots: list[int] = []
        for _ in range(self.window["frames_per_block"]):
            base = self.window["memory_frames"]
            if len(self.sink) < self.window["sink_frames"]:
                self.slots.append(base + len(self.sink))
                self.sink.append(self.frame)
            else:
                overwritten = self.ring[self.cursor]
                if overwritten is not None:
                    self.evicted.append(overwritten)
                self.slots.append(base + self.window["sink_frames"] + self.cursor)
                self.ring[self.cursor] = self.frame
                self.cursor = (self.cursor + 1) % len(self.ring)
            self.written.append(self.frame)
            self.frame += 1

    @property
    def local(self) -> list[int]:
        return sorted(frame for frame in self.ring if frame is not None)

    def ids(self) -> dict[int, int]:
        """Ids of everything in the buffer: counted back from the newest frame once that has reached the largest."""
        newest = min(self.written[-1], self.window["max_temporal_id"])
        return {frame: newest - (self.written[-1] - frame) for frame in [*self.local, *self.written]}

    def occupied(self) -> list[int]:
        """Slots of sink and ring that hold a frame."""
        base = self.window["memory_frames"]
        ring = [i for i, frame in enumerate(self.ring) if frame is not None]
        return [base + i for i in range(len(self.sink))] + [base + self.window["sink_frames"] + i for i in ring]


def assert_block_matches(layout: RingLayout, walk: Walk) -> None:
    block, case = walk.block, f"block {walk.block} of {layout}"
    in_sink = not walk.local
    assert layout.first_frame(block) == walk.written[0], case
    assert layout.last_frame(block) == walk.written[-1], case
    assert layout.is_sink_block(block) == in_sink, case
    assert [layout.slot(frame) for frame in walk.written] == walk.slots, case

    assert layout.evicts(block) == bool(walk.evicted), case
    if walk.evicted:
        first = layout.evicted_frame(block)
        assert list(range(first, first + layout.frames_per_block)) == walk.evicted, case
        assert layout.slot(first) == walk.slots[0], case

    assert layout.local_filled(block) == len(walk.local), case
    assert layout.oldest_local(block) == (layout.sink_frames if in_sink else walk.local[0]), case

    attended = list(range(layout.attended_begin(False), layout.attended_end(block)))
    assert attended == walk.occupied(), case
    assert layout.attended_begin(True) == 0, case

    ids = walk.ids()
    assert {frame: layout.temporal_id(block, frame) for frame in ids} == ids, case
    shift = walk.written[-1] - ids[walk.written[-1]]
    assert layout.shift(block) == shift, case

    memory_frame = (layout.sink_frames if in_sink else walk.local[0]) - layout.memory_frames
    assert layout.memory_frame(block) == memory_frame, case
    fits = layout.memory_frames > 0 and memory_frame - shift >= layout.sink_frames
    assert layout.memory_fits(block) == fits, case


def test_every_block_is_where_a_walk_over_the_frames_puts_it() -> None:
    for window in windows():
        layout, walk = RingLayout(**window), Walk(window)
        for _ in range(60):
            walk.write_block()
            assert_block_matches(layout, walk)


def test_the_released_window_over_thousands_of_blocks() -> None:
    layout, walk = RingLayout(**RELEASED), Walk(RELEASED)
    for _ in range(3000):
        walk.write_block()
        assert_block_matches(layout, walk)


def test_the_steady_state_of_the_released_recipe_is_the_published_one() -> None:
    layout = RingLayout(**RELEASED)
    for block in (6, 7, 100, 10**12):
        queries = range(layout.first_frame(block), layout.last_frame(block) + 1)
        local = range(layout.oldest_local(block), layout.last_frame(block) + 1)
        memory = range(layout.memory_frame(block), layout.oldest_local(block))
        assert [layout.temporal_id(block, f) for f in queries] == [18, 19, 20]
        assert [layout.temporal_id(block, f) for f in local] == list(range(12, 21))
        assert [layout.temporal_id(block, f) for f in memory] == [9, 10, 11]
        assert (layout.attended_begin(True), layout.attended_end(block), layout.slots) == (0, 15, 15)


@pytest.mark.parametrize("frame", FAR_FRAMES)
def test_nothing_drifts_far_into_a_stream(frame: int) -> None:
    for window in windows():
        layout = RingLayout(**window)
        start = frame // layout.frames_per_block - 2
        for block in range(start, start + 2 * layout.local_frames + 4):
            case = f"block {block} of {layout}"
            frames = range(layout.oldest_local(block), layout.last_frame(block) + 1)
            slots = [layout.slot(f) for f in frames]
            ring_begin = layout.memory_frames + layout.sink_frames
            assert sorted(slots) == list(range(ring_begin, layout.slots)), case
            assert [layout.temporal_id(block, f) for f in frames] == list(
                range(layout.max_temporal_id - layout.local_frames + 1, layout.max_temporal_id + 1)
            ), case
            memory_id = layout.temporal_id(block, layout.memory_frame(block))
            assert layout.sink_frames <= memory_id <= layout.max_temporal_id, case
            assert layout.evicts(block), case
            assert layout.slot(layout.evicted_frame(block)) == layout.slot(layout.first_frame(block)), case


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames_per_block": 0}, "frames_per_block must be at least 1, got 0"),
        ({"sink_frames": -3}, "sink_frames must be at least 1, got -3"),
        ({"sink_frames": 0}, "sink_frames must be at least 1, got 0"),
        ({"sink_frames": -3, "memory_frames": 0}, "sink_frames must be at least 0, got -3"),
        ({"local_frames": 0}, "local_frames must be at least 1, got 0"),
        ({"memory_frames": -1}, "memory_frames must be at least 0, got -1"),
        ({"max_temporal_id": 0}, "max_temporal_id must be at least 1, got 0"),
        ({"sink_frames": 4}, "sink_frames must be a multiple of frames_per_block 3, got 4"),
        ({"local_frames": 10}, "local_frames must be a multiple of frames_per_block 3, got 10"),
        ({"memory_frames": 4}, "memory_frames must be at most frames_per_block 3, got 4"),
        ({"max_temporal_id": 13}, "need more temporal ids than 0..13"),
        ({"sink_frames": 3 * 2**61, "local_frames": 3 * 2**61}, "need more temporal ids than 0..20"),
    ],
)
def test_an_impossible_window_is_refused_by_its_numbers(change: Window, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        RingLayout(**{**RELEASED, **change})


def test_the_largest_window_that_has_ids_is_accepted() -> None:
    assert RingLayout(**{**RELEASED, "max_temporal_id": 14}).slots == 15


def test_blocks_and_frames_that_cannot_be_are_refused() -> None:
    layout = RingLayout(**RELEASED)
    largest = (2**63 - 1) // 3 - 1
    assert layout.temporal_id(largest, layout.last_frame(largest)) == 20
    for block in (-1, largest + 1):
        with pytest.raises(ValueError, match=f"block must be in 0..{largest}, got {block}"):
            layout.shift(block)
    with pytest.raises(ValueError, match="frame must not be negative, got -1"):
        layout.slot(-1)
