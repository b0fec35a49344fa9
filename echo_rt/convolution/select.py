"""Which implementation computes each of the decoder's convolutions, and why: tried on a GPU on the decoder's shapes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from echo_rt.autotune.cache import Cache
from echo_rt.autotune.tuner import Check, ObstacleError, Selection, Stopwatch, Tuner, current, require_known
from echo_rt.convolution.backends import REMOVED, ConvolutionCandidate
from echo_rt.convolution.shapes import ConvolutionShape
from echo_rt.errors import BackendError

CACHE = Cache("convolution", ConvolutionShape.from_fields)
cache_file = CACHE.path

ConvolutionSelection = Selection[ConvolutionCandidate]
MakeCheck = Callable[[ConvolutionShape, torch.device, torch.dtype], Check[ConvolutionCandidate]]

# What candidates are tried on while there is no model.
_PROBES = (
    ConvolutionShape(frames=4, height=12, width=20, channels=32, out_channels=32, kernel=(3, 3, 3)),
    ConvolutionShape(frames=2, height=6, width=10, channels=32, out_channels=16, kernel=(1, 3, 3), enlarge=True),
)
_CHECKED_PIXELS = 256  # beside the corners
_CALLS_TIMED_TOGETHER = 2
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


class ConvolutionCheck:
    """Random frames and weight of ``shape``."""

    def __init__(self, shape: ConvolutionShape, device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device, dtype=dtype)

        self._shape, self._device = shape, device
        self._frames = normal(shape.frames, shape.height, shape.width, shape.channels)
        seen = shape.channels * math.prod(shape.kernel)
        self._weight = normal(shape.out_channels, shape.channels, *shape.kernel) / math.sqrt(seen)

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
        frame, row, column = (torch.cat(both).to(self._device) for both in zip(corners, spread, strict=True))
        return frame, row, column

    @cached_property
    def _exact(self) -> Tensor:
        return exact_pixels(self._frames, self._weight, self._shape, self._points)

    @cached_property
    def _stopwatch(self) -> Stopwatch:
        return Stopwatch(self._device, _CALLS_TIMED_TOGETHER)

    def error(self, candidate: ConvolutionCandidate) -> float:
        """The largest error of a pixel beside what pixels are, over the whole picture; infinite for another output."""
        with current(self._device):
            out = candidate.prepare(self._weight)(self._frames)
            if out.shape != self._shape.out_size or out.dtype != self._frames.dtype or not out.is_contiguous():
                return math.inf
            errors = (out[self._points].double() - self._exact).norm(dim=1)
            # Of all pixels: one of few channels may be near zero.
            usual = self._exact.square().sum(dim=1).mean().sqrt()
            # A comparison with NaN is false whatever one asks; an infinite error is not.
            return float((errors / usual).nan_to_num(nan=math.inf).max())

    def stopwatch(self, candidate: ConvolutionCandidate) -> Callable[[], float]:
        """A function that computes the convolution as in the steady state and returns the milliseconds per call."""
        return self._stopwatch.capture(partial(candidate.prepare(self._weight), self._frames))


def select_convolutions(
    requested: str | None,
    shapes: Iterable[ConvolutionShape],
    *,
    device: torch.device,
    dtype: torch.dtype,
    cache: Path | None,
    candidates: Sequence[ConvolutionCandidate],
    prescribed: Mapping[ConvolutionShape, str] | None = None,
    check: MakeCheck = ConvolutionCheck,
) -> dict[ConvolutionShape, ConvolutionSelection]:
    """What computes each of ``shapes``: on a GPU the fastest of ``candidates``, on a CPU torch's own.

    ``requested``: the name of the one to take wherever it works, or several with commas between, no two of them for
    the same convolutions. ``prescribed``: the names, where none is asked for, of the snapshot to go on with, as far as
    it has these shapes. The fastest is measured once and remembered in the file ``cache`` (None: nowhere) until the
    GPU, a library or the backend change. One that computes something else is never selected; one that runs out of
    memory is left out, and the outcome not remembered. Waits for the device.
    Raises :class:`BackendError` for a name that is unknown or cannot be had here, and where nothing works; where that
    is for want of memory, ``torch.OutOfMemoryError``.
    """
    shapes = list(dict.fromkeys(shapes))
    names = _requested_names(requested, candidates)
    for name in names:
        _require_use(name, shapes, candidates, device, dtype)
    selections = {}
    for shape in shapes:
        tuner = _tuner(device, dtype, shape, candidates, check)
        named = next((candidate.name for candidate in tuner.candidates if candidate.name in names), None)
        selections[shape] = tuner.select(named, (prescribed or {}).get(shape), cache, ObstacleError)
    return selections


def _requested_names(requested: str | None, candidates: Sequence[ConvolutionCandidate]) -> list[str]:
    names = [] if requested is None else [name.strip() for name in requested.split(",")]
    for name in names:
        require_known(CACHE.subject, name, candidates, REMOVED)
    for enlarges in (False, True):
        rivals = [candidate.name for candidate in _family(candidates, enlarges) if candidate.name in names]
        if len(rivals) > 1:
            raise BackendError(f"convolution {requested!r}: expected one of {' and '.join(rivals)}, got both")
    return names


def _require_use(
    name: str,
    shapes: Sequence[ConvolutionShape],
    candidates: Sequence[ConvolutionCandidate],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Raises :class:`BackendError` where what was asked for works for none of ``shapes`` that it could be for."""
    obstacles = [
        candidate.obstacle(device, dtype, shape)
        for shape in shapes
        for candidate in _family(candidates, shape.enlarge)
        if candidate.name == name
    ]
    if obstacles and all(obstacles):
        raise BackendError(f"convolution {name!r} is not available: {obstacles[0]}")


def known_selections(
    device: torch.device, cache: Path | None, candidates: Sequence[ConvolutionCandidate]
) -> Iterator[tuple[str, str]]:
    """What decoders on ``device`` are given as things are now, as far as is known unmeasured: name and reason."""
    for probe in _PROBES:
        yield from _tuner(device, torch.float32, probe, candidates).known(cache)


def available_convolutions(
    device: torch.device, candidates: Sequence[ConvolutionCandidate], check: MakeCheck = ConvolutionCheck
) -> dict[str, str]:
    """Name -> ``"available"``, or ``"why it is not; what to do"``. Each one is run on ``device``."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    states: dict[str, str] = {}
    for probe in _PROBES:
        for name, state in _tuner(device, dtype, probe, candidates, check).available().items():
            # One name of two families, said once where the same holds for both.
            states[name if states.get(name, state) == state else f"{name} (enlarging)"] = state
    return states


def _family(candidates: Sequence[ConvolutionCandidate], enlarges: bool) -> list[ConvolutionCandidate]:
    return [candidate for candidate in candidates if candidate.enlarges == enlarges]


def _tuner(
    device: torch.device,
    dtype: torch.dtype,
    shape: ConvolutionShape,
    candidates: Sequence[ConvolutionCandidate],
    check: MakeCheck = ConvolutionCheck,
) -> Tuner[ConvolutionCandidate, ConvolutionShape]:
    family = _family(candidates, shape.enlarge)
    return Tuner(CACHE, device, dtype, shape, family, partial(check, shape, device, dtype), _ROUNDS, REMOVED)
