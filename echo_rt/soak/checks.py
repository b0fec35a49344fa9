"""What a soak promises: a table of checks, each with its threshold, judged from the journal's lines alone.

So a soak of several processes is judged as one, and the file gives the same verdicts again. Lines that a later process
replaced count as well: a broken promise stays broken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from echo_rt.soak.config import Limits
from echo_rt.soak.interval import Histogram
from echo_rt.soak.journal import Line
from echo_rt.utils.wording import counted

# Fewer blocks or lines say nothing about a slope or a 99th percentile.
_ENOUGH_BLOCKS = 100
_ENOUGH_LINES = 3


class Status(str, Enum):
    """Of a promise."""

    KEPT = "kept"
    BROKEN = "broken"
    UNCHECKED = "not checked"


@dataclass(frozen=True)
class Verdict:
    """One promise: its threshold in words (``limit``), and what was seen, with block numbers (``evidence``)."""

    promise: str
    status: Status
    limit: str
    evidence: str


@dataclass
class Check:
    """One promise, and what has been seen of it.

    ``see(check, line, *bounds)`` takes in a line whose entry ``judged`` is neither absent nor false or 0; ``limit`` is
    the threshold in words, with the bounds in it. ``bounds``: fields of :class:`Limits`, by name and then by value;
    where the first is None, nobody asked for the promise. ``unchecked``: why there is no evidence.

    ``evidence``: in words, None while too little was seen. ``over``: the soak as a whole is beyond the threshold, which
    may get better again; ``broken``: evidence of the first breach, which stays. ``blocks``: how many the soak has made,
    ``again`` of them once more: after a resume, or at its end to compare them.
    """

    name: str
    judged: str
    see: Callable[..., None]
    limit: str
    bounds: Sequence[Any]
    unchecked: str
    evidence: str | None = None
    over: bool = False
    broken: str | None = None
    count: int = 0
    state: Any = None  # what the check adds up, or compares later lines with
    worst: tuple[float, int] | None = None
    blocks: int = 0
    again: int = 0

    def breaks(self, evidence: str | None) -> None:
        """Mark the promise as broken; only the first time counts."""
        self.broken = self.broken or evidence

    def most(self, value: float, block: int) -> tuple[float, int]:
        """Return the largest value so far and the first block that had it."""
        if self.worst is None or value > self.worst[0]:
            self.worst = value, block
        return self.worst

    def baseline(self, line: Line, value: Any) -> Any:
        """Return the first ``value`` of the line's process: every process has its own."""
        if self.state is None or self.state[0] != line["run"]:
            self.state = line["run"], value
        return self.state[1]

    @property
    def verdict(self) -> Verdict:
        """How the promise stands."""
        if None in self.bounds:
            return Verdict(self.name, Status.UNCHECKED, "none", "not asked for")
        breach = self.broken or (self.evidence if self.over else None)
        status = Status.BROKEN if breach else Status.UNCHECKED if self.evidence is None else Status.KEPT
        return Verdict(self.name, status, self.limit.format(*self.bounds), breach or self.evidence or self.unchecked)


CHECKS: list[Check] = []


def _promise(
    name: str, judged: str, limit: str, *bounds: str, unchecked: str = "no block was made"
) -> Callable[[Callable[..., None]], None]:
    return lambda see: CHECKS.append(Check(name, judged, see, limit, bounds, unchecked))


_TWICE = "no hashed block was made twice (a resume or a snapshot before a hashed block is needed)"
_FEW = f"fewer than {_ENOUGH_BLOCKS} blocks, or {_ENOUGH_LINES} intervals, after warm-up"
_NO_GPU = "no GPU, or fewer than two intervals after warm-up"
_DRIFT = "mean and standard deviation within {:g} standard deviations of those after warm-up"


@_promise("stream", "run", "no failure")
def _stream(seen: Check, line: Line) -> None:
    if seen.blocks:
        seen.evidence = f"made: {counted(seen.blocks, 'block')}, {seen.again} of them made again"
    if line.get("failure"):
        seen.breaks(f"block {line['block']}: {line['failure']}")


@_promise("finite", "run", "0 NaN or infinite values, no rollback")
def _finite(seen: Check, line: Line) -> None:
    if line.get("nonfinite_failure"):
        seen.breaks(f"block {line['block']}: {line['failure']}")
    if seen.blocks:
        seen.evidence = f"none in {counted(seen.blocks, 'block')}"
    if line.get("rollbacks"):
        seen.breaks(f"block {line['block']} or before: the stream went back {counted(line['rollbacks'], 'time')}")
    found = line.get("nonfinite")
    if found and found["block"] is not None:
        seen.breaks(f"block {found['block']}: {found['latent']} in latents, {found['video']} in the video")


@_promise("positions", "blocks", "ids in 0..max, shift never back, no block or frame left out")
def _positions(seen: Check, line: Line) -> None:
    place = line["position"]
    least, most, shift = seen.state or (place["least_newest_id"], place["most_newest_id"], 0)
    least, most = min(least, place["least_newest_id"]), max(most, place["most_newest_id"])
    seen.state = least, most, max(shift, place["shift"])
    seen.evidence = f"newest id {least}..{most}, shift up to {seen.state[2]}"
    if place["misplaced"]:
        seen.breaks("block {}: {}".format(*place["misplaced"], ""))


@_promise("hashes", "run", "every block that is made again is the same", unchecked=_TWICE)
def _hashes(seen: Check, line: Line) -> None:
    seen.count += line["compared"]
    if seen.count:
        seen.evidence = f"{seen.count} of {counted(seen.again, 'block')} made again had a hash, which is the same"
    for block, before, now in line["mismatches"]:
        seen.breaks(f"block {block}: expected {before}, found {now}")


@_promise("device memory", "warm", "at most {:g} bytes off after warm-up", "device_growth", unchecked=_NO_GPU)
def _device_memory(seen: Check, line: Line, growth: float) -> None:
    device = line["device"]
    first = device and seen.baseline(line, device)
    if device is first:
        return
    seen.count += 1
    for name in ("allocated", "reserved"):
        off = device[name] - first[name]
        furthest, _ = seen.most(abs(off), line["block"])
        seen.evidence = f"at most {counted(int(furthest), 'byte')} off in {counted(seen.count, 'interval')}"
        if abs(off) > growth:
            seen.breaks(f"block {line['block']}: {name} {device[name]} bytes, {off:+} since warm-up")


@_promise("host memory", "warm", "{:g} bytes per block beyond {:.0f} bytes", "host_slope", "host_slack", unchecked=_FEW)
def _host_memory(seen: Check, line: Line, bound: float, slack: float) -> None:
    """Slope of a straight line through the resident bytes of a process."""
    block, rss = line["block"], line["host"]["rss"]
    if rss is None:
        return
    first_block, first_rss, sums = seen.baseline(line, (block, rss, [0.0] * 5))
    if block == first_block:
        # An early step looks like a slope for a while, so a process is judged only at its end.
        if seen.over:
            seen.breaks(seen.evidence)
        seen.over = False
    # Relative to the first point, so that the sums keep their digits over days.
    x, y = float(block - first_block), float(rss - first_rss)
    sums[:] = [a + b for a, b in zip(sums, (1.0, x, y, x * x, x * y), strict=True)]
    count, sx, sy, sxx, sxy = sums
    if count < _ENOUGH_LINES or x < _ENOUGH_BLOCKS:
        return
    slope = (count * sxy - sx * sy) / (count * sxx - sx * sx)
    seen.evidence = f"block {block}: {slope:+.1f} bytes a block, {rss} bytes ({int(y):+} since warm-up)"
    seen.over = slope > bound and slope * x > slack


@_promise("latency p99/p50", "blocks", "at most {:g}", "latency_ratio", unchecked=_FEW)
def _latency_ratio(seen: Check, line: Line, bound: float) -> None:
    """Over all warm blocks except those of a prompt switch."""
    latencies = seen.state = seen.state or Histogram()
    latencies.update(Histogram.of_line(line["latency"]["bins"]))
    middle, slow = latencies.quantile(0.5), latencies.quantile(0.99)
    if latencies.total() >= _ENOUGH_BLOCKS and middle and slow:
        seen.evidence = f"{slow / middle:.3f} over {latencies.total()} blocks"
        seen.over = slow / middle > bound


@_promise(
    "latency z-score", "blocks", "above {:g} for at most {:g} of blocks", "latency_zscore", "outliers", unchecked=_FEW
)
def _outliers(seen: Check, line: Line, _: float, share: float) -> None:
    """Number of blocks that take much longer than the blocks right before them."""
    found, (judged, outliers) = line["zscore"], seen.state or (0, 0)
    seen.state = judged, outliers = judged + found["judged"], outliers + found["outliers"]
    if found["max"] is not None:
        seen.most(found["max"], found["block"])
    if judged >= _ENOUGH_BLOCKS and seen.worst is not None:
        seen.evidence = "{} of {} blocks; the highest is {:g}, at block {}".format(outliers, judged, *seen.worst)
        seen.over = outliers > share * judged


@_promise("snapshot stall", "blocks", "at most {:g} ms", "snapshot_stall", unchecked="no snapshot was taken")
def _stall(seen: Check, line: Line, milliseconds: float) -> None:
    stall = (line.get("snapshots") or {}).get("stall")
    if stall is None:
        return
    seen.evidence = f"at most {seen.most(stall, line['block'])[0]:g} ms"
    if stall > milliseconds:
        seen.breaks(f"before block {line['block'] + 1}: {stall:g} ms")


@_promise("latent drift", "warm", _DRIFT, "drift", unchecked="fewer than two intervals after warm-up")
def _latent_drift(seen: Check, line: Line, bound: float) -> None:
    mean, deviation = line["latents"]["mean"], line["latents"]["std"]
    if mean is None or deviation is None:
        return  # not finite, which is a promise of its own
    if seen.state is None:
        seen.state = mean, deviation
        return
    first_mean, first_deviation = seen.state
    off = max(abs(mean - first_mean), abs(deviation - first_deviation)) / max(first_deviation, 1e-12)
    seen.evidence = "{:.3g} at most, at block {}".format(*seen.most(off, line["block"]))
    if off > bound:
        seen.breaks(f"block {line['block']}: mean {mean:.4g}, deviation {deviation:.4g}, {off:.3g} away")


@_promise("GPU errors", "blocks", "0 new uncorrected ECC errors", unchecked="no GPU, or one that counts none")
def _gpu_errors(seen: Check, line: Line) -> None:
    count = (line.get("gpu") or {}).get("ecc_uncorrected")
    if count is None:
        return
    new = count - seen.baseline(line, count)
    seen.count += 1
    seen.evidence = f"none in {counted(seen.count, 'interval')}"
    if new > 0:
        seen.breaks(f"block {line['block']}: {new} more")


class Promises:
    """All :data:`CHECKS`, under ``limits`` that are resolved for the device; ``never``: the first block never made."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.blocks = self.again = self.never = 0
        self._checks = [replace(one, bounds=[getattr(limits, name) for name in one.bounds]) for one in CHECKS]

    def see(self, line: Line) -> None:
        """Take in one more line of the journal."""
        self.blocks += line.get("blocks", 0) + line.get("replayed", 0)
        self.never = max(self.never, line["block"] + 1 if "blocks" in line else 0)
        self.again = self.blocks - self.never
        for check in self._checks:
            if None not in check.bounds and line.get(check.judged):
                check.blocks, check.again = self.blocks, self.again
                check.see(check, line, *check.bounds)

    def verdicts(self) -> list[Verdict]:
        """Judge each promise."""
        return [check.verdict for check in self._checks]
