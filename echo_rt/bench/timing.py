"""How time is taken: of a call by the one timer of all benchmarks, of a block by what its stages note.

The timer tells how long the device is at work on one call, call by call.
On a GPU the device's own events stand around every call, and the second-level cache is emptied before each. All is
queued ahead and waited for once, behind a pause that the device spins through, so that the host is never waited for:
what Python and the launches cost is not in a time. On a CPU the host's clock is read around each call, with caches as
they are; such times rehearse a benchmark and are no results.

A watched executor notes when each stage of a block ran, on the clock of where it ran; the rest is arithmetic.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from echo_rt.engine.executor import CudaExecutor, CudaMark, Executor, Immediate, Lane, Mark, make_executor, stage_name
from echo_rt.engine.rollout import Rollout
from echo_rt.errors import ConfigError

DEVICE_CLOCK = "device events, cold L2"
HOST_CLOCK = "host clock, warm caches"
APART = "apart"  # the stage of what is no stage: the frames' way to the host

# A buffer of twice the cache leaves nothing of what was there, whatever the cache's rule of replacement.
_FLUSH_CACHES = 2
# The pause before a call outlasts the host's work on it by this much, as the host's speed varies.
_PAUSE_SLACK = 1.5
_CALIBRATION_CYCLES = 10_000_000


@dataclass(frozen=True)
class Times:
    """Microseconds of every call, in the order in which they ran, and which clock told them."""

    microseconds: tuple[float, ...]
    clock: str

    @property
    def median(self) -> float:
        return statistics.median(self.microseconds)

    @property
    def p99(self) -> float:
        """The smallest of the times that 99 % of them do not exceed."""
        rank = math.ceil(len(self.microseconds) * 99 / 100)
        return sorted(self.microseconds)[rank - 1]


def _check(iterations: int, warmup: int) -> None:
    for name, value, least in (("iterations", iterations, 1), ("warmup", warmup, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"a timer's {name} must be a whole number of at least {least}, got {value!r}")


class HostTimer:
    """Times by the host's clock. ``now`` gives nanoseconds."""

    clock = HOST_CLOCK

    def __init__(self, now: Callable[[], int] = time.perf_counter_ns) -> None:
        self._now = now

    def measure(self, call: Callable[[], object], iterations: int, warmup: int) -> Times:
        """Times of ``iterations`` calls, after ``warmup`` calls that do not count."""
        _check(iterations, warmup)
        for _ in range(warmup):
            call()
        times = []
        for _ in range(iterations):
            start = self._now()
            call()
            times.append((self._now() - start) / 1e3)
        return Times(tuple(times), self.clock)


class DeviceTimer:
    """Times by a GPU's events, on its current stream. ``cuda`` is ``torch.cuda``, or what a test puts in its place."""

    clock = DEVICE_CLOCK

    def __init__(self, device: torch.device, cuda: Any = torch.cuda, now: Callable[[], float] = time.perf_counter):
        self._cuda, self._now = cuda, now
        cache = cuda.get_device_properties(device).L2_cache_size
        self._flushed = torch.empty(_FLUSH_CACHES * cache, dtype=torch.uint8, device=device)
        self._cycles_a_second = self._calibrate()

    def measure(self, call: Callable[[], object], iterations: int, warmup: int) -> Times:
        """Times of ``iterations`` calls, after ``warmup`` calls, and at least two, that do not count."""
        _check(iterations, warmup)
        call()  # the first may compile or load, which would make the pause absurdly long
        self._cuda.synchronize()
        begun = self._now()
        for _ in range(max(1, warmup)):
            self._flushed.zero_()
            call()
        host_seconds = (self._now() - begun) / max(1, warmup)
        self._cuda.synchronize()
        pause = int(_PAUSE_SLACK * host_seconds * self._cycles_a_second)
        events = [tuple(self._cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(iterations)]
        for start, stop in events:
            self._cuda._sleep(pause)
            self._flushed.zero_()
            start.record()
            call()
            stop.record()
        self._cuda.synchronize()
        return Times(tuple(1e3 * start.elapsed_time(stop) for start, stop in events), self.clock)

    def _calibrate(self) -> float:
        """How many cycles of the pause are a second."""
        start, stop = (self._cuda.Event(enable_timing=True) for _ in range(2))
        self._cuda._sleep(_CALIBRATION_CYCLES)  # wakes the clocks
        start.record()
        self._cuda._sleep(_CALIBRATION_CYCLES)
        stop.record()
        self._cuda.synchronize()
        seconds: float = 1e-3 * start.elapsed_time(stop)
        return _CALIBRATION_CYCLES / seconds


Timer = HostTimer | DeviceTimer


def timer_for(device: torch.device) -> Timer:
    """The timer of that device."""
    return DeviceTimer(device) if device.type == "cuda" else HostTimer()


# ---- when the stages of a block ran


@dataclass(frozen=True)
class Span:
    """A stage's time in its lane: from when it could begin, what it waits for being done, to its end."""

    stage: str
    lane: Lane
    begin: Mark
    end: Mark


class WatchedExecutor(Executor, Protocol):
    """An executor that keeps a span of all that it runs; whoever reads ``spans`` takes them out."""

    spans: list[Span]


class WatchedImmediate(Immediate):
    """On the CPU, by the host's clock."""

    def __init__(self) -> None:
        super().__init__()
        self.spans: list[Span] = []

    def run(
        self,
        stage: Callable[..., None],
        *facts: Hashable,
        lane: Lane = Lane.MAIN,
        after: Sequence[Mark | None] = (),
    ) -> Mark:
        begin = self.mark(lane)
        end = super().run(stage, *facts, lane=lane)
        self.spans.append(Span(stage_name(stage), lane, begin, end))
        return end

    @contextmanager
    def apart(self, lane: Lane = Lane.MAIN) -> Iterator[None]:
        begin = self.mark(lane)
        yield
        self.spans.append(Span(APART, lane, begin, self.mark(lane)))


class WatchedCuda(CudaExecutor):
    """On a GPU, by its own events, which stand around every stage: two more in a lane for each, and no wait."""

    def __init__(self, device: torch.device, *, graphs: bool) -> None:
        super().__init__(device, graphs=graphs)
        self.spans: list[Span] = []

    def run(
        self,
        stage: Callable[..., None],
        *facts: Hashable,
        lane: Lane = Lane.MAIN,
        after: Sequence[Mark | None] = (),
    ) -> Mark:
        for mark in after:  # before the span begins: waiting is not work
            if mark is not None:
                assert isinstance(mark, CudaMark)
                self._streams[lane].wait_event(mark.event)
        begin = self.mark(lane)
        end = super().run(stage, *facts, lane=lane)
        # A mark of its own: the executor's moves when the stage runs again.
        self.spans.append(Span(stage_name(stage), lane, begin, self.mark(lane)))
        return end

    @contextmanager
    def apart(self, lane: Lane = Lane.MAIN) -> Iterator[None]:
        with super().apart(lane):
            begin = self.mark(lane)
            yield
            self.spans.append(Span(APART, lane, begin, self.mark(lane)))


def watched_executor(device: torch.device, graphs: bool | None) -> WatchedExecutor:
    """As :func:`echo_rt.engine.executor.make_executor`, and watched; its errors are that one's."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return WatchedCuda(device, graphs=graphs is not False)
    make_executor(device, graphs).close()
    return WatchedImmediate()


# ---- what a block took


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
