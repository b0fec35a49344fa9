"""What is promised of the machine: memory that stays, blocks that take as long as others, a GPU without errors."""

from __future__ import annotations

from echo_rt.soak.journal import Line
from echo_rt.soak.latency import Histogram
from echo_rt.soak.outcome import Status, Verdict
from echo_rt.soak.promise import Promise
from echo_rt.utils.wording import counted

# Fewer blocks than this say nothing of a slope or of a 99th percentile.
_ENOUGH_BLOCKS = 100
_ENOUGH_LINES = 3


class DeviceMemory(Promise):
    """Allocated and reserved bytes as after warm-up."""

    name = "device memory"

    def __init__(self, growth: float) -> None:
        super().__init__()
        self._growth = growth
        self._first: tuple[int, dict[str, int]] | None = None
        self._lines = 0
        self._furthest = 0

    @property
    def limit(self) -> str:
        return f"within {self._growth:g} bytes of what it was after warm-up"

    def see(self, line: Line) -> None:
        if not line.get("warm") or line["device"] is None:
            return
        bytes_of = {name: line["device"][name] for name in ("allocated", "reserved")}
        if self._first is None or self._first[0] != line["run"]:
            self._first = line["run"], bytes_of
            return
        self._lines += 1
        for name, count in bytes_of.items():
            off = count - self._first[1][name]
            self._furthest = max(self._furthest, abs(off))
            if abs(off) > self._growth:
                self.breaks(f"block {line['block']}: {name} {count} bytes, {off:+} since warm-up")

    def evidence(self) -> str | None:
        if not self._lines:
            return None
        return f"at most {counted(self._furthest, 'byte')} off in {counted(self._lines, 'interval')}"

    def unchecked(self) -> str:
        return "no GPU, or fewer than two intervals after warm-up"


class HostMemory(Promise):
    """No lasting growth of the process, by the slope of a straight line through its resident bytes."""

    name = "host memory"

    def __init__(self, slope: float, slack: float) -> None:
        super().__init__()
        self._limit, self._slack = slope, slack
        self._run: int | None = None
        self._sums = [0.0] * 5
        self._begin = (0, 0)
        self._said: str | None = None
        self._grows = False

    @property
    def limit(self) -> str:
        return f"{self._limit:g} bytes a block, once {self._slack / 2**20:g} MiB are exceeded"

    def see(self, line: Line) -> None:
        if not line.get("warm") or line["host"]["rss"] is None:
            return
        block, rss = line["block"], line["host"]["rss"]
        if self._run != line["run"]:  # another process, another start
            self._conclude()
            self._run, self._begin, self._sums = line["run"], (block, rss), [0.0] * 5
        # From the first point on, so that the sums keep their digits over days.
        x, y = float(block - self._begin[0]), float(rss - self._begin[1])
        self._sums = [a + b for a, b in zip(self._sums, (1.0, x, y, x * x, x * y), strict=True)]
        count, sx, sy, sxx, sxy = self._sums
        if count < _ENOUGH_LINES or x < _ENOUGH_BLOCKS:
            return
        slope = (count * sxy - sx * sy) / (count * sxx - sx * sx)
        self._said = f"block {block}: {slope:+.1f} bytes a block, {rss} bytes ({int(y):+} since warm-up)"
        # An early step looks like a slope for a while, so only where a process ends is it judged.
        self._grows = slope > self._limit and slope * x > self._slack

    def _conclude(self) -> None:
        if self._grows and self._said is not None:
            self.breaks(self._said)
        self._grows = False

    def verdict(self) -> Verdict:
        if self._broken is None and self._grows and self._said is not None:
            return Verdict(self.name, Status.BROKEN, self.limit, self._said)
        return super().verdict()

    def evidence(self) -> str | None:
        return self._said

    def unchecked(self) -> str:
        return f"fewer than {_ENOUGH_LINES} intervals or {_ENOUGH_BLOCKS} blocks after warm-up"


class LatencyRatio(Promise):
    """p99 / p50 over all warm blocks; those of a prompt switch are not among them."""

    name = "latency p99/p50"

    def __init__(self, ratio: float) -> None:
        super().__init__()
        self._ratio = ratio
        self._all = Histogram()

    @property
    def limit(self) -> str:
        return f"at most {self._ratio:g}"

    def see(self, line: Line) -> None:
        if "blocks" in line:
            self._all.merge(Histogram(line["latency"]["bins"]))

    def verdict(self) -> Verdict:
        seen = self.evidence()
        if seen is not None and self._measured() > self._ratio:  # of the whole soak: it may get better again
            return Verdict(self.name, Status.BROKEN, self.limit, seen)
        return super().verdict()

    def _measured(self) -> float:
        middle, slow = self._all.quantile(0.5), self._all.quantile(0.99)
        assert middle is not None and slow is not None
        return slow / middle

    def evidence(self) -> str | None:
        if self._all.count < _ENOUGH_BLOCKS:
            return None
        return f"{self._measured():.3f} over {self._all.count} blocks"

    def unchecked(self) -> str:
        return f"fewer than {_ENOUGH_BLOCKS} blocks after warm-up"


class LatencyOutliers(Promise):
    """Few blocks take much longer than the blocks right before them."""

    name = "latency z-score"

    def __init__(self, zscore: float, share: float) -> None:
        super().__init__()
        self._zscore, self._share = zscore, share
        self._judged = self._outliers = 0
        self._worst: tuple[float, int] | None = None

    @property
    def limit(self) -> str:
        return f"above {self._zscore:g} for at most {100 * self._share:g} % of blocks"

    def see(self, line: Line) -> None:
        if "blocks" not in line:
            return
        found = line["zscore"]
        self._judged += found["judged"]
        self._outliers += found["outliers"]
        if found["max"] is not None and (self._worst is None or found["max"] > self._worst[0]):
            self._worst = found["max"], found["block"]

    def verdict(self) -> Verdict:
        seen = self.evidence()
        if seen is not None and self._outliers > self._share * self._judged:
            return Verdict(self.name, Status.BROKEN, self.limit, seen)
        return super().verdict()

    def evidence(self) -> str | None:
        if self._judged < _ENOUGH_BLOCKS or self._worst is None:
            return None
        worst, block = self._worst
        return f"{self._outliers} of {self._judged} blocks; the highest is {worst:g}, at block {block}"

    def unchecked(self) -> str:
        return f"fewer than {_ENOUGH_BLOCKS} blocks to judge"


class SnapshotStall(Promise):
    """A snapshot holds up the stream for no longer than its state takes to the host."""

    name = "snapshot stall"

    def __init__(self, milliseconds: float) -> None:
        super().__init__()
        self._bound = milliseconds
        self._longest: float | None = None

    @property
    def limit(self) -> str:
        return f"at most {self._bound:g} ms"

    def see(self, line: Line) -> None:
        stall = (line.get("snapshots") or {}).get("stall")
        if stall is None:
            return
        self._longest = max(self._longest or 0.0, stall)
        if stall > self._bound:
            self.breaks(f"before block {line['block'] + 1}: {stall:g} ms")

    def evidence(self) -> str | None:
        return None if self._longest is None else f"at most {self._longest:g} ms"

    def unchecked(self) -> str:
        return "no snapshot was taken"


class GpuErrors(Promise):
    """No memory error of the GPU that its ECC could not correct."""

    name = "GPU errors"
    limit = "0 uncorrected ECC errors more"

    def __init__(self) -> None:
        super().__init__()
        self._first: tuple[int, int] | None = None
        self._lines = 0

    def see(self, line: Line) -> None:
        gpu = line.get("gpu")
        if gpu is None or gpu["ecc_uncorrected"] is None:
            return
        count = gpu["ecc_uncorrected"]
        if self._first is None or self._first[0] != line["run"]:
            self._first = line["run"], count
        self._lines += 1
        if count > self._first[1]:
            self.breaks(f"block {line['block']}: {count - self._first[1]} more")

    def evidence(self) -> str | None:
        return f"none in {counted(self._lines, 'interval')}" if self._lines else None

    def unchecked(self) -> str:
        return "no GPU, or one that does not count"
