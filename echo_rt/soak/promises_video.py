"""What is promised of the video: that it goes on, that its numbers are numbers, in their place, the same again."""

from __future__ import annotations

from echo_rt.soak.journal import Line
from echo_rt.soak.promise import Promise
from echo_rt.utils.wording import counted


class Alive(Promise):
    """The stream never failed."""

    name = "stream"
    limit = "no failure"

    def __init__(self) -> None:
        super().__init__()
        self._blocks = 0

    def see(self, line: Line) -> None:
        self._blocks += line.get("blocks", 0)
        if line.get("failure"):
            self.breaks(f"block {line['block']}: {line['failure']}")

    def evidence(self) -> str | None:
        return f"made: {counted(self._blocks, 'block')}" if self._blocks else None


class Finite(Promise):
    """No NaN, no infinity."""

    name = "finite"
    limit = "0 NaN or infinite values, no rollback"

    def __init__(self) -> None:
        super().__init__()
        self._blocks = 0

    def see(self, line: Line) -> None:
        if line.get("nonfinite_failure"):
            self.breaks(f"block {line['block']}: {line['failure']}")
        if "blocks" not in line:
            return
        self._blocks += line["blocks"]
        if line["rollbacks"]:
            self.breaks(f"block {line['block']} or before: the stream went back {counted(line['rollbacks'], 'time')}")
        found = line["nonfinite"]
        if found["block"] is not None:
            self.breaks(f"block {found['block']}: {found['latent']} in latents, {found['video']} in the video")

    def evidence(self) -> str | None:
        return f"none in {counted(self._blocks, 'block')}" if self._blocks else None


class Positions(Promise):
    """Ids in range, the shift never back, every block and frame in its turn."""

    name = "positions"
    limit = "ids in 0..max, shift never back, no block or frame left out"

    def __init__(self) -> None:
        super().__init__()
        self._ids: tuple[int, int] | None = None
        self._shift = 0

    def see(self, line: Line) -> None:
        if "blocks" not in line:
            return
        place = line["position"]
        least, most = self._ids or (place["least_newest_id"], place["most_newest_id"])
        self._ids = min(least, place["least_newest_id"]), max(most, place["most_newest_id"])
        self._shift = max(self._shift, place["shift"])
        if place["misplaced"]:
            block, wrong = place["misplaced"]
            self.breaks(f"block {block}: {wrong}")

    def evidence(self) -> str | None:
        return None if self._ids is None else f"newest id {self._ids[0]}..{self._ids[1]}, shift up to {self._shift}"


class Hashes(Promise):
    """A block that was made twice was the same twice."""

    name = "hashes"
    limit = "every block that is made again is the same"

    def __init__(self) -> None:
        super().__init__()
        self._compared = 0

    def see(self, line: Line) -> None:
        self._compared += line["compared"]
        for block, before, now in line["mismatches"]:
            self.breaks(f"block {block}: was {before}, came {now}")

    def evidence(self) -> str | None:
        return f"{counted(self._compared, 'block')} made again, with the same hash" if self._compared else None

    def unchecked(self) -> str:
        return "no hashed block was made twice (a resume or a snapshot before a hashed block is needed)"


class Drift(Promise):
    """The latents' statistics stay near what they were after warm-up."""

    name = "latent drift"

    def __init__(self, drift: float) -> None:
        super().__init__()
        self._drift = drift
        self._first: tuple[float, float] | None = None
        self._furthest: tuple[float, int] | None = None

    @property
    def limit(self) -> str:
        return f"mean and standard deviation within {self._drift:g} standard deviations of those after warm-up"

    def see(self, line: Line) -> None:
        if not line.get("warm"):
            return
        mean, deviation = line["latents"]["mean"], line["latents"]["std"]
        if mean is None or deviation is None:
            return  # Finite tells of it
        if self._first is None:
            self._first = mean, deviation
            return
        unit = max(self._first[1], 1e-12)
        off = max(abs(mean - self._first[0]), abs(deviation - self._first[1])) / unit
        if self._furthest is None or off > self._furthest[0]:
            self._furthest = off, line["block"]
        if off > self._drift:
            self.breaks(f"block {line['block']}: mean {mean:.4g}, deviation {deviation:.4g}, {off:.3g} away")

    def evidence(self) -> str | None:
        return None if self._furthest is None else f"{self._furthest[0]:.3g} at most, at block {self._furthest[1]}"

    def unchecked(self) -> str:
        return "fewer than two intervals after warm-up"
