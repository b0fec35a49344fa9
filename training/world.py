"""The small world that the demo model learns: a landscape through day and night, an object, and a balloon.

The prompt names the object and the place. It does not name the balloon, which rises behind the hills every day in one
of two lanes and is hidden for longer than the attention window reaches: the sun tells when it returns, only a memory
tells where and in which colour. Everything repeats with the day: a long video shows nothing that a short one did not.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

WIDTH, HEIGHT = 112, 64
DAY = 48  # video frames
BOUNCE = 12  # video frames of a hop
STARTS = 4  # places where the object may begin, spread over its way

OBJECT_COLOURS = {
    "red": (0.86, 0.12, 0.10),
    "green": (0.08, 0.58, 0.20),
    "blue": (0.10, 0.25, 0.85),
    "yellow": (0.95, 0.82, 0.10),
    "white": (0.95, 0.95, 0.95),
}
# Colours that the demo model is trained with too: the more there are, the better it tells a shape from its colour.
MORE_COLOURS = {
    "orange": (0.97, 0.52, 0.08),
    "purple": (0.55, 0.15, 0.70),
    "pink": (0.97, 0.58, 0.72),
    "black": (0.07, 0.07, 0.09),
    "grey": (0.50, 0.50, 0.52),
    "golden": (0.75, 0.58, 0.18),
    "violet": (0.40, 0.28, 0.85),
    "pale": (0.70, 0.90, 0.88),
}
SHAPES = ("ball", "box")
BALLOON_COLOURS = {
    "red": (0.90, 0.10, 0.12),
    "green": (0.10, 0.70, 0.25),
    "orange": (0.98, 0.55, 0.05),
    "purple": (0.72, 0.15, 0.80),
}
LANES = (0.27, 0.73)  # of the width
RISE = (14, 34)  # frames of the day between which the balloon is above its start behind the hills


Colour: TypeAlias = tuple[float, float, float]  # red, green, blue in 0..1


@dataclass(frozen=True)
class Place:
    """The look of a place: colours of hills and ground, the ridge's waves (height, wavelength, phase), and texture."""

    phrase: str
    hills: Colour
    ground: Colour
    ridge: tuple[tuple[float, float, float], ...]
    texture: float


PLACES = {
    "desert": Place(
        "in the desert", (0.70, 0.45, 0.25), (0.93, 0.74, 0.42), ((3.0, 40.0, 0.3), (1.2, 17.0, 1.0)), 0.07
    ),
    "snow": Place("in the snow", (0.60, 0.68, 0.80), (0.93, 0.95, 0.98), ((4.0, 31.0, 1.9), (1.5, 13.0, 0.2)), 0.03),
    "sea": Place("by the sea", (0.35, 0.33, 0.40), (0.12, 0.38, 0.66), ((2.2, 56.0, 0.9), (1.4, 21.0, 2.2)), 0.10),
    "meadow": Place(
        "in the meadow", (0.16, 0.40, 0.20), (0.36, 0.68, 0.24), ((2.6, 48.0, 2.6), (1.0, 19.0, 0.7)), 0.06
    ),
}

# Combinations of the prompt that training never shows; evaluation asks for them.
HELD_OUT = {("red", "box", "sea"), ("yellow", "ball", "snow"), ("blue", "ball", "desert"), ("white", "box", "meadow")}

_RIDGE, _GROUND = 0.58, 0.66  # of the height: the mean ridge, the line where the ground begins
_RADIUS = 5.5  # pixels: of the ball, and half a side of the box
_SOFT = 0.8  # pixels over which an edge is blended
_STARS = 36

# (part of the day, colour at the top of the sky, colour at the horizon, light on the land)
_SKY: tuple[tuple[float, Colour, Colour, float], ...] = (
    (0.00, (0.33, 0.36, 0.68), (0.95, 0.62, 0.48), 0.62),
    (0.12, (0.30, 0.52, 0.90), (0.78, 0.82, 0.93), 0.85),
    (0.30, (0.18, 0.45, 0.92), (0.62, 0.80, 0.97), 1.00),
    (0.56, (0.20, 0.46, 0.92), (0.66, 0.81, 0.96), 1.00),
    (0.70, (0.34, 0.36, 0.66), (0.96, 0.56, 0.36), 0.66),
    (0.80, (0.10, 0.08, 0.24), (0.34, 0.20, 0.34), 0.36),
    (0.92, (0.08, 0.07, 0.22), (0.24, 0.18, 0.34), 0.34),
    (1.00, (0.33, 0.36, 0.68), (0.95, 0.62, 0.48), 0.62),
)
_SUNSET = 0.74  # part of the day


@dataclass(frozen=True)
class Scene:
    """Everything that a video shows; the last three are not in the prompt. ``balloon``: None while it stays down."""

    colour: str
    shape: str
    place: str
    balloon: str | None
    lane: int
    start: int

    @property
    def prompt(self) -> str:
        return f"a {self.colour} {self.shape} bouncing {PLACES[self.place].phrase}"

    @property
    def is_held_out(self) -> bool:
        return (self.colour, self.shape, self.place) in HELD_OUT

    def switched(self, other: Scene) -> Scene:
        """This scene with the object and place of ``other``: what a prompt switch changes."""
        return replace(self, colour=other.colour, shape=other.shape, place=other.place)


def random_scene(chance: random.Random, *, held_out: bool = False) -> Scene:
    """Draw a scene whose prompt is one of training, or with ``held_out`` one that training never shows."""
    while True:
        scene = Scene(
            chance.choice(list(OBJECT_COLOURS)),
            chance.choice(SHAPES),
            chance.choice(list(PLACES)),
            chance.choice(list(BALLOON_COLOURS)),
            chance.randrange(len(LANES)),
            chance.randrange(STARTS),
        )
        if scene.is_held_out == held_out:
            return scene


def object_position(frame: float, start: int) -> tuple[float, float]:
    """Centre of the object in pixels (x from the left, y from the top)."""
    along = (frame / DAY + start / STARTS) % 1.0
    there_and_back = 1 - abs(2 * along - 1)
    x = 2 * _RADIUS + there_and_back * (WIDTH - 4 * _RADIUS)
    floor = 0.86 * HEIGHT - _RADIUS
    return x, floor - 0.30 * HEIGHT * abs(math.sin(math.pi * frame / BOUNCE))


def balloon_position(frame: float, lane: int) -> tuple[float, float] | None:
    """Centre of the balloon in pixels, or None while it is on the ground behind the hills."""
    time = frame % DAY
    begin, end = RISE
    if not begin < time < end:
        return None
    height = math.sin(math.pi * (time - begin) / (end - begin))
    return LANES[lane] * WIDTH, HEIGHT * (0.66 - 0.42 * height)


def render(scenes: Sequence[Scene], first: int = 0) -> Tensor:
    """Draw frames ``first, first + 1, ...``, one for each scene: float32 ``[F, HEIGHT, WIDTH, 3]`` in [0, 1]."""
    return torch.stack([_frame(scene, first + index) for index, scene in enumerate(scenes)])


_ROWS = torch.arange(HEIGHT, dtype=torch.float32)[:, None] + 0.5
_COLUMNS = torch.arange(WIDTH, dtype=torch.float32)[None, :] + 0.5


def _frame(scene: Scene, number: int) -> Tensor:
    part = (number % DAY) / DAY
    top, horizon, light = _sky_at(part)
    depth = (_ROWS / (_GROUND * HEIGHT)).clamp(max=1)[..., None]
    picture = (torch.tensor(top) * (1 - depth) + torch.tensor(horizon) * depth).expand(HEIGHT, WIDTH, 3).clone()
    picture = _over(picture, (1.0, 1.0, 0.92), _stars() * max(0.0, 1 - abs(part - 0.86) / 0.14))
    if part < _SUNSET:
        along = part / _SUNSET
        x, y = along * WIDTH, HEIGHT * (0.52 - 0.42 * math.sin(math.pi * along))
        picture = _over(picture, (1.0, 0.95, 0.70), _disc(x, y, 6.0))
    balloon = balloon_position(number, scene.lane)
    if scene.balloon is not None and balloon is not None:
        x, y = balloon
        picture = _over(picture, (0.35, 0.22, 0.12), _rectangle(x, y + 12, 2.5, 2.0) * 1.0)
        hue = torch.tensor(BALLOON_COLOURS[scene.balloon]) * (0.35 + 0.65 * light)
        picture = _over(picture, hue, _disc(x, y, 8.0, 9.5))
        picture = _over(picture, hue + 0.35 * (1 - hue), 0.7 * _disc(x - 2.5, y - 3, 2.2, 3.0))
    place = PLACES[scene.place]
    ridge = _RIDGE * HEIGHT - sum(a * torch.sin(2 * math.pi * _COLUMNS / length + at) for a, length, at in place.ridge)
    picture = _over(picture, torch.tensor(place.hills) * light, ((_ROWS - ridge) / _SOFT + 0.5).clamp(0, 1))
    picture = _ground(picture, place, light, number)
    return _object(picture, scene, light, number).clamp(0, 1)


def _sky_at(part: float) -> tuple[list[float], list[float], float]:
    for (begin, top0, horizon0, light0), (end, top1, horizon1, light1) in itertools.pairwise(_SKY):
        if part <= end:
            mix = (part - begin) / (end - begin)
            top, horizon = (
                [a + mix * (b - a) for a, b in zip(*pair, strict=True)] for pair in ((top0, top1), (horizon0, horizon1))
            )
            return top, horizon, light0 + mix * (light1 - light0)
    raise ValueError(f"expected a part of the day in 0..1, found {part}")


def _ground(picture: Tensor, place: Place, light: float, number: int) -> Tensor:
    edge = _GROUND * HEIGHT
    waves = torch.sin(2 * math.pi * (_COLUMNS / 14 + _ROWS / 9))
    if place is PLACES["sea"]:  # the only ground that moves, once round in a hop
        waves = torch.sin(2 * math.pi * (_COLUMNS / 28 + _ROWS / 6 - number / BOUNCE))
    shade = light * (0.86 + 0.14 * (_ROWS - edge) / (HEIGHT - edge) + place.texture * waves)
    colour = torch.tensor(place.ground) * shade[..., None]
    return _over(picture, colour, ((_ROWS - edge) / _SOFT + 0.5).clamp(0, 1).expand(HEIGHT, WIDTH))


def _object(picture: Tensor, scene: Scene, light: float, number: int) -> Tensor:
    x, y = object_position(number, scene.start)
    floor = 0.86 * HEIGHT
    height = (floor - _RADIUS - y) / HEIGHT
    picture = _over(picture, (0.0, 0.0, 0.0), (0.45 - height) * _disc(x, floor + 1.5, 6.5, 1.8))
    hue = torch.tensor((OBJECT_COLOURS | MORE_COLOURS)[scene.colour]) * (0.45 + 0.55 * light)
    if scene.shape == "ball":
        shade = 1 - 0.45 * (((_COLUMNS - x + 2) ** 2 + (_ROWS - y + 2) ** 2).sqrt() / (1.7 * _RADIUS)).clamp(max=1)
        return _over(picture, hue * shade[..., None], _disc(x, y, _RADIUS))
    picture = _over(picture, 0.72 * hue, _rectangle(x, y, _RADIUS, _RADIUS))
    picture = _over(picture, hue, _rectangle(x - 1.2, y + 1.2, _RADIUS - 1.2, _RADIUS - 1.2))
    return _over(picture, hue + 0.5 * (1 - hue), _rectangle(x, y - _RADIUS + 1.2, _RADIUS, 1.2))


def _over(picture: Tensor, colour: Tensor | Sequence[float], cover: Tensor) -> Tensor:
    """Paint ``colour`` (one, or one a pixel) over ``picture`` where ``cover [HEIGHT, WIDTH]`` is 1."""
    paint = colour if isinstance(colour, Tensor) else torch.tensor(colour)
    return picture + cover[..., None] * (paint - picture)


def _disc(x: float, y: float, wide: float, tall: float | None = None) -> Tensor:
    tall = wide if tall is None else tall
    distance = (((_COLUMNS - x) / wide) ** 2 + ((_ROWS - y) / tall) ** 2).sqrt()
    return ((1 - distance) * min(wide, tall) / _SOFT + 0.5).clamp(0, 1)


def _rectangle(x: float, y: float, half_width: float, half_height: float) -> Tensor:
    inside = torch.minimum(half_width - (_COLUMNS - x).abs(), half_height - (_ROWS - y).abs())
    return (inside / _SOFT + 0.5).clamp(0, 1)


def _stars() -> Tensor:
    chance = random.Random(0)
    sky = torch.zeros(HEIGHT, WIDTH)
    for _ in range(_STARS):
        sky[chance.randrange(int(0.45 * HEIGHT)), chance.randrange(WIDTH)] = chance.uniform(0.5, 1.0)
    return sky
