"""The project's own convolutions, as the operations of a backend offer them, and how their weights lie."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from echo_rt.convolution.shapes import ConvolutionShape, Prepared
from echo_rt.convolution.torch_conv import subpixel_weights
from echo_rt.ops.schema import Ops

# Tiles of a weight for Hopper: channels that come out, channels that go in, and of these those that lie together.
# csrc/vae/causal_conv_hopper.h has the same numbers, and the operation refuses weights that are cut otherwise.
COLUMNS, DEPTH, CHUNK = 96, 32, 8
# The compute capability of the GPUs that have Hopper's matrix products, and no others.
CAPABILITY = (9, 0)


def causal(ops: Ops, weight: Tensor) -> Prepared:
    """All frames of the kernel in one sum, in one launch."""
    laid_out = weight.contiguous(memory_format=torch.channels_last_3d)
    return _launched(lambda frames, out: ops.causal_conv(frames, laid_out, None, None, out), weight)


def causal_hopper(ops: Ops, weight: Tensor) -> Prepared:
    """The same on the matrix products that Hopper alone has."""
    laid_out = tiled(weight)
    return _launched(lambda frames, out: ops.causal_conv_hopper(frames, laid_out, out), weight)


def upsample(ops: Ops, weight: Tensor) -> Prepared:
    """The four phases of :func:`subpixel_weights`, each written where it belongs, in one launch."""
    laid_out = subpixel_weights(weight.squeeze(2))
    return _launched(lambda frames, out: ops.upsample_conv(frames, laid_out, None, out), weight, scale=2)


def _launched(launch: Callable[[Tensor, Tensor], object], weight: Tensor, scale: int = 1) -> Prepared:
    """``launch`` on frames and a new result."""
    out_channels, past = len(weight), weight.shape[2] - 1

    def call(frames: Tensor, /) -> Tensor:
        count, height, width, _ = frames.shape
        out = frames.new_empty(count - past, scale * height, scale * width, out_channels)
        launch(frames, out)
        return out

    return call


def causal_limit(shape: ConvolutionShape) -> str:
    """What ``causal_conv`` cannot do with a shape, or ""."""
    _, height, width = shape.kernel
    return "" if height == width and height in (1, 3) else "it takes kernels of 1x1 and 3x3 pixels"


def hopper_limit(shape: ConvolutionShape) -> str:
    """What ``causal_conv_hopper`` cannot do with a shape, or ""."""
    if shape.kernel[1:] != (3, 3):
        return "it takes kernels of 3x3 pixels"
    whole = shape.channels % DEPTH == 0 and shape.out_channels % COLUMNS == 0
    return "" if whole else f"it takes multiples of {DEPTH} channels and makes multiples of {COLUMNS}"


def tiled(weight: Tensor) -> Tensor:
    """``weight [Co, C, kT, 3, 3]`` as :meth:`echo_rt.ops.schema.Ops.causal_conv_hopper` wants it."""
    taps: Tensor = weight.flatten(3).unflatten(1, (-1, DEPTH // CHUNK, CHUNK)).unflatten(0, (-1, COLUMNS))
    return taps.permute(0, 5, 2, 6, 3, 1, 4).contiguous()


def untiled(weight: Tensor) -> Tensor:
    """What :func:`tiled` was given."""
    kernel: Tensor = weight.permute(0, 5, 2, 4, 6, 1, 3).flatten(2, 4).flatten(0, 1).unflatten(-1, (3, 3))
    return kernel
