"""Ways to double every pixel of a picture each way and convolve the result."""

from __future__ import annotations

import torch
from torch import Tensor

from echo_rt.convolution.library import convolve_pictures
from echo_rt.convolution.prepared import Prepared
from echo_rt.convolution.shapes import ConvolutionShape


def enlarged_convolution(weight: Tensor) -> Prepared:
    """As it is written: the large pictures are made, then convolved."""
    laid_out = weight.squeeze(2).contiguous(memory_format=torch.channels_last)
    padding = (weight.shape[3] // 2, weight.shape[4] // 2)

    def call(frames: Tensor, /) -> Tensor:
        count, height, width, channels = frames.shape
        large = frames.new_empty(count, height, 2, width, 2, channels)
        large.copy_(frames[:, :, None, :, None, :].expand_as(large))
        pictures = large.view(count, 2 * height, 2 * width, channels)
        return convolve_pictures(pictures, laid_out, padding)

    return call


def phase_convolution(weight: Tensor) -> Prepared:
    """The same without the large pictures, at four ninths of the products.

    Of the nine pixels that an output pixel sees, those that came of one small pixel are equal: their weights are added
    once, in float32, and each of the four kinds of output pixel (even or odd, each way) sees 2x2 small pixels. One
    convolution gives the four as channels, one copy puts them in their places.
    """
    out_channels = len(weight)
    laid_out = torch.cat(phase_weights(weight)).contiguous(memory_format=torch.channels_last)

    def call(frames: Tensor, /) -> Tensor:
        count, height, width, _ = frames.shape
        # Pixel (i, j) sees the small pixels (i-1, j-1) to (i, j), so even pixels are found at i, odd ones at i + 1.
        seen = convolve_pictures(frames, laid_out, (1, 1))
        frame, row, column, _ = seen.stride()
        phases = seen.as_strided(
            (count, height, 2, width, 2, out_channels),
            (frame, row, row + 2 * out_channels, column, column + out_channels, 1),
        )
        out = frames.new_empty(count, height, 2, width, 2, out_channels)
        out.copy_(phases)
        return out.view(count, 2 * height, 2 * width, out_channels)

    return call


def phase_weights(weight: Tensor) -> list[Tensor]:
    """Of ``[Co, C, 1, 3, 3]`` the ``[Co, C, 2, 2]`` of output pixels in even rows and columns, even and odd, ..."""
    by_row = _merged(weight.squeeze(2).float(), 2)
    return [phase.to(weight.dtype) for rows in by_row for phase in _merged(rows, 3)]


def _merged(weight: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Even pixels see the one before and, twice, their own; odd ones, twice, their own and the one after."""
    before, middle, after = weight.unbind(axis)
    return torch.stack([before, middle + after], axis), torch.stack([before + middle, after], axis)


def phases_limit(shape: ConvolutionShape) -> str:
    """What cannot be done in phases with a shape, or ""."""
    return "" if shape.kernel == (1, 3, 3) else "it takes kernels of 1x3x3"
