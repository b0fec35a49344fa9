"""The figures of an interval: gathered block by block into one line, in memory bounded by the interval."""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter, deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from operator import itemgetter

import numpy as np

from echo_rt.chunk import Chunk, ChunkStats, Vitals
from echo_rt.config import ModelConfig
from echo_rt.soak.journal import Line
from echo_rt.utils.wording import counted

_DIGEST_BYTES = 16
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


class Histogram:
    """Counts of latencies in bins that are a thousandth wide. As JSON: ``{"bin": count}``."""

    def __init__(self, bins: Mapping[str, int] | None = None) -> None:
        self._counts: Counter[int] = Counter({int(name): count for name, count in (bins or {}).items()})

    def add(self, seconds: float) -> None:
        """Count one latency."""
        self._counts[math.floor(math.log(max(seconds, _SHORTEST)) / _STEP)] += 1

    def merge(self, other: Histogram) -> None:
        """Add the counts of ``other``."""
        self._counts.update(other._counts)

    @property
    def count(self) -> int:
        """Number of latencies."""
        return self._counts.total()

    def quantile(self, share: float) -> float | None:
        """Return the seconds that a ``share`` (0..1) of the latencies does not exceed, to a thousandth, or None."""
        left = math.ceil(share * self.count)
        for index in sorted(self._counts):
            left -= self._counts[index]
            if left <= 0:
                return math.exp((index + 0.5) * _STEP)
        return None

    def to_json(self) -> dict[str, int]:
        """Return the bins that are not empty."""
        return {str(index): self._counts[index] for index in sorted(self._counts)}


class Outliers:
    """How many robust standard deviations a block is slower than the latest blocks."""

    def __init__(self) -> None:
        self._window: deque[float] = deque(maxlen=_WINDOW)

    def zscore(self, seconds: float) -> float | None:
        """Judge a block, which then joins the window; None while the window is too short."""
        score = None
        if len(self._window) >= _ENOUGH:
            recent = np.fromiter(self._window, dtype=np.float64)
            median = float(np.median(recent))
            spread = _NORMAL * float(np.median(np.abs(recent - median)))
            score = (seconds - median) / max(spread, _LEAST_SPREAD * median)
        self._window.append(seconds)
        return score


def digest(chunk: Chunk) -> str:
    """BLAKE2b over a block's latents and frames."""
    made = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for tensor in (chunk.latents, chunk.frames):
        made.update(tensor.contiguous().numpy().data.cast("B"))
    return made.hexdigest()


class Checker:
    """What is known of the process so far, to judge each block against.

    ``block``, ``frame``: the next block and its first video frame. ``expected``: hashes of an earlier process.
    ``offset``: blocks by which the video is ahead of the state, after rollbacks of an earlier process.
    """

    def __init__(
        self,
        config: ModelConfig,
        expected: Mapping[int, str],
        *,
        block: int,
        frame: int,
        hash_every: int,
        offset: int = 0,
    ) -> None:
        self.block, self.frame = block, frame
        self.outliers = Outliers()
        self._window = config.window
        self._expected, self._hash_every = dict(expected), hash_every
        self._shift = self._rollbacks = 0
        self._offset = offset * self._window.frames_per_block  # in latent frames

    def misplaced(self, chunk: Chunk, rollbacks: int) -> str | None:
        """Return what is wrong with the block's place in the video, or None; go on to the next block.

        ``rollbacks``: of the stream so far. At a new one the state goes back by some blocks, and the video goes on.
        """
        stats, window = chunk.stats, self._window
        off = (chunk.index + 1) * window.frames_per_block - 1 - stats.newest_temporal_id - stats.shift
        if rollbacks > self._rollbacks:
            self._rollbacks, self._shift, self._offset = rollbacks, 0, off
            self._expected.clear()  # of a video with other noise
        wrong = None
        if chunk.index != self.block or chunk.first_frame != self.frame:
            expected = f"expected block {self.block} from frame {self.frame}"
            wrong = f"{expected}, found {chunk.index} from frame {chunk.first_frame}"
        elif not 0 <= stats.newest_temporal_id <= window.max_temporal_id:
            wrong = f"newest id {stats.newest_temporal_id} is not in 0..{window.max_temporal_id}"
        elif stats.shift < self._shift:
            wrong = f"the shift went back from {self._shift} to {stats.shift}"
        elif off != self._offset:
            behind = counted(off - self._offset, "frame")
            wrong = f"id {stats.newest_temporal_id} and shift {stats.shift} are {behind} behind"
        self.block, self.frame = chunk.index + 1, chunk.first_frame + chunk.frames.shape[0]
        self._shift = stats.shift
        return wrong

    def hash(self, chunk: Chunk) -> tuple[Future[str] | None, str | None]:
        """Begin to hash a block that is to be hashed; return its hash, and the one that an earlier process found."""
        if chunk.index % self._hash_every:
            return None, None
        return _HASHER.submit(digest, chunk), self._expected.pop(chunk.index, None)


class Interval:
    """Gathers blocks from the next one of ``checker`` on; a z-score above ``outlier_from`` makes an outlier."""

    def __init__(self, checker: Checker, run: int, outlier_from: float | None) -> None:
        self._checker, self._run, self._outlier_from = checker, run, outlier_from
        self._began, self._first_block, self._first_frame = time.monotonic(), checker.block, checker.frame
        self._warm, self._rollbacks = True, 0
        self._stats: list[ChunkStats] = []
        self._seconds: list[tuple[float, int]] = []  # with the block, as in the lists below
        self._switches: list[float] = []
        self._latency = Histogram()
        self._scores: list[tuple[float, int]] = []
        self._misplaced: list[tuple[int, str]] = []
        self._nonfinite: list[tuple[int, Vitals]] = []
        self._hashes: list[tuple[int, Future[str]]] = []
        self._known: list[tuple[int, str, Future[str]]] = []  # the hash of an earlier process, and this one's

    @property
    def blocks(self) -> int:
        """Number of blocks so far."""
        return len(self._stats)

    @property
    def seconds(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._began

    def add(
        self, chunk: Chunk, seconds: float, *, warm: bool, switching: bool, rollbacks: int = 0
    ) -> Future[str] | None:
        """Add a block that took ``seconds``; return its hash, which a thread makes, if it has one.

        ``warm``: its latency counts. ``switching``: it may have paid for a prompt switch. ``rollbacks``: so far.
        """
        block, vitals = chunk.index, chunk.stats.vitals
        self._warm, self._rollbacks = self._warm and warm, rollbacks
        self._stats.append(chunk.stats)
        self._seconds.append((seconds, block))
        if switching:
            self._switches.append(seconds)
        elif warm:
            self._latency.add(seconds)
            score = self._checker.outliers.zscore(seconds)
            self._scores += [] if score is None else [(score, block)]
        wrong = self._checker.misplaced(chunk, rollbacks)
        self._misplaced += [] if wrong is None else [(block, wrong)]
        if vitals.latent_nonfinite or vitals.video_nonfinite:
            self._nonfinite.append((block, vitals))
        found, known = self._checker.hash(chunk)
        if found is not None:
            self._hashes.append((block, found))
            self._known += [] if known is None else [(block, known, found)]
        return found

    def line(self, *, elapsed: float, fps: float, probes: Line, prompt: int) -> Line:
        """Return the line. ``elapsed``: seconds of the whole soak; ``fps``: of the video; ``probes``: added to it."""
        last, frame = self._stats[-1], self._checker.frame
        ids = [stats.newest_temporal_id for stats in self._stats]
        vitals = [stats.vitals for stats in self._stats]
        longest, slowest = max(self._seconds, key=itemgetter(0)), max(self._scores, key=itemgetter(0), default=None)
        return {
            "run": self._run,
            "first_block": self._first_block,
            "block": self._checker.block - 1,
            "blocks": self.blocks,
            "frame": frame,
            "video_seconds": round(frame / fps, 3),
            "time": round(time.time(), 3),
            "elapsed": round(elapsed, 3),
            "fps": round((frame - self._first_frame) / max(self.seconds, 1e-9), 3),
            "warm": self._warm,
            "prompt": prompt,
            "latency": {
                "p50": _milliseconds(self._latency.quantile(0.5)),
                "p99": _milliseconds(self._latency.quantile(0.99)),
                "max": _milliseconds(longest[0]),
                "max_block": longest[1],
                "bins": self._latency.to_json(),
            },
            "switch_latency": {"blocks": len(self._switches), "max": _milliseconds(max(self._switches, default=None))},
            "zscore": {
                "max": None if slowest is None else round(slowest[0], 3),
                "block": None if slowest is None else slowest[1],
                "judged": len(self._scores),
                "outliers": sum(score > (self._outlier_from or math.inf) for score, _ in self._scores),
            },
            "position": {
                "shift": last.shift,
                "newest_id": ids[-1],
                "least_newest_id": min(ids),
                "most_newest_id": max(ids),
                "misplaced": self._misplaced[0] if self._misplaced else [],
            },
            "memory_state": {
                "attended": last.memory_attended,
                "norm": _finite(vitals[-1].memory_norm),
                "gate_mean": _finite(vitals[-1].gate_mean),
            },
            "latents": {
                "mean": _finite(sum(one.latent_mean for one in vitals) / len(vitals)),
                "std": _finite(sum(one.latent_std for one in vitals) / len(vitals)),
            },
            "video": {
                "min": _finite(min(one.video_min for one in vitals)),
                "max": _finite(max(one.video_max for one in vitals)),
            },
            "nonfinite": {
                "latent": sum(bad.latent_nonfinite for _, bad in self._nonfinite),
                "video": sum(bad.video_nonfinite for _, bad in self._nonfinite),
                "block": self._nonfinite[0][0] if self._nonfinite else None,
            },
            "rollbacks": self._rollbacks,
            "hashes": [(block, made.result()) for block, made in self._hashes],
            "compared": len(self._known),
            "mismatches": [(block, was, new.result()) for block, was, new in self._known if was != new.result()],
            **probes,
        }


def _finite(value: float | None) -> float | None:
    """``value``, or None where JSON has no word for it."""
    return value if value is not None and math.isfinite(value) else None


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e3 * seconds, 3)
