"""From when stages ran to what a block took: arithmetic alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from echo_rt.bench.lanes import APART, Span
from echo_rt.bench.timing import Times
from echo_rt.engine.executor import Lane, Mark
from echo_rt.engine.rollout import Rollout


@dataclass(frozen=True)
class Interval:
    """A span in seconds since the start of its turn."""

    stage: str
    lane: Lane
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.begin


def intervals(spans: Iterable[Span], since: Mark) -> list[Interval]:
    """The spans, whose marks have been passed, on the clock that began with ``since``."""
    return [
        Interval(span.stage, span.lane, span.begin.seconds_since(since), span.end.seconds_since(since))
        for span in spans
    ]


def transformer_seconds(block: Sequence[Interval]) -> float:
    """From the rollout's first stage in the main lane to the end of its last: all passes, and what they wait for."""
    own = [each for each in block if each.lane is Lane.MAIN and each.stage.startswith(f"{Rollout.__name__}.")]
    return max(each.end for each in own) - min(each.begin for each in own)


def memory_seconds(block: Sequence[Interval]) -> float:
    """Of the memory's own lane, which runs beside the first pass; 0 where the memory was not updated."""
    return sum(each.seconds for each in block if each.lane is Lane.MEMORY)


def decode_seconds(block: Sequence[Interval]) -> float:
    """Of the decoder, up to frames of bytes that lie on the device."""
    return sum(each.seconds for each in block if each.lane is Lane.DECODE and each.stage != APART)


def arrival(block: Sequence[Interval]) -> float:
    """When the block was on the host."""
    return max(each.end for each in block if each.lane is Lane.DECODE)


def busy_seconds(every: Iterable[Interval], begin: float, end: float) -> float:
    """Of ``begin`` to ``end``, the time in which at least one lane was in a stage."""
    busy, until = 0.0, begin
    for each in sorted(every, key=lambda each: each.begin):
        start, stop = max(each.begin, until), min(each.end, end)
        if stop > start:
            busy += stop - start
            until = stop
    return busy


@dataclass
class Sample:
    """What was measured of one variant at one lookahead, all turns together. Seconds a block, in order."""

    transformer: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    window: float = 0.0
    busy: float = 0.0
    joules: float | None = None
    joules_blocks: int = 0

    def add_turn(self, warm: Sequence[Interval], measured: Sequence[Sequence[Interval]], every: list[Interval]) -> None:
        """A turn: its last block before the measured ones, those, and all that ran in it.

        A whole block is the time between two arrivals on the host.
        """
        arrivals = [arrival(warm), *map(arrival, measured)]
        self.whole += [after - before for before, after in itertools.pairwise(arrivals)]
        for block in measured:
            self.transformer.append(transformer_seconds(block))
            self.memory.append(memory_seconds(block))
            self.decode.append(decode_seconds(block))
        self.window += arrivals[-1] - arrivals[0]
        self.busy += busy_seconds(every, arrivals[0], arrivals[-1])

    def add_energy(self, joules: float | None, blocks: int) -> None:
        """What ``blocks`` took; None where the board does not tell."""
        if joules is not None:
            self.joules = (self.joules or 0.0) + joules
            self.joules_blocks += blocks

    @property
    def idle(self) -> float:
        """Share of the time in which no lane was in a stage."""
        return 1 - self.busy / self.window

    @property
    def joules_a_block(self) -> float | None:
        return None if self.joules is None else self.joules / self.joules_blocks


def milliseconds(seconds: Sequence[float]) -> tuple[float, float]:
    """Median and 99th percentile, by the one definition of all benchmarks."""
    times = Times(tuple(1e6 * each for each in seconds), "")
    return times.median / 1e3, times.p99 / 1e3
