"""Blocks made one after the other as a stream makes them, with the times of all their stages."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor

from echo_rt.chunk import Chunk
from echo_rt.engine.build import Networks
from echo_rt.engine.engine import Engine
from echo_rt.engine.executor import Event, Queue, Span
from echo_rt.engine.rollout import Rollout
from echo_rt.errors import ConfigError
from echo_rt.options import MemoryMode, RuntimeOptions
from echo_rt.utils.device import model_context

_MOST_BLOCKS = 300  # a steady state that comes later is none that anyone waits for


def median_p99(times: Sequence[float]) -> tuple[float, float]:
    """The median, and the smallest of the times that 99 % of them do not exceed: what every benchmark reports."""
    return statistics.median(times), sorted(times)[math.ceil(len(times) * 99 / 100) - 1]


class Interval(NamedTuple):
    """A span in seconds since the start of its turn."""

    stage: str
    queue: Queue
    begin: float
    end: float


def intervals(spans: Iterable[Span], since: Event) -> list[Interval]:
    """The spans, whose events have been passed, on the clock that began with ``since``."""
    return [Interval(s.stage, s.queue, s.begin.seconds_since(since), s.end.seconds_since(since)) for s in spans]


def busy_seconds(spans: Iterable[tuple[float, float]], begin: float, end: float) -> float:
    """The time from ``begin`` to ``end`` in which at least one of ``spans``, each from its begin to its end, ran."""
    busy, until = 0.0, begin
    for first, last in sorted(spans):
        start, stop = max(first, until), min(last, end)
        if stop > start:
            busy, until = busy + stop - start, stop
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
        """Add a turn: its last block before the measured ones, those, and all that ran in it.

        A whole block is the time between two arrivals on the host. The transformer's is from the rollout's first stage
        in the main queue to the end of its last, waiting included; memory's and decoder's are sums of their stages.
        """
        arrivals = [max(each.end for each in block if each.queue is Queue.DECODE) for block in (warm, *measured)]
        self.whole += [after - before for before, after in itertools.pairwise(arrivals)]
        for block in measured:
            passes = [each for each in block if each.queue is Queue.MAIN and each.stage.startswith(Rollout.__name__)]
            self.transformer.append(max(each.end for each in passes) - min(each.begin for each in passes))
            for queue, sums in ((Queue.MEMORY, self.memory), (Queue.DECODE, self.decode)):
                stages = [each for each in block if each.queue is queue and each.stage]  # not the copy to the host
                sums.append(sum(each.end - each.begin for each in stages))
        self.window += arrivals[-1] - arrivals[0]
        self.busy += busy_seconds(((each.begin, each.end) for each in every), arrivals[0], arrivals[-1])

    def add_energy(self, joules: float | None, blocks: int) -> None:
        """Add what ``blocks`` took; None where the board does not tell."""
        if joules is not None:
            self.joules = (self.joules or 0.0) + joules
            self.joules_blocks += blocks

    @property
    def idle(self) -> float:
        """Share of the time in which no queue was in a stage."""
        return 1 - self.busy / self.window

    @property
    def joules_a_block(self) -> float | None:
        return None if self.joules is None else self.joules / self.joules_blocks


class BlockRunner:
    """One video that goes on and on; ``depth`` is how many blocks may be in flight."""

    def __init__(self, networks: Networks, mode: MemoryMode, *, graphs: bool | None, depth: int) -> None:
        self.mode, self._context = mode, (networks.device, networks.dtype)
        self._graphs = graphs is not False and networks.device.type == "cuda"
        self._spans: list[Span] = []
        config = replace(networks.config, memory=None) if mode is MemoryMode.OFF else networks.config
        options = RuntimeOptions(graphs=graphs, lookahead=depth - 1)
        self.engine = Engine(config, networks, options, mode)
        self.executor = self.engine.executor
        self.executor.spans = self._spans
        self.rollout, self.pipeline = self.engine.rollout, self.engine.pipeline
        self._begun: deque[tuple[Span, ...]] = deque()
        self.executor.synchronize()

    def start(self, prompt_embeds: Tensor, seed: int) -> None:
        """Begin a new video."""
        with model_context(*self._context):
            self._begun.clear()
            self.engine.start(prompt_embeds, seed)
        self._spans.clear()

    def block(self, lookahead: int) -> tuple[Chunk, tuple[Span, ...]]:
        """Make the next block, begun as early as ``lookahead`` allows: what ``Stream`` does when asked for one.

        With it come the spans of its stages, whose times can be read once the runner has settled.
        """
        with model_context(*self._context):
            while self.pipeline.in_flight <= lookahead:
                self.pipeline.begin()
                self._begun.append(tuple(self._spans))
                self._spans.clear()
            made = self.pipeline.finish()
            assert made is not None  # it was waited for without a bound
            return made, self._begun.popleft()

    def turn(self, lookahead: int, blocks: int, sample: Sample, joules: Callable[[], float | None]) -> None:
        """Make ``blocks`` blocks that count towards ``sample``; the runner is idle before and after.

        Blocks that are begun ahead come sooner the first time, so one more than that many do not count. The energy is
        that of one block more than those that count, so that reading it falls into no time that counts.
        """
        since = self.executor.record(Queue.MAIN)
        warm = [self.block(lookahead) for _ in range(lookahead)]
        before = joules()
        warm.append(self.block(lookahead))
        measured = [self.block(lookahead) for _ in range(blocks)]
        after = joules()
        ahead = [span for spans in self._begun for span in spans]
        self.drain()
        times = [intervals(spans, since) for _, spans in (*warm, *measured)]
        every = [each for block in times for each in block] + intervals(ahead, since)
        sample.add_turn(times[len(warm) - 1], times[len(warm) :], every)
        sample.add_energy(None if before is None or after is None else after - before, blocks + 1)

    def drain(self) -> None:
        """Finish what is in flight, and leave the device idle."""
        with model_context(*self._context):
            while self.pipeline.in_flight:
                self.pipeline.finish()
        self._begun.clear()
        self.executor.synchronize()

    def warm_up(self) -> None:
        """Go on until the ids have saturated and, where graphs are captured, a block is nothing but replays.

        Raises :class:`ConfigError` for a model that does not come to that within a few hundred blocks.
        """
        for _ in range(_MOST_BLOCKS):
            runs, replays = self.executor.runs, self.executor.replays
            before = self.block(0)[0].index - 1
            saturated = before >= 0 and self.rollout.state.layout.shift(before) > 0
            replayed = self.executor.runs - runs == self.executor.replays - replays
            if saturated and (replayed or not self._graphs):
                self.drain()
                return
        raise ConfigError(f"expected a steady state to measure, and there was none within {_MOST_BLOCKS} blocks")

    def adopt(self, other: BlockRunner, seed: int) -> None:
        """Stand where ``other``, a runner of the same mode, stands: the next block of both is the same one."""
        other.drain()
        with model_context(*self._context):
            self._begun.clear()
            self.engine.load_state(other.engine.save_state(seed), seed)
            other.rollout.set_seed(seed)
        self._spans.clear()
        other._spans.clear()

    def close(self) -> None:
        """Let go of queues and graphs."""
        self.executor.close()
