"""The figures of an interval: gathered block by block into one line, in memory bounded by the interval."""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter, deque
from collections.abc import Mapping

import numpy as np

from echo_rt.chunk import Chunk
from echo_rt.config import ModelConfig
from echo_rt.soak.journal import Line
from echo_rt.utils.wording import counted

_DIGEST_BYTES = 16

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

    def hash(self, chunk: Chunk) -> tuple[str | None, str | None]:
        """Return the hash of a block that is to be hashed, and the one that an earlier process found."""
        if chunk.index % self._hash_every:
            return None, None
        return digest(chunk), self._expected.pop(chunk.index, None)


class Interval:
    """Gathers blocks from the next one of ``checker`` on; a z-score above ``outlier_from`` makes an outlier."""

    def __init__(self, checker: Checker, run: int, outlier_from: float | None) -> None:
        self._checker, self._outlier_from = checker, outlier_from
        self._began, self._first_frame = time.monotonic(), checker.frame
        self._latency = Histogram()
        self._line: Line = {
            "run": run,
            "first_block": checker.block,
            "block": checker.block,
            "blocks": 0,
            "frame": checker.frame,
            "video_seconds": 0.0,
            "time": 0.0,
            "elapsed": 0.0,
            "fps": 0.0,
            "warm": True,
            "prompt": 0,
            "latency": {"p50": None, "p99": None, "max": 0.0, "max_block": checker.block, "bins": {}},
            "switch_latency": {"blocks": 0, "max": None},
            "zscore": {"max": None, "block": None, "judged": 0, "outliers": 0},
            "position": {"least_newest_id": math.inf, "most_newest_id": -math.inf, "misplaced": []},
            "memory_state": {},
            "latents": {"mean": 0.0, "std": 0.0},
            "video": {"min": math.inf, "max": -math.inf},
            "nonfinite": {"latent": 0, "video": 0, "block": None},
            "rollbacks": 0,
            "hashes": [],
            "compared": 0,
            "mismatches": [],
        }

    @property
    def blocks(self) -> int:
        """Number of blocks so far."""
        count: int = self._line["blocks"]
        return count

    @property
    def seconds(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._began

    def add(self, chunk: Chunk, seconds: float, *, warm: bool, switching: bool, rollbacks: int = 0) -> str | None:
        """Add a block that took ``seconds``; return its hash, if it has one.

        ``warm``: its latency counts. ``switching``: it may have paid for a prompt switch. ``rollbacks``: so far.
        """
        line = self._line
        line["blocks"] += 1
        line |= {"block": chunk.index, "warm": line["warm"] and warm, "rollbacks": rollbacks}
        self._add_latency(chunk.index, seconds, warm, switching)
        self._add_stats(chunk)
        wrong = self._checker.misplaced(chunk, rollbacks)
        if wrong is not None and not line["position"]["misplaced"]:
            line["position"]["misplaced"] = [chunk.index, wrong]
        found, known = self._checker.hash(chunk)
        if found is not None:
            line["hashes"].append((chunk.index, found))
            line["compared"] += known is not None
            if known not in (None, found):
                line["mismatches"].append((chunk.index, known, found))
        return found

    def _add_latency(self, block: int, seconds: float, warm: bool, switching: bool) -> None:
        latency, switches, zscore = (self._line[name] for name in ("latency", "switch_latency", "zscore"))
        milliseconds = round(1e3 * seconds, 3)
        if milliseconds > latency["max"]:
            latency.update(max=milliseconds, max_block=block)
        if switching:
            switches.update(blocks=switches["blocks"] + 1, max=max(switches["max"] or 0.0, milliseconds))
        elif warm:
            self._latency.add(seconds)
            score = self._checker.outliers.zscore(seconds)
            if score is None:
                return
            zscore["judged"] += 1
            zscore["outliers"] += self._outlier_from is not None and score > self._outlier_from
            if zscore["max"] is None or score > zscore["max"]:
                zscore.update(max=round(score, 3), block=block)

    def _add_stats(self, chunk: Chunk) -> None:
        stats, vitals, line = chunk.stats, chunk.stats.vitals, self._line
        place, latents, video, nonfinite = (line[name] for name in ("position", "latents", "video", "nonfinite"))
        newest = stats.newest_temporal_id
        place |= {
            "shift": stats.shift,
            "newest_id": newest,
            "least_newest_id": min(place["least_newest_id"], newest),
            "most_newest_id": max(place["most_newest_id"], newest),
        }
        norm, gate = _finite(vitals.memory_norm), _finite(vitals.gate_mean)
        line["memory_state"] = {"attended": stats.memory_attended, "norm": norm, "gate_mean": gate}
        latents |= {"mean": latents["mean"] + vitals.latent_mean, "std": latents["std"] + vitals.latent_std}
        video |= {"min": min(video["min"], vitals.video_min), "max": max(video["max"], vitals.video_max)}
        nonfinite["latent"] += vitals.latent_nonfinite
        nonfinite["video"] += vitals.video_nonfinite
        if nonfinite["block"] is None and vitals.latent_nonfinite + vitals.video_nonfinite:
            nonfinite["block"] = chunk.index

    def line(self, *, elapsed: float, fps: float, probes: Line, prompt: int) -> Line:
        """Finish the line. ``elapsed``: seconds of the whole soak; ``fps``: of the video; ``probes``: added to it."""
        line, frame = self._line, self._checker.frame
        assert line["blocks"], "an interval without a block has no line"
        p50, p99 = (self._latency.quantile(share) for share in (0.5, 0.99))
        line["latency"] |= {"p50": _milliseconds(p50), "p99": _milliseconds(p99), "bins": self._latency.to_json()}
        line["latents"] = {name: _finite(total / line["blocks"]) for name, total in line["latents"].items()}
        line["video"] = {name: _finite(value) for name, value in line["video"].items()}
        return line | {
            "frame": frame,
            "video_seconds": round(frame / fps, 3),
            "time": round(time.time(), 3),
            "elapsed": round(elapsed, 3),
            "fps": round((frame - self._first_frame) / max(self.seconds, 1e-9), 3),
            "prompt": prompt,
            **probes,
        }


def _finite(value: float | None) -> float | None:
    """``value``, or None where JSON has no word for it."""
    return value if value is not None and math.isfinite(value) else None


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e3 * seconds, 3)
