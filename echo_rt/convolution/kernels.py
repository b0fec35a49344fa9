"""The hand-written convolution kernels, and the layout of their weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from echo_rt.convolution.shapes import ConvolutionShape, Prepared
from echo_rt.convolution.torch_conv import subpixel_weights
from echo_rt.ops.schema import Ops

# Tiles of a weight for Hopper: output channels, input channels, and input channels that are adjacent in memory.
# csrc/vae/causal_conv_hopper.h has the same numbers, and the operation refuses other tiles.
COLUMNS, DEPTH, CHUNK = 96, 32, 8
# The compute capability of GPUs with Hopper's matrix products.
CAPABILITY = (9, 0)


def causal(ops: Ops, weight: Tensor) -> Prepared:
    """Compute all frames of the kernel in one launch."""
    laid_out = weight.contiguous(memory_format=torch.channels_last_3d)
    return _launched(lambda frames, out: ops.causal_conv(frames, laid_out, None, None, out), weight)


def causal_hopper(ops: Ops, weight: Tensor) -> Prepared:
    """Do the same on Hopper's matrix products."""
    laid_out = tiled(weight)
    return _launched(lambda frames, out: ops.causal_conv_hopper(frames, laid_out, out), weight)


def upsample(ops: Ops, weight: Tensor) -> Prepared:
    """Compute the four parts of :func:`subpixel_weights` in one launch, each written in its place."""
    laid_out = subpixel_weights(weight.squeeze(2))
    return _launched(lambda frames, out: ops.upsample_conv(frames, laid_out, None, out), weight, scale=2)


def _launched(launch: Callable[[Tensor, Tensor], object], weight: Tensor, scale: int = 1) -> Prepared:
    """Return a function of frames that calls ``launch`` with them and a new output."""
    out_channels, past = len(weight), weight.shape[2] - 1

    def call(frames: Tensor, /) -> Tensor:
        count, height, width, _ = frames.shape
        out = frames.new_empty(count - past, scale * height, scale * width, out_channels)
        launch(frames, out)
        return out

    return call


def causal_limit(shape: ConvolutionShape) -> str:
    """Say why ``causal_conv`` cannot compute a shape, or ""."""
    _, height, width = shape.kernel
    return "" if height == width and height in (1, 3) else "it takes kernels of 1x1 and 3x3 pixels"


def hopper_limit(shape: ConvolutionShape) -> str:
    """Say why ``causal_conv_hopper`` cannot compute a shape, or ""."""
    if shape.kernel[1:] != (3, 3):
        return "it takes kernels of 3x3 pixels"
    whole = shape.channels % DEPTH == 0 and shape.out_channels % COLUMNS == 0
    return "" if whole else f"it takes multiples of {DEPTH} channels and makes multiples of {COLUMNS}"


def tiled(weight: Tensor) -> Tensor:
    """Lay out ``weight [Co, C, kT, 3, 3]`` for :meth:`echo_rt.ops.schema.Ops.causal_conv_hopper`."""
    taps: Tensor = weight.flatten(3).unflatten(1, (-1, DEPTH // CHUNK, CHUNK)).unflatten(0, (-1, COLUMNS))
    return taps.permute(0, 5, 2, 6, 3, 1, 4).contiguous()


def untiled(weight: Tensor) -> Tensor:
    """Invert :func:`tiled`."""
    kernel: Tensor = weight.permute(0, 5, 2, 4, 6, 1, 3).flatten(2, 4).flatten(0, 1).unflatten(-1, (3, 3))
    return kernel
