"""What a soak promises, each promise with its threshold and evidence. Judged from the journal's lines alone.

So a soak of several processes is judged as one, and a verdict can be had again from the file. Lines that a later
process replaced count as well: what was broken once is broken.
"""

from __future__ import annotations

from echo_rt.soak.config import Limits
from echo_rt.soak.journal import Line
from echo_rt.soak.outcome import Status, Verdict
from echo_rt.soak.promise import Promise
from echo_rt.soak.promises_machine import (
    DeviceMemory,
    GpuErrors,
    HostMemory,
    LatencyOutliers,
    LatencyRatio,
    SnapshotStall,
)
from echo_rt.soak.promises_video import Alive, Drift, Finite, Hashes, Positions


class _Left:
    """A promise that was not asked for."""

    def __init__(self, name: str) -> None:
        self._verdict = Verdict(name, Status.UNCHECKED, "none", "not asked for")

    def see(self, line: Line) -> None:
        """Nothing to see."""

    def verdict(self) -> Verdict:
        return self._verdict


class Promises:
    """All of them, under ``limits`` that are resolved for the device."""

    def __init__(self, limits: Limits) -> None:
        ratio, zscore, stall = limits.latency_ratio, limits.latency_zscore, limits.snapshot_stall
        assert ratio != "auto" and zscore != "auto" and stall != "auto"
        self._all: list[Promise | _Left] = [
            Alive(),
            Finite(),
            Positions(),
            Hashes(),
            _Left(DeviceMemory.name) if limits.device_growth is None else DeviceMemory(limits.device_growth),
            _Left(HostMemory.name) if limits.host_slope is None else HostMemory(limits.host_slope, limits.host_slack),
            _Left(LatencyRatio.name) if ratio is None else LatencyRatio(ratio),
            _Left(LatencyOutliers.name) if zscore is None else LatencyOutliers(zscore, limits.outliers),
            _Left(SnapshotStall.name) if stall is None else SnapshotStall(stall),
            _Left(Drift.name) if limits.drift is None else Drift(limits.drift),
            GpuErrors(),
        ]

    def see(self, line: Line) -> None:
        """One more line of the journal."""
        for promise in self._all:
            promise.see(line)

    def verdicts(self) -> list[Verdict]:
        """How each stands."""
        return [promise.verdict() for promise in self._all]
