"""Ways to double every pixel of a picture each way and convolve the result."""

from __future__ import annotations

import torch
from torch import Tensor

from echo_rt.convolution.library import convolve_pictures
from echo_rt.convolution.phases import phase_weights
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

    See :mod:`echo_rt.convolution.phases`. One convolution gives the four phases as channels, one copy puts them in
    their places.
    """
    out_channels = len(weight)
    laid_out = phase_weights(weight.squeeze(2)).flatten(0, 1).permute(0, 3, 1, 2)  # channels-last

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


def phases_limit(shape: ConvolutionShape) -> str:
    """What cannot be done in phases with a shape, or ""."""
    return "" if shape.kernel == (1, 3, 3) else "it takes kernels of 1x3x3"
