"""What a soak promises: a table of checks, each with its threshold. Judged from the journal's lines alone.

So a soak of several processes is judged as one, and its verdicts can be had again from the file. Lines that a later
process replaced count as well: what was broken once stays broken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from echo_rt.soak.config import Limits
from echo_rt.soak.journal import Line
from echo_rt.soak.latency import Histogram
from echo_rt.soak.outcome import Status, Verdict
from echo_rt.utils.wording import counted

# Fewer blocks or lines than this say nothing of a slope or of a 99th percentile.
_ENOUGH_BLOCKS = 100
_ENOUGH_LINES = 3


@dataclass
class Seen:
    """What one check has seen in the lines so far.

    ``evidence``: in words, None where too little was seen to tell. ``over``: the evidence is beyond the threshold, of
    the whole soak, and may get better again; ``broken``: the evidence of the first breach, which stays.
    """

    evidence: str | None = None
    over: bool = False
    broken: str | None = None
    count: int = 0
    state: Any = None  # what the check adds up, or compares later lines with
    worst: tuple[float, int] | None = None

    def breaks(self, evidence: str | None) -> None:
        """It is broken; the first time counts."""
        self.broken = self.broken or evidence

    def most(self, value: float, block: int) -> tuple[float, int]:
        """The largest value so far, with the block that had it first."""
        if self.worst is None or value > self.worst[0]:
            self.worst = value, block
        return self.worst


# ---- the video: it goes on, its numbers are numbers, in their place, the same again


def _stream(seen: Seen, line: Line) -> None:
    seen.count += line.get("blocks", 0)
    if seen.count:
        seen.evidence = f"made: {counted(seen.count, 'block')}"
    if line.get("failure"):
        seen.breaks(f"block {line['block']}: {line['failure']}")


def _finite(seen: Seen, line: Line) -> None:
    if line.get("nonfinite_failure"):
        seen.breaks(f"block {line['block']}: {line['failure']}")
    if "blocks" not in line:
        return
    seen.count += line["blocks"]
    seen.evidence = f"none in {counted(seen.count, 'block')}"
    if line["rollbacks"]:
        seen.breaks(f"block {line['block']} or before: the stream went back {counted(line['rollbacks'], 'time')}")
    found = line["nonfinite"]
    if found["block"] is not None:
        seen.breaks(f"block {found['block']}: {found['latent']} in latents, {found['video']} in the video")


def _positions(seen: Seen, line: Line) -> None:
    if "blocks" not in line:
        return
    place = line["position"]
    least, most, shift = seen.state or (place["least_newest_id"], place["most_newest_id"], 0)
    least, most = min(least, place["least_newest_id"]), max(most, place["most_newest_id"])
    seen.state = least, most, max(shift, place["shift"])
    seen.evidence = f"newest id {least}..{most}, shift up to {seen.state[2]}"
    if place["misplaced"]:
        block, wrong = place["misplaced"]
        seen.breaks(f"block {block}: {wrong}")


def _hashes(seen: Seen, line: Line) -> None:
    seen.count += line["compared"]
    if seen.count:
        seen.evidence = f"{counted(seen.count, 'block')} made again, with the same hash"
    for block, before, now in line["mismatches"]:
        seen.breaks(f"block {block}: was {before}, came {now}")


def _latent_drift(seen: Seen, line: Line, bound: float) -> None:
    if not line.get("warm"):
        return
    mean, deviation = line["latents"]["mean"], line["latents"]["std"]
    if mean is None or deviation is None:
        return  # not finite, which is a promise of its own
    if seen.state is None:
        seen.state = mean, deviation
        return
    first_mean, first_deviation = seen.state
    off = max(abs(mean - first_mean), abs(deviation - first_deviation)) / max(first_deviation, 1e-12)
    furthest, block = seen.most(off, line["block"])
    seen.evidence = f"{furthest:.3g} at most, at block {block}"
    if off > bound:
        seen.breaks(f"block {line['block']}: mean {mean:.4g}, deviation {deviation:.4g}, {off:.3g} away")


# ---- the machine: memory that stays, blocks that take as long as others, a GPU without errors


def _device_memory(seen: Seen, line: Line, growth: float) -> None:
    if not line.get("warm") or line["device"] is None:
        return
    run, first = seen.state or (None, line["device"])
    if run != line["run"]:  # another process, another start
        seen.state = line["run"], line["device"]
        return
    seen.count += 1
    for name in ("allocated", "reserved"):
        count = line["device"][name]
        off = count - first[name]
        furthest, _ = seen.most(abs(off), line["block"])
        seen.evidence = f"at most {counted(int(furthest), 'byte')} off in {counted(seen.count, 'interval')}"
        if abs(off) > growth:
            seen.breaks(f"block {line['block']}: {name} {count} bytes, {off:+} since warm-up")


def _host_memory(seen: Seen, line: Line, bound: float, slack: float) -> None:
    """By the slope of a straight line through the resident bytes of a process."""
    if not line.get("warm") or line["host"]["rss"] is None:
        return
    block, rss = line["block"], line["host"]["rss"]
    if seen.state is None or seen.state[0] != line["run"]:
        if seen.over:
            seen.breaks(seen.evidence)
        seen.over, seen.state = False, (line["run"], block, rss, [0.0] * 5)
    _, first_block, first_rss, sums = seen.state
    # From the first point on, so that the sums keep their digits over days.
    x, y = float(block - first_block), float(rss - first_rss)
    sums[:] = [a + b for a, b in zip(sums, (1.0, x, y, x * x, x * y), strict=True)]
    count, sx, sy, sxx, sxy = sums
    if count < _ENOUGH_LINES or x < _ENOUGH_BLOCKS:
        return
    slope = (count * sxy - sx * sy) / (count * sxx - sx * sx)
    seen.evidence = f"block {block}: {slope:+.1f} bytes a block, {rss} bytes ({int(y):+} since warm-up)"
    # An early step looks like a slope for a while, so only where a process ends is it judged.
    seen.over = slope > bound and slope * x > slack


def _latency_ratio(seen: Seen, line: Line, bound: float) -> None:
    """Over all warm blocks; those of a prompt switch are not among them."""
    if "blocks" not in line:
        return
    latencies = seen.state = seen.state or Histogram()
    latencies.merge(Histogram(line["latency"]["bins"]))
    middle, slow = latencies.quantile(0.5), latencies.quantile(0.99)
    if latencies.count >= _ENOUGH_BLOCKS and middle and slow:
        seen.evidence = f"{slow / middle:.3f} over {latencies.count} blocks"
        seen.over = slow / middle > bound


def _latency_outliers(seen: Seen, line: Line, _: float, share: float) -> None:
    """How many blocks take much longer than the blocks right before them."""
    if "blocks" not in line:
        return
    found, (judged, outliers) = line["zscore"], seen.state or (0, 0)
    judged, outliers = judged + found["judged"], outliers + found["outliers"]
    seen.state = judged, outliers
    if found["max"] is not None:
        seen.most(found["max"], found["block"])
    if judged >= _ENOUGH_BLOCKS and seen.worst is not None:
        worst, block = seen.worst
        seen.evidence = f"{outliers} of {judged} blocks; the highest is {worst:g}, at block {block}"
        seen.over = outliers > share * judged


def _snapshot_stall(seen: Seen, line: Line, milliseconds: float) -> None:
    stall = (line.get("snapshots") or {}).get("stall")
    if stall is None:
        return
    longest, _ = seen.most(stall, line["block"])
    seen.evidence = f"at most {longest:g} ms"
    if stall > milliseconds:
        seen.breaks(f"before block {line['block'] + 1}: {stall:g} ms")


def _gpu_errors(seen: Seen, line: Line) -> None:
    gpu = line.get("gpu")
    if gpu is None or gpu["ecc_uncorrected"] is None:
        return
    count = gpu["ecc_uncorrected"]
    if seen.state is None or seen.state[0] != line["run"]:
        seen.state = line["run"], count
    seen.count += 1
    seen.evidence = f"none in {counted(seen.count, 'interval')}"
    if count > seen.state[1]:
        seen.breaks(f"block {line['block']}: {count - seen.state[1]} more")


@dataclass(frozen=True)
class Check:
    """One promise.

    ``see(seen, line, *bounds)`` takes in a line and ``limit(*bounds)`` is the threshold in words. ``bounds`` names
    fields of :class:`Limits`; where the first is None, the promise was not asked for. ``unchecked``: why there is no
    evidence, where there is none.
    """

    name: str
    see: Callable[..., None]
    limit: Callable[..., str]
    bounds: tuple[str, ...] = ()
    unchecked: str = "no block was made"


CHECKS = (
    Check("stream", _stream, lambda: "no failure"),
    Check("finite", _finite, lambda: "0 NaN or infinite values, no rollback"),
    Check("positions", _positions, lambda: "ids in 0..max, shift never back, no block or frame left out"),
    Check(
        "hashes",
        _hashes,
        lambda: "every block that is made again is the same",
        unchecked="no hashed block was made twice (a resume or a snapshot before a hashed block is needed)",
    ),
    Check(
        "device memory",
        _device_memory,
        lambda growth: f"within {growth:g} bytes of what it was after warm-up",
        ("device_growth",),
        "no GPU, or fewer than two intervals after warm-up",
    ),
    Check(
        "host memory",
        _host_memory,
        lambda slope, slack: f"{slope:g} bytes a block, once {slack / 2**20:g} MiB are exceeded",
        ("host_slope", "host_slack"),
        f"fewer than {_ENOUGH_LINES} intervals or {_ENOUGH_BLOCKS} blocks after warm-up",
    ),
    Check(
        "latency p99/p50",
        _latency_ratio,
        lambda ratio: f"at most {ratio:g}",
        ("latency_ratio",),
        f"fewer than {_ENOUGH_BLOCKS} blocks after warm-up",
    ),
    Check(
        "latency z-score",
        _latency_outliers,
        lambda zscore, share: f"above {zscore:g} for at most {100 * share:g} % of blocks",
        ("latency_zscore", "outliers"),
        f"fewer than {_ENOUGH_BLOCKS} blocks to judge",
    ),
    Check(
        "snapshot stall",
        _snapshot_stall,
        lambda milliseconds: f"at most {milliseconds:g} ms",
        ("snapshot_stall",),
        "no snapshot was taken",
    ),
    Check(
        "latent drift",
        _latent_drift,
        lambda drift: f"mean and standard deviation within {drift:g} standard deviations of those after warm-up",
        ("drift",),
        "fewer than two intervals after warm-up",
    ),
    Check(
        "GPU errors",
        _gpu_errors,
        lambda: "0 uncorrected ECC errors more",
        unchecked="no GPU, or one that does not count",
    ),
)


class Promises:
    """How all of :data:`CHECKS` stand, under ``limits`` that are resolved for the device."""

    def __init__(self, limits: Limits) -> None:
        self._all = [(check, [getattr(limits, name) for name in check.bounds], Seen()) for check in CHECKS]
        assert all("auto" not in bounds for _, bounds, _ in self._all)

    def see(self, line: Line) -> None:
        """One more line of the journal."""
        for check, bounds, seen in self._all:
            if None not in bounds:
                check.see(seen, line, *bounds)

    def verdicts(self) -> list[Verdict]:
        """How each stands."""
        return [_verdict(*each) for each in self._all]


def _verdict(check: Check, bounds: list[Any], seen: Seen) -> Verdict:
    if None in bounds:
        return Verdict(check.name, Status.UNCHECKED, "none", "not asked for")
    limit, breach = check.limit(*bounds), seen.broken or (seen.evidence if seen.over else None)
    if breach is not None:
        return Verdict(check.name, Status.BROKEN, limit, breach)
    if seen.evidence is None:
        return Verdict(check.name, Status.UNCHECKED, limit, check.unchecked)
    return Verdict(check.name, Status.KEPT, limit, seen.evidence)
