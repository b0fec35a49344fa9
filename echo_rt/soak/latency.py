"""How long blocks take: quantiles of any number of them, and which stand out, in memory that does not grow."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping

import numpy as np

# Neighbouring bins differ by a thousandth: a ratio of quantiles of 1.05 is told from one of 1.052.
_STEP = math.log(1.001)
_SHORTEST = 1e-6  # seconds

_WINDOW = 256  # blocks that a block is compared with
_ENOUGH = 64  # fewer than this say little about the spread
_NORMAL = 1.4826  # standard deviations in a median absolute deviation
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
        """Count all that ``other`` has counted."""
        self._counts.update(other._counts)

    @property
    def count(self) -> int:
        """How many were counted."""
        return self._counts.total()

    def quantile(self, share: float) -> float | None:
        """Seconds that a ``share`` (0..1) of the latencies does not exceed, to a thousandth; None for none at all."""
        left = math.ceil(share * self.count)
        for index in sorted(self._counts):
            left -= self._counts[index]
            if left <= 0:
                return math.exp((index + 0.5) * _STEP)
        return None

    def to_json(self) -> dict[str, int]:
        """The bins that hold something."""
        return {str(index): self._counts[index] for index in sorted(self._counts)}


class Outliers:
    """How many robust standard deviations a block takes longer than the blocks of late."""

    def __init__(self) -> None:
        self._window: deque[float] = deque(maxlen=_WINDOW)

    def zscore(self, seconds: float) -> float | None:
        """That of a block that took ``seconds``, which then joins the window; None while the window is too short."""
        score = None
        if len(self._window) >= _ENOUGH:
            recent = np.fromiter(self._window, dtype=np.float64)
            median = float(np.median(recent))
            spread = _NORMAL * float(np.median(np.abs(recent - median)))
            score = (seconds - median) / max(spread, _LEAST_SPREAD * median)
        self._window.append(seconds)
        return score
