"""Figures of a soak over its length, thinned so that a week takes no more memory than an hour."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from echo_rt.soak.journal import Line

_CAPACITY = 4096  # points of a curve; a picture is not that wide

Point = tuple[float, float]


@dataclass
class Curve:
    """Points in the order of time; when there are too many, neighbours become one, whose value ``merge`` makes."""

    label: str
    merge: Callable[[float, float], float]
    points: list[Point] = field(default_factory=list)

    def add(self, x: float, y: float | None) -> None:
        """One more point, unless there is no value."""
        if y is None:
            return
        self.points.append((x, y))
        if len(self.points) > _CAPACITY:
            pairs = zip(self.points[::2], self.points[1::2], strict=False)
            odd = self.points[-1:] if len(self.points) % 2 else []
            self.points = [(a[0], self.merge(a[1], b[1])) for a, b in pairs] + odd

    def cut(self, x: float) -> None:
        """Drop what is at ``x`` and beyond: a later process made it again."""
        while self.points and self.points[-1][0] >= x:
            self.points.pop()


def _mean(a: float, b: float) -> float:
    return (a + b) / 2


class Curves:
    """Those of the report, by the number of the block."""

    def __init__(self) -> None:
        self.latency = [Curve("p50", _mean), Curve("p99", max), Curve("longest", max)]
        self.memory = [Curve("device allocated", max), Curve("device reserved", max), Curve("host resident", max)]
        self.latents = [Curve("mean", _mean), Curve("standard deviation", _mean)]
        self.resumes: list[int] = []
        self._run: int | None = None

    @classmethod
    def of(cls, lines: Iterable[Line]) -> Curves:
        """The curves of a journal: of blocks that were made twice, the later ones."""
        curves = cls()
        for line in lines:
            if "blocks" in line:
                curves._see(line)
        return curves

    def _see(self, line: Line) -> None:
        begin, block = line["first_block"], line["block"]
        if self._run not in (None, line["run"]):
            self.resumes.append(begin)
            for curve in (*self.latency, *self.memory, *self.latents):
                curve.cut(begin)
        self._run = line["run"]
        latency, device, latents = line["latency"], line["device"] or {}, line["latents"]
        values = [latency["p50"], latency["p99"], latency["max"]]
        values += [device.get("allocated"), device.get("reserved"), line["host"]["rss"]]
        values += [latents["mean"], latents["std"]]
        for curve, value in zip((*self.latency, *self.memory, *self.latents), values, strict=True):
            curve.add(block, value)
