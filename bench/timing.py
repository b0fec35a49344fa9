"""How the time of a call is taken: by the one timer of all benchmarks of kernels and libraries.

Of one call at a time, as bench/README.md says: by a GPU's events, or by the host's clock where that rehearses.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from echo_rt.bench.run import DEVICE_CLOCK, HOST_CLOCK
from echo_rt.errors import ConfigError

# A buffer of twice the cache leaves nothing of what was there, whatever the cache's rule of replacement.
_FLUSH_CACHES = 2
# The pause before a call outlasts the host's work on it by this much, as the host's speed varies.
_PAUSE_SLACK = 1.5
_CALIBRATION_CYCLES = 10_000_000


def _check(iterations: int, warmup: int) -> None:
    for name, value, least in (("iterations", iterations, 1), ("warmup", warmup, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"a timer's {name} must be a whole number of at least {least}, got {value!r}")


class HostTimer:
    """Times by the host's clock. ``now`` gives nanoseconds."""

    clock = HOST_CLOCK

    def __init__(self, now: Callable[[], int] = time.perf_counter_ns) -> None:
        self._now = now

    def measure(self, call: Callable[[], object], iterations: int, warmup: int) -> list[float]:
        """Microseconds of each of ``iterations`` calls, after ``warmup`` calls that do not count."""
        _check(iterations, warmup)
        for _ in range(warmup):
            call()
        times = []
        for _ in range(iterations):
            start = self._now()
            call()
            times.append((self._now() - start) / 1e3)
        return times


class DeviceTimer:
    """Times by a GPU's events, on its current stream. ``cuda`` is ``torch.cuda``, or what a test puts in its place."""

    clock = DEVICE_CLOCK

    def __init__(self, device: torch.device, cuda: Any = torch.cuda, now: Callable[[], float] = time.perf_counter):
        self._cuda, self._now = cuda, now
        cache = cuda.get_device_properties(device).L2_cache_size
        self._flushed = torch.empty(_FLUSH_CACHES * cache, dtype=torch.uint8, device=device)
        self._cycles_a_second = self._calibrate()

    def measure(self, call: Callable[[], object], iterations: int, warmup: int) -> list[float]:
        """Microseconds of each of ``iterations`` calls, after ``warmup`` calls, and at least two, that do not count."""
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
        return [1e3 * start.elapsed_time(stop) for start, stop in events]

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
