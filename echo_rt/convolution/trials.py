"""Trying a convolution on a GPU: is it right on the decoder's own shapes, and how long does it take there?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from echo_rt.autotune.stopwatch import Bench, current, stopwatch
from echo_rt.convolution.kinds import Kind
from echo_rt.convolution.shapes import ConvolutionShape

_CHECKED_PIXELS = 256  # beside the corners
_CALLS_TIMED_TOGETHER = 2


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


class Trials:
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
    def _bench(self) -> Bench:
        return Bench(self._device)

    def error(self, kind: Kind) -> float:
        """The largest error of a pixel beside what pixels are, over the whole picture; infinite for another output."""
        with current(self._device):
            out = kind.prepare(self._weight)(self._frames)
            if out.shape != self._shape.out_size or out.dtype != self._frames.dtype or not out.is_contiguous():
                return math.inf
            errors = (out[self._points].double() - self._exact).norm(dim=1)
            # Of all pixels: one of few channels may be near zero.
            usual = self._exact.square().sum(dim=1).mean().sqrt()
            # A comparison with NaN is false whatever one asks; an infinite error is not.
            return float((errors / usual).nan_to_num(nan=math.inf).max())

    def stopwatch(self, kind: Kind) -> Callable[[], float]:
        """A function that computes the convolution as in the steady state and returns the milliseconds of a call."""
        frames, prepared = self._frames, kind.prepare(self._weight)
        return stopwatch(lambda: prepared(frames), self._device, calls=_CALLS_TIMED_TOGETHER, bench=self._bench)
