"""The decoder's convolutions, each by the fastest implementation: on a GPU measured on the decoder's own shapes."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from echo_rt.autotune.cache import Cache
from echo_rt.autotune.tuner import Check, ObstacleError, Selection, Tuner, find
from echo_rt.convolution.backends import ConvolutionCandidate as ConvolutionCandidate
from echo_rt.convolution.backends import implementations as implementations
from echo_rt.convolution.torch_conv import ConvolutionShape as ConvolutionShape
from echo_rt.errors import BackendError
from echo_rt.ops.schema import Ops
from echo_rt.utils.device import parse_dtype

CACHE = Cache("convolution", ConvolutionShape)
cache_folder = CACHE.path

ConvolutionSelection = Selection[ConvolutionCandidate]

# Shapes to try candidates on without a model.
_PROBES = (
    ConvolutionShape(frames=4, height=12, width=20, channels=32, out_channels=32, kernel=(3, 3, 3)),
    ConvolutionShape(frames=2, height=6, width=10, channels=32, out_channels=16, kernel=(1, 3, 3), enlarge=True),
)
_CHECKED_PIXELS = 256  # beside the corners
_ROUNDS = 7


def exact_pixels(frames: Tensor, weight: Tensor, shape: ConvolutionShape, points: Tensor) -> Tensor:
    """Compute pixels of the result in float64, ``[n, Co]``, at ``points [n, 3]`` (frame, row, column)."""
    scale = 2 if shape.enlarge else 1
    taps = [torch.arange(size, device=frames.device) for size in shape.kernel]
    taps[1:] = [tap - len(tap) // 2 for tap in taps[1:]]  # causal in time
    size = torch.tensor([shape.frames, scale * shape.height, scale * shape.width], device=frames.device)
    at = points[:, None] + torch.cartesian_prod(*taps)
    inside = ((at >= 0) & (at < size)).all(-1, keepdim=True)
    frame, row, column = torch.minimum(at.clamp(min=0), size - 1).unbind(-1)
    seen = frames[frame, row // scale, column // scale].double() * inside
    return torch.einsum("ntc,oct->no", seen, weight.double().flatten(2))


class ConvolutionCheck(Check[ConvolutionCandidate]):
    """Random frames and weight of ``shape``."""

    calls = 2

    def __init__(self, shape: ConvolutionShape, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(device, dtype, shape.out_size)
        self._shape = shape
        self._frames = self.normal(shape.frames, shape.height, shape.width, shape.channels)
        self.inputs = (self._frames,)
        seen = shape.channels * math.prod(shape.kernel)
        self._weight = self.normal(shape.out_channels, shape.channels, *shape.kernel) / math.sqrt(seen)

    @cached_property
    def _points(self) -> Tensor:
        """Frames, rows and columns of the pixels to check: all corners, and each coordinate from first to last."""
        sizes, chance = self.out_size[:3], random.Random(0)
        steps = [step / (_CHECKED_PIXELS - 1) for step in range(_CHECKED_PIXELS)]
        spread = [[round(step * (size - 1)) for step in chance.sample(steps, len(steps))] for size in sizes]
        corners = itertools.product(*((0, size - 1) for size in sizes))
        return torch.tensor([*corners, *zip(*spread, strict=True)], device=self.device)

    @cached_property
    def _exact(self) -> Tensor:
        return exact_pixels(self._frames, self._weight, self._shape, self._points)

    def call(self, candidate: ConvolutionCandidate, /) -> Callable[[], Tensor]:
        return partial(candidate.prepare(self._weight), self._frames)

    def errors(self, out: Tensor) -> Tensor:
        """Return errors of pixels relative to the usual size of a pixel: one of few channels may be near zero."""
        if not out.is_contiguous():
            return self._exact.new_tensor(math.inf)
        usual = self._exact.square().sum(dim=1).mean().sqrt()
        errors: Tensor = (out[self._points.unbind(1)].double() - self._exact).norm(dim=1) / usual
        return errors


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
    """Select the implementation of each of ``shapes``: on a GPU the fastest of ``candidates``, on a CPU torch's own.

    ``requested``: a name to use wherever it works, or several joined by commas, at most one for causal and one for
    upsampling convolutions. ``prescribed``: the names in the snapshot to go on with, used where none is requested. The
    rest, and the errors, as in :meth:`echo_rt.autotune.tuner.Tuner.select`.
    """
    tuners = [convolution_tuner(device, dtype, shape, candidates) for shape in dict.fromkeys(shapes)]
    names = [] if requested is None else [name.strip() for name in requested.split(",")]
    for enlarges in (False, True):
        rivals = [one.name for one in candidates if one.enlarges == enlarges and one.name in names]
        if len(rivals) > 1:
            raise BackendError(f"convolution {requested!r}: expected one of {' and '.join(rivals)}, got both")
    for name in names:
        find(CACHE.subject, name, candidates)
        asked = [(one, tuner.shapes) for tuner in tuners for one in tuner.candidates if one.name == name]
        obstacles = [one.obstacle(device, dtype, shape) for one, shape in asked]
        if obstacles and all(obstacles):  # it works for none of those that it could be for
            raise BackendError(f"convolution {name!r} is not available: {obstacles[0]}")
    selections = {}
    for tuner in tuners:
        named = next((one.name for one in tuner.candidates if one.name in names), None)
        theirs = prescribed.get(tuner.shapes)
        selections[tuner.shapes] = tuner.select(named, theirs, cache=cache, forgive=(ObstacleError,))
    return selections


def convolution_tuner(
    device: torch.device, dtype: torch.dtype, shape: ConvolutionShape, candidates: Sequence[ConvolutionCandidate]
) -> Tuner[ConvolutionCandidate, ConvolutionShape]:
    """Return the tuner for ``shape``, among the ``candidates`` that upsample if it does, else the others."""
    family = [candidate for candidate in candidates if candidate.enlarges == shape.enlarge]
    check = partial(ConvolutionCheck, shape, device, dtype)
    return Tuner(CACHE, device, dtype, shape, family, check, _ROUNDS)


def probes(device: torch.device, ops: Ops) -> tuple[Tuner[ConvolutionCandidate, ConvolutionShape], ...]:
    """Return tuners that try all candidates without a model, in the dtype that models have there."""
    dtype, candidates = parse_dtype(None, device), implementations(ops)
    return tuple(convolution_tuner(device, dtype, probe, candidates) for probe in _PROBES)
