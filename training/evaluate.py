"""A reader of frames that knows the world: which place, object and balloon a picture shows."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor

from training.world import BALLOON_COLOURS, DAY, LANES, OBJECT_COLOURS, PLACES, RISE, SHAPES, STARTS, Scene, render

# A difference counts up to here, so that one thing that is wrong does not hide another.
_MOST = 0.25
# The object is read where no scene's object lies in front of the balloon, the balloon where it is high.
_HIGH = (RISE[0] + 6, RISE[1] - 6)


@dataclass(frozen=True)
class Reading:
    """What a frame shows; ``balloon`` and ``lane`` are None where there is none. ``error``: beside that scene."""

    colour: str
    shape: str
    place: str
    start: int
    balloon: str | None
    lane: int | None
    error: float


def read(frame: Tensor, number: int, *, calm: bool = False) -> Reading:
    """Read a frame ``[H, W, 3]`` in [0, 1] of that number: the nearest scene, found one part at a time.

    ``calm``: whether there are days on which the balloon stays down.
    """
    scene = Scene("red", "ball", "desert", "red", 0, 0)
    scene = _nearest(frame, number, (replace(scene, place=place) for place in PLACES))
    high = _HIGH[0] <= number % DAY <= _HIGH[1]
    if high:
        balloons = itertools.product((*BALLOON_COLOURS, *[None][:calm]), range(len(LANES)))
        scene = _nearest(frame, number, (replace(scene, balloon=hue, lane=lane) for hue, lane in balloons))
    objects = itertools.product(OBJECT_COLOURS, SHAPES, range(STARTS))
    scene = _nearest(frame, number, (replace(scene, colour=c, shape=s, start=at) for c, s, at in objects))
    balloon, lane = (scene.balloon, scene.lane) if high and scene.balloon else (None, None)
    error = float(_difference(frame, scene, number))
    return Reading(scene.colour, scene.shape, scene.place, scene.start, balloon, lane, error)


def _nearest(frame: Tensor, number: int, scenes: Iterable[Scene]) -> Scene:
    return min(scenes, key=lambda scene: float(_difference(frame, scene, number)))


def _difference(frame: Tensor, scene: Scene, number: int) -> Tensor:
    return (frame - render([scene], number)[0]).abs().clamp(max=_MOST).mean()
