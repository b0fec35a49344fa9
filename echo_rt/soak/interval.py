"""The figures of an interval: gathered block by block into one line, in memory bounded by the interval."""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from statistics import fmean, median
from typing import NamedTuple

from echo_rt.chunk import Chunk, ChunkStats
from echo_rt.config import ModelConfig
from echo_rt.soak.journal import Line
from echo_rt.utils.wording import counted

# A block of 832x480 is 15.6 MB, and takes 4 % of its own time to hash: too much for the thread that makes blocks.
_HASHER = ThreadPoolExecutor(1, "echo-rt soak")

# Neighbouring bins differ by a thousandth: a ratio of quantiles of 1.05 is told from one of 1.052.
_STEP = math.log(1.001)
_SHORTEST = 1e-6  # seconds

_WINDOW = 256  # blocks that a block is compared with
_ENOUGH = 64  # fewer blocks say little about the spread
_NORMAL = 1.4826  # standard deviations per median absolute deviation
# Latencies of a GPU lie so close together that their own spread would make an outlier of every hiccup.
_LEAST_SPREAD = 0.01


class Histogram(Counter[int]):
    """Number of latencies by bin; bins are a thousandth wide."""

    @classmethod
    def of(cls, latencies: Iterable[float]) -> Histogram:
        """Count latencies in seconds."""
        return cls(math.floor(math.log(max(seconds, _SHORTEST)) / _STEP) for seconds in latencies)

    @classmethod
    def of_line(cls, bins: Mapping[str | int, int]) -> Histogram:
        """Read the counts of a line, whose keys are text if it comes from the journal."""
        return cls({int(name): count for name, count in bins.items()})

    def quantile(self, share: float) -> float | None:
        """Return the seconds, rounded down, that a ``share`` (0..1) of the latencies does not exceed; None of none."""
        left = math.ceil(share * self.total())
        for index in sorted(self):
            left -= self[index]
            if left <= 0:
                return math.exp(index * _STEP)
        return None


class Outliers:
    """How many robust standard deviations a block is slower than the latest blocks."""

    def __init__(self) -> None:
        self._window: deque[float] = deque(maxlen=_WINDOW)

    def zscore(self, seconds: float) -> float | None:
        """Judge a block, which then joins the window; None while the window is too short."""
        score = None
        if len(self._window) >= _ENOUGH:
            middle = median(self._window)
            spread = _NORMAL * median(abs(each - middle) for each in self._window)
            score = (seconds - middle) / max(spread, _LEAST_SPREAD * middle)
        self._window.append(seconds)
        return score


def digest(chunk: Chunk) -> str:
    """BLAKE2b over a block's latents and frames."""
    made = hashlib.blake2b(digest_size=16)
    for tensor in (chunk.latents, chunk.frames):
        made.update(tensor.contiguous().numpy().data.cast("B"))
    return made.hexdigest()


class _Seen(NamedTuple):
    """What a line needs of a block; ``made`` is its hash, from a thread, ``known`` that of an earlier process."""

    block: int
    stats: ChunkStats
    seconds: float
    warm: bool
    switching: bool
    score: float | None
    misplaced: str | None
    made: Future[str] | None
    known: str | None


@dataclass
class Figures:
    """Judges the blocks of a process, one after the other, and gathers them into lines.

    ``block``, ``frame``: the next block and its first video frame. ``expected``: hashes of an earlier process, which
    are used up. ``outlier_from``: z-score of an outlier. ``offset``: blocks by which the video is ahead of the state,
    after rollbacks of an earlier process.
    """

    config: ModelConfig
    expected: dict[int, str]
    block: int
    frame: int
    hash_every: int
    outlier_from: float | None = None
    offset: int = 0

    def __post_init__(self) -> None:
        self._outliers = Outliers()
        self._shift = self._rollbacks = 0
        self._behind = self.offset * self.config.window.frames_per_block  # latent frames
        self.begin()

    def begin(self) -> None:
        """Begin an interval with the next block; ``seen`` are its blocks so far."""
        self._began, self._first_block, self._first_frame = time.monotonic(), self.block, self.frame
        self.seen: list[_Seen] = []

    @property
    def seconds(self) -> float:
        """Seconds since the interval began."""
        return time.monotonic() - self._began

    def add(self, chunk: Chunk, seconds: float, *, warm: bool, switching: bool, rollbacks: int = 0) -> None:
        """Add a block that took ``seconds``.

        ``warm``: its latency counts. ``switching``: it may have paid for a prompt switch. ``rollbacks``: so far.
        """
        score = self._outliers.zscore(seconds) if warm and not switching else None
        wrong = self._misplaced(chunk, rollbacks)
        made = None if chunk.index % self.hash_every else _HASHER.submit(digest, chunk)
        known = None if made is None else self.expected.pop(chunk.index, None)
        self.seen.append(_Seen(chunk.index, chunk.stats, seconds, warm, switching, score, wrong, made, known))

    def _misplaced(self, chunk: Chunk, rollbacks: int) -> str | None:
        """Return what is wrong with the block's place in the video, or None; go on to the next block.

        At a new rollback of the stream the state goes back by some blocks, and the video goes on.
        """
        stats, window = chunk.stats, self.config.window
        off = (chunk.index + 1) * window.frames_per_block - 1 - stats.newest_temporal_id - stats.shift
        if rollbacks > self._rollbacks:
            self._rollbacks, self._shift, self._behind = rollbacks, 0, off
            self.expected.clear()  # of a video with other noise
        wrong = None
        if chunk.index != self.block or chunk.first_frame != self.frame:
            expected = f"expected block {self.block} from frame {self.frame}"
            wrong = f"{expected}, found {chunk.index} from frame {chunk.first_frame}"
        elif not 0 <= stats.newest_temporal_id <= window.max_temporal_id:
            wrong = f"newest id {stats.newest_temporal_id} is not in 0..{window.max_temporal_id}"
        elif stats.shift < self._shift:
            wrong = f"the shift went back from {self._shift} to {stats.shift}"
        elif off != self._behind:
            behind = counted(off - self._behind, "frame")
            wrong = f"id {stats.newest_temporal_id} and shift {stats.shift} are {behind} behind"
        self.block, self.frame = chunk.index + 1, chunk.first_frame + chunk.frames.shape[0]
        self._shift = stats.shift
        return wrong

    def line(self, fps: float) -> Line:
        """Return what the interval's line says of a video of ``fps`` frames a second, and begin the next interval."""
        seen, last = self.seen, self.seen[-1].stats
        ids = [one.stats.newest_temporal_id for one in seen]
        vitals = [one.stats.vitals for one in seen]
        latency = Histogram.of(one.seconds for one in seen if one.warm and not one.switching)
        slowest = max(seen, key=lambda one: one.seconds)
        switches = [one.seconds for one in seen if one.switching]
        scores = [(one.score, one.block) for one in seen if one.score is not None]
        score, outlier = max(scores, key=lambda scored: scored[0], default=(None, None))
        bad = [one.block for one in seen if one.stats.vitals.latent_nonfinite or one.stats.vitals.video_nonfinite]
        hashes = {one.block: one.made.result() for one in seen if one.made is not None}
        known = [(one.block, one.known, hashes[one.block]) for one in seen if one.known is not None]
        line = {
            "first_block": self._first_block,
            "block": self.block - 1,
            "blocks": len(seen),
            "frame": self.frame,
            "video_seconds": round(self.frame / fps, 3),
            "time": round(time.time(), 3),
            "fps": round((self.frame - self._first_frame) / max(self.seconds, 1e-9), 3),
            "warm": all(one.warm for one in seen),
            "latency": {
                "p50": _milliseconds(latency.quantile(0.5)),
                "p99": _milliseconds(latency.quantile(0.99)),
                "max": _milliseconds(slowest.seconds),
                "max_block": slowest.block,
                "bins": dict(sorted(latency.items())),
            },
            "switch_latency": {"blocks": len(switches), "max": _milliseconds(max(switches, default=None))},
            "zscore": {
                "max": None if score is None else round(score, 3),
                "block": outlier,
                "judged": len(scores),
                "outliers": sum(score > (self.outlier_from or math.inf) for score, _ in scores),
            },
            "position": {
                "shift": last.shift,
                "newest_id": ids[-1],
                "least_newest_id": min(ids),
                "most_newest_id": max(ids),
                "misplaced": next(([one.block, one.misplaced] for one in seen if one.misplaced), []),
            },
            "memory_state": {
                "attended": last.memory_attended,
                "norm": _finite(last.vitals.memory_norm),
                "gate_mean": _finite(last.vitals.gate_mean),
            },
            "latents": {
                "mean": _finite(fmean(one.latent_mean for one in vitals)),
                "std": _finite(fmean(one.latent_std for one in vitals)),
            },
            "video": {
                "min": _finite(min(one.video_min for one in vitals)),
                "max": _finite(max(one.video_max for one in vitals)),
            },
            "nonfinite": {
                "latent": sum(one.latent_nonfinite for one in vitals),
                "video": sum(one.video_nonfinite for one in vitals),
                "block": next(iter(bad), None),
            },
            "rollbacks": self._rollbacks,
            "hashes": list(hashes.items()),
            "compared": len(known),
            "mismatches": [entry for entry in known if entry[1] != entry[2]],
        }
        self.begin()
        return line


def _finite(value: float | None) -> float | None:
    """``value``, or None where JSON has no word for it."""
    return value if value is not None and math.isfinite(value) else None


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e3 * seconds, 3)
