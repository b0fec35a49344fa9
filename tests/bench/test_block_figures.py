"""From spans to figures, a day from a few blocks, verdicts: numbers that are worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from goals import judge

from echo_rt.bench.runner import BlockRunner, Interval, Sample, busy_seconds, intervals, median_p99
from echo_rt.engine.executor import Queue, Span, make_executor

CPU = torch.device("cpu")


def block(at: float) -> list[Interval]:
    """A block from ``at``: passes until 10, the memory beside them, handed over, decoded until 17, copied by 18."""
    parts = [
        ("Rollout._begin", Queue.MAIN, 0, 1),
        ("Rollout._update_memory", Queue.MEMORY, 1, 4),
        ("Rollout._denoise", Queue.MAIN, 1, 5),
        ("Rollout._keep", Queue.MAIN, 6, 10),
        ("Pipeline._hand_over", Queue.MAIN, 11, 12),
        ("Pipeline._decode", Queue.DECODE, 12, 17),
        ("", Queue.DECODE, 17, 18),
    ]
    return [Interval(name, queue, at + begin, at + end) for name, queue, begin, end in parts]


def test_a_turn_is_what_its_blocks_took() -> None:
    sample = Sample()
    turn = [block(0), block(20), block(45)]
    sample.add_turn(turn[0], turn[1:], [each for one in turn for each in one])
    assert sample.whole == [20, 25]  # arrivals at 18, 38, 63
    assert sample.transformer == [10, 10] and sample.memory == [3, 3] and sample.decode == [5, 5]
    # Of 18 to 63: in each of the two blocks 5 + 4 + 1 + 6 seconds.
    assert (sample.busy, sample.window) == (32, 45)
    assert sample.idle == pytest.approx(13 / 45)


class At:
    """A event at a time that is written down."""

    def __init__(self, time: float) -> None:
        self.time = time

    def wait(self, seconds: float | None = None) -> bool:
        return True

    def seconds_since(self, earlier: At) -> float:
        return self.time - earlier.time


class FakeRunner(BlockRunner):
    """Blocks that take 100 s where they begin a turn, and 20 s in their stride; its clock began at 1000."""

    def __init__(self) -> None:
        self.executor = SimpleNamespace(record=lambda queue: At(1000.0))
        self._begun = [(Span("Rollout._begin", Queue.MAIN, At(1162.0), At(1170.0)),)]
        self.log: list[str] = []
        self.made = 0

    def block(self, lookahead: int) -> tuple[None, tuple[Span, ...]]:
        self.log.append(f"block {lookahead}")
        self.made += 1
        begin = 1000.0 + (0 if self.made == 1 else 60 + 20 * self.made)
        spans = tuple(Span(one.stage, one.queue, At(begin + one.begin), At(begin + one.end)) for one in block(0))
        return None, spans

    def drain(self) -> None:
        self.log.append("drain")


@pytest.mark.parametrize("lookahead", [0, 1, 3])
def test_a_turn_counts_blocks_in_their_stride(lookahead: int) -> None:
    runner, sample, counter = FakeRunner(), Sample(), iter([500.0, 700.0])

    def joules() -> float:
        runner.log.append("joules")
        return next(counter)

    runner.turn(lookahead, 3, sample, joules)
    made = [f"block {lookahead}"]
    assert runner.log == [*made * lookahead, "joules", *made * 4, "joules", "drain"]
    # One at a time, what the first block that counts comes after is the turn's first, which arrived at 18.
    assert sample.whole == ([100, 20, 20] if lookahead == 0 else [20, 20, 20])
    assert sample.transformer == [10] * 3 and sample.joules_a_block == 200 / 4


def test_what_is_begun_ahead_keeps_the_device_busy() -> None:
    sample = Sample()
    FakeRunner().turn(1, 3, sample, lambda: None)
    # Arrivals from 118 to 178, three blocks of 16 s of work; of what runs from 162 to 170, one second falls into a gap.
    assert (sample.window, sample.busy) == (60, 3 * 16 + 1)
    assert sample.joules is None


def test_lanes_that_overlap_are_busy_once() -> None:
    spans = [(0, 4), (3, 6), (1, 2)]
    assert busy_seconds(spans, 0, 10) == 6
    assert busy_seconds(spans, 1.5, 5) == 3.5
    assert busy_seconds([], 0, 1) == 0


def test_energy_is_summed_where_the_board_tells_it() -> None:
    sample = Sample()
    assert sample.joules_a_block is None
    sample.add_energy(30.0, 3)
    sample.add_energy(None, 3)
    sample.add_energy(50.0, 5)
    assert sample.joules_a_block == 10


def test_median_and_p99() -> None:
    assert median_p99([0.001, 0.009, 0.002]) == (0.002, 0.009)
    assert median_p99([float(n) for n in range(200, 0, -1)]) == (100.5, 198)  # two of two hundred are above


def judged(block: float, off: float, *, p99: float = 1.0, float8: bool = False, **more: float) -> dict[str, str]:
    """Verdicts of a block that takes ``block`` ms, and ``off`` without the memory."""
    rows = [{"variant": name, "part": "whole block", "ms": ms} for name, ms in (("evolve", block), ("off", off))]
    rows[0] |= {"fps": 12e3 / block, "p99_ms": p99 * block}
    content = {"tables": {"Block": rows}, "resources": {"growth": 0, "peak": 12e9} | more}
    return {row["goal"].partition(":")[0]: row["verdict"] for row in judge(content, float8=float8)}


def test_goals_are_met_to_the_edge_and_unmet_beyond_it() -> None:
    met = judged(400.0, 400 / 1.1059, p99=1.05)
    assert len(met) == 6 and {*met.values()} == {"met"}
    unmet = judged(400.1, 400.1 / 1.1061, p99=1.0501, growth=1, peak=12.1e9)
    assert unmet.keys() == met.keys() and {*unmet.values()} == {"unmet"}
    edge, beyond = judged(270.0, 270 / 1.0799, float8=True), judged(270.1, 270.1 / 1.0801, float8=True)
    for name in ("whole block, float8", "memory against no memory, float8"):
        assert (edge[name], beyond[name]) == ("met", "unmet")
    assert beyond["memory against no memory"] == "met" and len(edge) == 8
    rows = judge({"resources": {"growth": None, "peak": None}}, float8=True)
    assert {(row["value"], row["verdict"]) for row in rows} == {(None, "open")}


def test_an_executor_notes_the_spans_that_are_wanted() -> None:
    executor = make_executor(CPU)
    ran = []

    def stage(fact: int) -> None:
        ran.append(fact)

    executor.run(stage, 6)
    assert executor.spans is None
    executor.spans = []
    since = executor.record(Queue.MAIN)
    executor.run(stage, 7, queue=Queue.DECODE)
    with executor.eager(Queue.MEMORY):
        ran.append(8)
    found = intervals(executor.spans, since)
    assert ran == [6, 7, 8] and executor.runs == 2
    assert [(each.stage.rpartition(".")[2], each.queue) for each in found] == [
        ("stage", Queue.DECODE),
        ("", Queue.MEMORY),
    ]
    assert 0 <= found[0].begin <= found[0].end <= found[1].begin <= found[1].end
