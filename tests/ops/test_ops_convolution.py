"""The decoder's convolutions as operations, on every backend that is there, against their formulas in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from cases import Sizes
from op_checks import BACKENDS, BOUNDS, DTYPES, as_float64, assert_close, case, copies, float32_is_refused
from torch import Tensor

from echo_rt.ops import reference
from echo_rt.ops.backends import load_ops
from echo_rt.ops.schema import Ops

# (frames, height, width, channels), (channels that come out, frames, rows and columns of the kernel): more than a patch
# of pixels and less, whole chunks of channels and not, more than one tile of those that come out and few.
CONVOLUTIONS = {
    "odd": ((2, 5, 4, 6), (7, 3, 3, 3)),
    "one": ((1, 1, 1, 1), (40, 1, 1, 1)),
    "whole": ((1, 17, 3, 40), (96, 3, 3, 3)),
    "deep": ((2, 2, 3, 72), (8, 2, 3, 3)),
    "in-space": ((2, 3, 33, 40), (20, 1, 3, 3)),
    "in-time": ((5, 2, 3, 24), (104, 3, 1, 1)),
    "in-time-odd": ((4, 3, 2, 33), (3, 3, 1, 1)),
}
ALL_CONVOLUTIONS = pytest.mark.parametrize("size", CONVOLUTIONS)


@pytest.fixture(params=BACKENDS)
def ops(request: pytest.FixtureRequest) -> Ops:
    return load_ops(request.param)


def convolution_case(ops: Ops, op: str, size: str, dtype: torch.dtype) -> list[Any]:
    """Arguments whose frames lie among others, and nothing yet where the result goes."""
    vae, convolution = CONVOLUTIONS[size]
    args = case(ops, op, Sizes(vae=vae, convolution=convolution), dtype)
    for i, arg in enumerate(args):
        if isinstance(arg, Tensor) and arg.dim() == 4:
            args[i] = torch.stack((arg, arg), 1)[:, 0]
    args[-1].fill_(math.nan)
    return args


@DTYPES
@ALL_CONVOLUTIONS
@pytest.mark.parametrize("added", [True, False], ids=["residual", "plain"])
def test_causal_conv(ops: Ops, dtype: torch.dtype, size: str, added: bool) -> None:
    args = convolution_case(ops, "causal_conv", size, dtype)
    if not added:
        args[2:4] = None, None
    if float32_is_refused(ops, "causal_conv", args):
        return
    window, weight, bias, residual, out = as_float64(args)
    (frames, height, width, _), (around, _) = out.shape, (side // 2 for side in weight.shape[3:])
    padded = torch.nn.functional.pad(window, (0, 0, around, around, around, around))
    expected = torch.zeros_like(out) if residual is None else bias + residual
    for k, i, j in itertools.product(*map(range, weight.shape[2:])):
        expected = expected + padded[k : k + frames, i : i + height, j : j + width] @ weight[:, :, k, i, j].T
    theirs = copies(args)
    reference.causal_conv(*theirs)
    ops.causal_conv(*args)
    assert_close(args[4], theirs[4], expected, BOUNDS[dtype])


# More than a block's pixels and fewer, one frame of the kernel and three, several slabs and tiles of channels.
HOPPER_SIZES = {
    "one": ((1, 1, 1, 32), (96, 1)),
    "patches": ((1, 17, 34, 32), (96, 1)),
    "slabs": ((3, 5, 7, 96), (96, 3)),
    "tiles": ((1, 9, 3, 64), (192, 2)),
}


@DTYPES
@pytest.mark.parametrize("size", HOPPER_SIZES)
def test_causal_conv_hopper(ops: Ops, dtype: torch.dtype, size: str) -> None:
    vae, (out_channels, kernel_frames) = HOPPER_SIZES[size]
    args = case(ops, "causal_conv_hopper", Sizes(vae=vae, convolution=(out_channels, kernel_frames, 3, 3)), dtype)
    args[0], args[2] = (torch.stack((arg, arg), 1)[:, 0] for arg in (args[0], args[2]))  # frames among others
    args[2].fill_(math.nan)
    if float32_is_refused(ops, "causal_conv_hopper", args):
        return
    window, weight, out = as_float64(args)
    tiles, _, slabs, _, chunks, columns, values = weight.shape
    padded, expected = torch.nn.functional.pad(window, (0, 0, 1, 1, 1, 1)), torch.zeros_like(out)
    for tile, k, slab, tap, chunk in itertools.product(*map(range, (tiles, kernel_frames, slabs, 9, chunks))):
        i, j = divmod(tap, 3)
        channel, (frames, height, width, _) = (slab * chunks + chunk) * values, out.shape
        seen = padded[k : k + frames, i : i + height, j : j + width, channel : channel + values]
        made = slice(tile * columns, (tile + 1) * columns)
        expected[..., made] += seen @ weight[tile, k, slab, tap, chunk].T
    theirs = copies(args)
    reference.causal_conv_hopper(*theirs)
    ops.causal_conv_hopper(*args)
    assert_close(args[2], theirs[2], expected, BOUNDS[dtype])
    first = args[2].clone()
    args[2].fill_(math.nan)
    ops.causal_conv_hopper(*args)  # which draws its tiles anew
    assert torch.equal(args[2], first)


@DTYPES
@ALL_CONVOLUTIONS
def test_upsample_conv(ops: Ops, dtype: torch.dtype, size: str) -> None:
    args = convolution_case(ops, "upsample_conv", size, dtype)
    if float32_is_refused(ops, "upsample_conv", args):
        return
    x, weight, bias, out = as_float64(args)
    padded, expected = torch.nn.functional.pad(x, (0, 0, 1, 1, 1, 1)), bias.expand(out.shape).clone()
    for a, b, i, j in itertools.product(range(2), repeat=4):
        seen = padded[:, a + i : a + i + x.shape[1], b + j : b + j + x.shape[2]]
        expected[:, a::2, b::2] += seen @ weight[2 * a + b, :, i, j].T
    theirs = copies(args)
    reference.upsample_conv(*theirs)
    ops.upsample_conv(*args)
    assert_close(args[3], theirs[3], expected, BOUNDS[dtype])
