"""From spans to figures, a day from a few blocks, verdicts: numbers that are worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from echo_rt.bench.measure import take_turn
from echo_rt.bench.model import RandomTensors
from echo_rt.bench.targets import Achieved, a_day, judge
from echo_rt.bench.timing import APART, Interval, Sample, Span, busy_seconds, intervals, milliseconds, watched_executor
from echo_rt.engine.executor import Lane
from echo_rt.errors import BackendError

CPU = torch.device("cpu")


def block(at: float) -> list[Interval]:
    """A block from ``at``: passes until 10, the memory beside them, handed over, decoded until 17, copied by 18."""
    parts = [
        ("Rollout._begin", Lane.MAIN, 0, 1),
        ("Rollout._update_memory", Lane.MEMORY, 1, 4),
        ("Rollout._denoise", Lane.MAIN, 1, 5),
        ("Rollout._keep", Lane.MAIN, 6, 10),
        ("Pipeline._hand_over", Lane.MAIN, 11, 12),
        ("Pipeline._decode", Lane.DECODE, 12, 17),
        (APART, Lane.DECODE, 17, 18),
    ]
    return [Interval(name, lane, at + begin, at + end) for name, lane, begin, end in parts]


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
    """A mark at a time that is written down."""

    def __init__(self, time: float) -> None:
        self.time = time

    def wait(self, seconds: float | None = None) -> bool:
        return True

    def seconds_since(self, earlier: At) -> float:
        return self.time - earlier.time


class FakeRig:
    """Blocks that take 100 s where they begin a turn, and 20 s in their stride; its clock began at 1000."""

    def __init__(self) -> None:
        self.executor = SimpleNamespace(mark=lambda lane: At(1000.0))
        self.log: list[str] = []
        self.made = 0

    def block(self, lookahead: int) -> SimpleNamespace:
        self.log.append(f"block {lookahead}")
        self.made += 1
        begin = 1000.0 + (0 if self.made == 1 else 60 + 20 * self.made)
        spans = tuple(Span(one.stage, one.lane, At(begin + one.begin), At(begin + one.end)) for one in block(0))
        return SimpleNamespace(spans=spans)

    def in_flight_spans(self) -> list[Span]:
        return [Span("Rollout._begin", Lane.MAIN, At(1162.0), At(1170.0))]

    def drain(self) -> None:
        self.log.append("drain")


@pytest.mark.parametrize("lookahead", [0, 1, 3])
def test_a_turn_counts_blocks_in_their_stride(lookahead: int) -> None:
    rig, sample, counter = FakeRig(), Sample(), iter([500.0, 700.0])

    def joules() -> float:
        rig.log.append("joules")
        return next(counter)

    take_turn(rig, lookahead, 3, sample, joules)  # type: ignore[arg-type]
    made = [f"block {lookahead}"]
    assert rig.log == [*made * lookahead, "joules", *made * 4, "joules", "drain"]
    # One at a time, what the first block that counts comes after is the turn's first, which arrived at 18.
    assert sample.whole == ([100, 20, 20] if lookahead == 0 else [20, 20, 20])
    assert sample.transformer == [10] * 3 and sample.joules_a_block == 200 / 4


def test_what_is_begun_ahead_keeps_the_device_busy() -> None:
    sample = Sample()
    take_turn(FakeRig(), 1, 3, sample, lambda: None)  # type: ignore[arg-type]
    # Arrivals from 118 to 178, three blocks of 16 s of work; of what runs from 162 to 170, one second falls into a gap.
    assert (sample.window, sample.busy) == (60, 3 * 16 + 1)
    assert sample.joules is None


def test_lanes_that_overlap_are_busy_once() -> None:
    spans = [Interval("a", Lane.MAIN, 0, 4), Interval("b", Lane.DECODE, 1, 2), Interval("c", Lane.DECODE, 3, 6)]
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


def test_median_and_p99_are_in_milliseconds() -> None:
    assert milliseconds([0.001, 0.002, 0.009]) == (pytest.approx(2), pytest.approx(9))


def test_a_day_by_hand() -> None:
    run: dict[str, Any] = dict(
        blocks=50,
        seconds_a_block=0.5,
        frames_a_block=12,
        frame_rate=16,
        joules_a_block=100.0,
        frame_bytes=10**6,
        latent_bytes=10**5,
        snapshot_bytes=5 * 10**9,
        host_bytes=2 * 10**9,
        device_bytes=9 * 10**9,
    )
    day = {figure.what: figure for figure in a_day(**run)}
    expected = {
        "blocks": 172_800,
        "frames": 2_073_600,
        "video": 36,
        "energy of the GPU": 4.8,  # 172,800 blocks of 100 J are 17.28 MJ
        "frames, as bytes": 172.8,
        "latents": 17.28,
        "snapshots": 120,
        "host memory": 2,
        "device memory": 9,
    }
    assert {what: figure.value for what, figure in day.items()} == pytest.approx(expected)
    for what in ("blocks", "frames", "video", "energy of the GPU", "frames, as bytes", "latents"):
        assert day[what].how.startswith("extrapolated from 50 measured blocks")
    unmeasured = {figure.what: figure for figure in a_day(**{**run, "joules_a_block": None, "device_bytes": None})}
    assert unmeasured["energy of the GPU"].value is None and "no board" in unmeasured["energy of the GPU"].how
    assert unmeasured["device memory"].value is None


GOOD = Achieved(324.0, 0.106, 0.019, 1.05, 0, 12 * 10**9)


def test_goals_are_met_to_the_edge_and_unmet_beyond_it() -> None:
    assert {goal.verdict for goal in judge(GOOD)} == {"met"}
    bad = Achieved(400.1, 0.107, 0.02, 1.051, 1, 12 * 10**9 + 1)
    assert [goal.verdict for goal in judge(bad)] == ["unmet"] * 7
    assert [goal.value for goal in judge(bad)][:4] == pytest.approx([400.1, 400.1, 10.7, 2.0])
    assert [goal.verdict for goal in judge(replace(GOOD, block_ms=324.1))][:2] == ["met", "unmet"]
    assert {goal.verdict for goal in judge(Achieved(*[None] * 6))} == {"open"}
    own = judge(replace(GOOD, block_ms=270.1), float8=True)
    assert [goal.verdict for goal in own] == ["met"] * 7 + ["unmet"] and "float8" in own[-1].goal
    assert judge(replace(GOOD, block_ms=270.0), float8=True)[-1].verdict == "met"


def test_random_tensors_depend_on_name_and_seed_alone() -> None:
    shapes = {"a.weight": (64, 1024), "b.weight": (64, 1024), "norm.weight": (4096,), "gate_linear.bias": (4096,)}
    tensors = RandomTensors(shapes, CPU)
    first = tensors["a.weight"]
    assert torch.equal(RandomTensors(dict(reversed(shapes.items())), CPU)["a.weight"], first)
    assert not torch.equal(tensors["b.weight"], first)
    assert not torch.equal(RandomTensors(shapes, CPU, seed=1)["a.weight"], first)
    assert float(first.std()) == pytest.approx(1 / 32, rel=0.05)
    assert float(tensors["norm.weight"].mean()) == pytest.approx(1, abs=0.01)
    assert float(tensors["gate_linear.bias"].mean()) == pytest.approx(2, abs=0.01)
    assert list(tensors) == list(shapes) and len(tensors) == 4 and "c" not in tensors


def test_a_watched_executor_notes_what_it_ran() -> None:
    executor = watched_executor(CPU, None)
    ran = []

    def stage(fact: int) -> None:
        ran.append(fact)

    since = executor.mark(Lane.MAIN)
    executor.run(stage, 7, lane=Lane.DECODE)
    with executor.apart(Lane.MEMORY):
        ran.append(8)
    found = intervals(executor.spans, since)
    assert ran == [7, 8] and executor.runs == 1
    assert [(each.stage.rpartition(".")[2], each.lane) for each in found] == [
        ("stage", Lane.DECODE),
        (APART, Lane.MEMORY),
    ]
    assert 0 <= found[0].begin <= found[0].end <= found[1].begin <= found[1].end
    assert all(isinstance(span, Span) for span in executor.spans)
    with pytest.raises(BackendError, match="graphs=True needs a CUDA device"):
        watched_executor(CPU, True)
