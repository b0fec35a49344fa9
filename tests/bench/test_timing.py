"""The timer's arithmetic, on clocks that tell what they are told to tell, and on a GPU where there is one."""

from __future__ import annotations

import itertools
import statistics
from types import SimpleNamespace

import pytest
import torch
from timing import DEVICE_CLOCK, HOST_CLOCK, DeviceTimer, HostTimer, timer_for

from echo_rt.errors import ConfigError

CPU = torch.device("cpu")
HZ = 1e9  # of the fake GPU's pause


class FakeGpu:
    """Host and device as two clocks in seconds: the device begins what is queued once it is free and has been told."""

    def __init__(self) -> None:
        self.host = self.device = 0.0
        self.waits = 0

    def enqueue(self, seconds: float) -> None:
        self.device = max(self.device, self.host) + seconds

    def work(self, host: float, device: float) -> None:
        self.host += host
        self.enqueue(device)

    def get_device_properties(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(L2_cache_size=1000)

    def _sleep(self, cycles: int) -> None:
        self.enqueue(cycles / HZ)

    def synchronize(self) -> None:
        self.waits += 1
        self.host = max(self.host, self.device)

    def Event(self, enable_timing: bool) -> FakeEvent:  # noqa: N802
        assert enable_timing
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu, self.at = gpu, 0.0

    def record(self) -> None:
        self._gpu.enqueue(0.0)
        self.at = self._gpu.device

    def elapsed_time(self, stop: FakeEvent) -> float:
        return 1e3 * (stop.at - self.at)


def fake_timer() -> tuple[FakeGpu, DeviceTimer]:
    gpu = FakeGpu()
    return gpu, DeviceTimer(CPU, cuda=gpu, now=lambda: gpu.host)


def test_the_host_timer_counts_the_calls_and_not_the_warm_up() -> None:
    ticks = itertools.accumulate([0, 5000, 1, 7000, 1, 6000])
    calls = []
    times = HostTimer(now=lambda: next(ticks)).measure(lambda: calls.append(1), iterations=3, warmup=4)
    assert times == [5.0, 7.0, 6.0]
    assert len(calls) == 7


def test_a_device_is_timed_without_the_host() -> None:
    """300 µs of Python around 20 µs of device work: the time is 20 µs, every time."""
    gpu, timer = fake_timer()
    durations = itertools.chain([20e-6] * 4, (n * 1e-6 for n in range(1, 51)))
    before = gpu.waits
    times = timer.measure(lambda: gpu.work(300e-6, next(durations)), iterations=50, warmup=3)
    assert timer.clock == DEVICE_CLOCK
    assert times == pytest.approx(range(1, 51), abs=1e-6)
    assert gpu.waits - before == 3  # two for the warm-up, one for all calls


def test_the_cache_is_cold_before_every_call() -> None:
    _, timer = fake_timer()
    seen = []

    def call() -> None:
        seen.append(bool(timer._flushed.any()))
        timer._flushed.fill_(1)

    timer._flushed.fill_(1)
    timer.measure(call, iterations=5, warmup=2)
    assert timer._flushed.numel() >= 2 * 1000
    assert seen[0] and not any(seen[1:])  # the first call only makes ready


@pytest.mark.parametrize(
    ("iterations", "warmup", "words"),
    [
        (0, 0, "iterations .* at least 1, got 0"),
        (True, 0, "got True"),
        (1.5, 0, "got 1.5"),
        (3, -1, "warmup .* got -1"),
    ],
)
def test_nonsense_is_refused(iterations: int, warmup: int, words: str) -> None:
    for timer in (HostTimer(), fake_timer()[1]):
        with pytest.raises(ConfigError, match=words):
            timer.measure(lambda: None, iterations, warmup)


def test_the_clock_is_that_of_the_device() -> None:
    assert timer_for(CPU).clock == HOST_CLOCK


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_is_timed() -> None:
    timer = timer_for(torch.device("cuda"))
    short, long = (
        timer.measure(lambda cycles=cycles: torch.cuda._sleep(cycles), iterations=20, warmup=3)
        for cycles in (200_000, 2_000_000)
    )
    assert timer.clock == DEVICE_CLOCK and len(short) == 20
    assert statistics.median(long) / statistics.median(short) == pytest.approx(10, rel=0.15)
