"""Which implementation computes each of the decoder's convolutions, and why: tried on a GPU on the decoder's shapes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from echo_rt.autotune.cache import Cache
from echo_rt.autotune.tuner import Check, ObstacleError, Selection, Tuner, current, find
from echo_rt.convolution.backends import REMOVED, ConvolutionCandidate
from echo_rt.convolution.shapes import ConvolutionShape
from echo_rt.errors import BackendError

CACHE = Cache("convolution", ConvolutionShape.from_fields)
cache_file = CACHE.path

ConvolutionSelection = Selection[ConvolutionCandidate]

# What candidates are tried on while there is no model.
_PROBES = (
    ConvolutionShape(frames=4, height=12, width=20, channels=32, out_channels=32, kernel=(3, 3, 3)),
    ConvolutionShape(frames=2, height=6, width=10, channels=32, out_channels=16, kernel=(1, 3, 3), enlarge=True),
)
_CHECKED_PIXELS = 256  # beside the corners
_ROUNDS = 7


def exact_pixels(
    frames: Tensor, weight: Tensor, shape: ConvolutionShape, points: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """Some pixels of the result, ``[n, Co]`` in float64: at ``points``, their frames, rows and columns ``[n]`` each."""
    depth, tall, wide = shape.kernel
    frame, row, column = points
    scale = 2 if shape.enlarge else 1
    at_frame = frame[:, None, None, None] + _offsets(depth, frames).view(-1, 1, 1)
    at_row = row[:, None, None, None] + (_offsets(tall, frames) - tall // 2).view(-1, 1)
    at_column = column[:, None, None, None] + _offsets(wide, frames) - wide // 2
    height, width = scale * shape.height, scale * shape.width
    inside = (at_row >= 0) & (at_row < height) & (at_column >= 0) & (at_column < width)
    seen = frames[
        at_frame, at_row.clamp(0, height - 1) // scale, at_column.clamp(0, width - 1) // scale
    ].double() * inside.unsqueeze(-1)
    return torch.einsum("ntyxc,octyx->no", seen, weight.double())


def _offsets(size: int, like: Tensor) -> Tensor:
    return torch.arange(size, device=like.device)


class ConvolutionCheck(Check[ConvolutionCandidate]):
    """Random frames and weight of ``shape``."""

    calls = 2

    def __init__(self, shape: ConvolutionShape, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(device, dtype)
        self._shape = shape
        self._frames = self.normal(shape.frames, shape.height, shape.width, shape.channels)
        seen = shape.channels * math.prod(shape.kernel)
        self._weight = self.normal(shape.out_channels, shape.channels, *shape.kernel) / math.sqrt(seen)

    @cached_property
    def _points(self) -> tuple[Tensor, Tensor, Tensor]:
        """Frames, rows and columns of the pixels to check: all corners, and from first to last of each by itself."""
        sizes = self._shape.out_size[:3]
        cpu = torch.device("cpu")  # and not what the caller has made its default
        corners = torch.tensor(list(itertools.product(*((0, size - 1) for size in sizes))), device=cpu).T
        shuffled = torch.Generator(cpu).manual_seed(0)
        spread = [
            torch.linspace(0, size - 1, _CHECKED_PIXELS, device=cpu)
            .round()
            .long()[torch.randperm(_CHECKED_PIXELS, generator=shuffled, device=cpu)]
            for size in sizes
        ]
        frame, row, column = (torch.cat(both).to(self.device) for both in zip(corners, spread, strict=True))
        return frame, row, column

    @cached_property
    def _exact(self) -> Tensor:
        return exact_pixels(self._frames, self._weight, self._shape, self._points)

    def call(self, candidate: ConvolutionCandidate, /) -> Callable[[], Tensor]:
        return partial(candidate.prepare(self._weight), self._frames)

    def error(self, candidate: ConvolutionCandidate, /) -> float:
        """The largest error of a pixel beside what pixels are, over the whole picture."""
        with current(self.device):
            out = self.call(candidate)()
            if out.shape != self._shape.out_size or out.dtype != self._frames.dtype or not out.is_contiguous():
                return math.inf
            errors = (out[self._points].double() - self._exact).norm(dim=1)
            # Of all pixels: one of few channels may be near zero.
            usual = self._exact.square().sum(dim=1).mean().sqrt()
            # A comparison with NaN is false whatever one asks; an infinite error is not.
            return float((errors / usual).nan_to_num(nan=math.inf).max())


def select_convolutions(
    requested: str | None,
    shapes: Iterable[ConvolutionShape],
    *,
    device: torch.device,
    dtype: torch.dtype,
    cache: Path | None,
    candidates: Sequence[ConvolutionCandidate],
    prescribed: Mapping[ConvolutionShape, str] = MappingProxyType({}),
) -> dict[ConvolutionShape, ConvolutionSelection]:
    """What computes each of ``shapes``: on a GPU the fastest of ``candidates``, on a CPU torch's own.

    ``requested``: the name of the one to take wherever it works, or several with commas between, no two of them for
    the same convolutions. ``prescribed``: the names, where none is asked for, of the snapshot to go on with, as far as
    it has these shapes. The rest, and the errors, as in :meth:`echo_rt.autotune.tuner.Tuner.select`.
    """
    tuners = [convolution_tuner(device, dtype, shape, candidates) for shape in dict.fromkeys(shapes)]
    names = [] if requested is None else [name.strip() for name in requested.split(",")]
    for name in names:
        find(CACHE.subject, name, candidates, REMOVED)
    for enlarges in (False, True):
        rivals = [
            candidate.name for candidate in candidates if candidate.enlarges == enlarges and candidate.name in names
        ]
        if len(rivals) > 1:
            raise BackendError(f"convolution {requested!r}: expected one of {' and '.join(rivals)}, got both")
    for name in names:
        asked = [(one, tuner.shapes) for tuner in tuners for one in tuner.candidates if one.name == name]
        obstacles = [one.obstacle(device, dtype, shape) for one, shape in asked]
        if obstacles and all(obstacles):  # it works for none of those that it could be for
            raise BackendError(f"convolution {name!r} is not available: {obstacles[0]}")
    selections = {}
    for tuner in tuners:
        named = next((candidate.name for candidate in tuner.candidates if candidate.name in names), None)
        theirs = prescribed.get(tuner.shapes)
        selections[tuner.shapes] = tuner.select(named, theirs, cache=cache, forgive=(ObstacleError,))
    return selections


def convolution_tuner(
    device: torch.device, dtype: torch.dtype, shape: ConvolutionShape, candidates: Sequence[ConvolutionCandidate]
) -> Tuner[ConvolutionCandidate, ConvolutionShape]:
    """What selects one of those ``candidates`` that double every pixel first, if ``shape`` does, or of the others."""
    family = [candidate for candidate in candidates if candidate.enlarges == shape.enlarge]
    check = partial(ConvolutionCheck, shape, device, dtype)
    return Tuner(CACHE, device, dtype, shape, family, check, _ROUNDS, REMOVED)


def known_selections(
    device: torch.device, cache: Path | None, candidates: Sequence[ConvolutionCandidate]
) -> Iterator[tuple[str, str]]:
    """What decoders on ``device`` are given as things are now, as far as is known unmeasured: name and reason."""
    for probe in _PROBES:
        yield from convolution_tuner(device, torch.float32, probe, candidates).known(cache)


def available_convolutions(device: torch.device, candidates: Sequence[ConvolutionCandidate]) -> dict[str, str]:
    """Name -> ``"available"``, or ``"why it is not; what to do"``. Each one is run on ``device``."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    states: dict[str, str] = {}
    for probe in _PROBES:
        for name, state in convolution_tuner(device, dtype, probe, candidates).available().items():
            # One name of two families, said once where the same holds for both.
            states[name if states.get(name, state) == state else f"{name} (enlarging)"] = state
    return states
