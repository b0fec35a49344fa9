"""3x3 convolutions on the matrix products that Hopper alone has: what they take, and how their weights lie."""

from __future__ import annotations

from torch import Tensor

from echo_rt.convolution.shapes import ConvolutionShape

# Tiles of a weight: channels that come out, channels that go in, and of these those that lie together. csrc/vae/
# causal_conv_hopper.h has the same numbers, and the operation refuses weights that are cut otherwise.
COLUMNS, DEPTH, CHUNK = 96, 32, 8
# The compute capability of the GPUs that have them, and no others.
CAPABILITY = (9, 0)


def hopper_limit(shape: ConvolutionShape) -> str:
    """What ``causal_conv_hopper`` cannot do with a shape, or ""."""
    if shape.kernel[1:] != (3, 3):
        return "it takes kernels of 3x3 pixels"
    whole = shape.channels % DEPTH == 0 and shape.out_channels % COLUMNS == 0
    return "" if whole else f"it takes multiples of {DEPTH} channels and makes multiples of {COLUMNS}"


def untiled(weight: Tensor) -> Tensor:
    """What :func:`tiled` was given."""
    kernel: Tensor = weight.permute(0, 5, 2, 4, 6, 1, 3).flatten(2, 4).flatten(0, 1).unflatten(-1, (3, 3))
    return kernel


def tiled(weight: Tensor) -> Tensor:
    """``weight [Co, C, kT, 3, 3]`` as :meth:`echo_rt.ops.schema.Ops.causal_conv_hopper` wants it."""
    taps: Tensor = weight.flatten(3).unflatten(1, (-1, DEPTH // CHUNK, CHUNK)).unflatten(0, (-1, COLUMNS))
    return taps.permute(0, 5, 2, 6, 3, 1, 4).contiguous()
