"""The figures of an interval: gathered block by block, put into one line, in memory bounded by the interval."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping
from typing import Any

from echo_rt.chunk import Chunk
from echo_rt.config import ModelConfig
from echo_rt.soak.journal import Line
from echo_rt.soak.latency import Histogram, Outliers
from echo_rt.utils.wording import counted

_DIGEST_BYTES = 16


def digest(chunk: Chunk) -> str:
    """BLAKE2b over a block's latents and frames."""
    made = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for tensor in (chunk.latents, chunk.frames):
        made.update(tensor.contiguous().numpy().data.cast("B"))
    return made.hexdigest()


def finite(value: float | None) -> float | None:
    """``value``, or None where JSON has no word for it."""
    return value if value is not None and math.isfinite(value) else None


class Checker:
    """What is known of the whole process so far, by which its blocks are judged as they come."""

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
        self.block, self.frame = block, frame  # of the chunk that comes next
        self.compared = 0  # hashes, with those that an earlier process made
        self._window = config.window
        self._expected, self._hash_every = dict(expected), hash_every
        self._shift = self._rollbacks = 0
        self._offset = offset * self._window.frames_per_block  # of the video's frames from the state's
        self._outliers = Outliers()

    def misplaced(self, chunk: Chunk, rollbacks: int) -> str | None:
        """What is wrong with the chunk's place in the video, or None; counts it as the one that was expected.

        ``rollbacks``: of the stream so far. At a new one the state goes back by some blocks, and the video goes on.
        """
        stats, window = chunk.stats, self._window
        off = (chunk.index + 1) * window.frames_per_block - 1 - stats.newest_temporal_id - stats.shift
        if rollbacks > self._rollbacks:
            self._rollbacks, self._shift, self._offset = rollbacks, 0, off
            self._expected.clear()  # of a video with the noise of before
        wrong = None
        if chunk.index != self.block or chunk.first_frame != self.frame:
            expected = f"block {self.block} from frame {self.frame}"
            wrong = f"expected {expected}, came {chunk.index} from frame {chunk.first_frame}"
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
        """The block's hash, if it is one to be hashed, and the one it should have had, if it had another before."""
        if chunk.index % self._hash_every:
            return None, None
        made, known = digest(chunk), self._expected.pop(chunk.index, None)
        self.compared += known is not None
        return made, known if known != made else None

    def zscore(self, seconds: float) -> float | None:
        """See :class:`Outliers`."""
        return self._outliers.zscore(seconds)


class Interval:
    """Gathers blocks from the one that ``checker`` expects next."""

    def __init__(self, checker: Checker, run: int, outlier_from: float | None) -> None:
        self._checker, self._run, self._outlier_from = checker, run, outlier_from
        self._first_block, self._first_frame = checker.block, checker.frame
        self._began = time.monotonic()
        self.blocks = 0
        self._latency, self._warm = Histogram(), True
        self._longest = (0.0, checker.block)
        self._switch = [0, 0.0]
        self._z: dict[str, Any] = {"max": None, "block": None, "judged": 0, "outliers": 0}
        self._ids: list[int] = []
        self._misplaced: list[Any] = []
        self._latents = [0.0, 0.0]
        self._video: list[float] = []
        self._nonfinite: dict[str, Any] = {"latent": 0, "video": 0, "block": None}
        self._hashes: list[tuple[int, str]] = []
        self._mismatches: list[tuple[int, str, str]] = []
        self._rollbacks = 0
        self._last: Chunk | None = None

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._began

    def add(self, chunk: Chunk, seconds: float, *, warm: bool, switching: bool, rollbacks: int = 0) -> str | None:
        """One more block, which took ``seconds``; its hash, if it has one.

        ``warm``: its latency counts. ``switching``: it may have paid for a prompt switch. ``rollbacks``: so far.
        """
        vitals, index = chunk.stats.vitals, chunk.index
        self.blocks += 1
        self._last = chunk
        if seconds > self._longest[0]:
            self._longest = (seconds, index)
        self._warm = self._warm and warm
        self._rollbacks = rollbacks
        if switching:
            self._switch = [self._switch[0] + 1, max(self._switch[1], seconds)]
        elif warm:
            self._latency.add(seconds)
            self._judge(index, self._checker.zscore(seconds))
        self._ids = [*self._ids[:2], chunk.stats.newest_temporal_id]
        self._ids = [min(self._ids), max(self._ids)]
        wrong = self._checker.misplaced(chunk, rollbacks)
        if wrong is not None and not self._misplaced:
            self._misplaced = [index, wrong]
        self._latents = [self._latents[0] + vitals.latent_mean, self._latents[1] + vitals.latent_std]
        self._video = [min([*self._video[:1], vitals.video_min]), max([*self._video[1:], vitals.video_max])]
        if vitals.latent_nonfinite or vitals.video_nonfinite:
            self._nonfinite["latent"] += vitals.latent_nonfinite
            self._nonfinite["video"] += vitals.video_nonfinite
            if self._nonfinite["block"] is None:
                self._nonfinite["block"] = index
        made, known = self._checker.hash(chunk)
        if made is not None:
            self._hashes.append((index, made))
            if known is not None:
                self._mismatches.append((index, known, made))
        return made

    def _judge(self, block: int, score: float | None) -> None:
        if score is None:
            return
        self._z["judged"] += 1
        self._z["outliers"] += self._outlier_from is not None and score > self._outlier_from
        if self._z["max"] is None or score > self._z["max"]:
            self._z.update(max=round(score, 3), block=block)

    def line(self, *, elapsed: float, fps: float, probes: Line, prompt: int) -> Line:
        """The line. ``elapsed``: seconds of the whole soak; ``fps``: of the video; ``probes``: to go into it."""
        chunk = self._last
        assert chunk is not None, "an interval without a block has no line"
        frame, vitals, compared = self._checker.frame, chunk.stats.vitals, self._checker.compared
        self._checker.compared = 0
        return {
            "run": self._run,
            "first_block": self._first_block,
            "block": chunk.index,
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
                "max": _milliseconds(self._longest[0]),
                "max_block": self._longest[1],
                "bins": self._latency.to_json(),
            },
            "switch_latency": {"blocks": self._switch[0], "max": _milliseconds(self._switch[1] or None)},
            "zscore": self._z,
            "position": {
                "shift": chunk.stats.shift,
                "newest_id": chunk.stats.newest_temporal_id,
                "least_newest_id": self._ids[0],
                "most_newest_id": self._ids[1],
                "misplaced": self._misplaced,
            },
            "memory_state": {
                "attended": chunk.stats.memory_attended,
                "norm": finite(vitals.memory_norm),
                "gate_mean": finite(vitals.gate_mean),
            },
            "latents": {
                "mean": finite(self._latents[0] / self.blocks),
                "std": finite(self._latents[1] / self.blocks),
            },
            "video": {"min": finite(self._video[0]), "max": finite(self._video[1])},
            "nonfinite": self._nonfinite,
            "rollbacks": self._rollbacks,
            "hashes": self._hashes,
            "compared": compared,
            "mismatches": self._mismatches,
            **probes,
        }


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e3 * seconds, 3)
