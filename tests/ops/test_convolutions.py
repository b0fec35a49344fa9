"""The decoder's convolutions as it calls them: summed phases, results that go where they stay, frames in between."""

from __future__ import annotations

import pytest
import torch
from cases import Sizes
from closeness import relative_error
from op_checks import BACKENDS, BOUNDS, assert_close, assert_same, case
from torch.nn import functional

from echo_rt.convolution.torch_conv import subpixel_weights
from echo_rt.ops import reference
from echo_rt.ops.backends import load_ops
from echo_rt.ops.schema import Ops

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


@pytest.fixture(params=BACKENDS)
def ops(request: pytest.FixtureRequest) -> Ops:
    return load_ops(request.param)


def enlarged(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``x [T, h, w, C]`` twice as large by its nearest pixels, then convolved: the long way."""
    pixels = functional.interpolate(x.permute(0, 3, 1, 2), scale_factor=2, mode="nearest")
    return functional.conv2d(pixels, weight, bias, padding=1).permute(0, 2, 3, 1)


def test_phases_are_the_enlargement_and_its_convolution() -> None:
    generator = torch.Generator().manual_seed(3)
    x, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 3, 4, 5), (6, 5, 3, 3), (6,))
    )
    out = torch.empty(2, 6, 8, 6, dtype=torch.float64)
    reference.upsample_conv(x, subpixel_weights(weight), bias.float(), out)
    assert relative_error(out, enlarged(x, weight, bias)) < 1e-6  # the operation itself is float32


@HALF
def test_phases_in_sixteen_bits(ops: Ops, dtype: torch.dtype) -> None:
    """A sum of weights is rounded where each was before: no further off than torch's convolution of them."""
    x, _, bias, out = case(ops, "upsample_conv", Sizes(vae=(1, 9, 17, 24), convolution=(24, 1, 3, 3)), dtype)
    weight = torch.randn(24, 24, 3, 3, generator=torch.Generator().manual_seed(4)).to(x.device) / 15
    expected = enlarged(x.double(), weight.double(), bias.double())
    ops.upsample_conv(x, subpixel_weights(weight).to(dtype), bias, out)
    assert_close(out, enlarged(x, weight.to(dtype), bias.to(dtype)), expected, BOUNDS[dtype])


def test_rounding_comes_behind_bias_and_residual(ops: Ops) -> None:
    """To 2 are added half a unit of its last place in bfloat16 and another: rounded in between, both would be lost."""
    args = case(ops, "causal_conv", Sizes(vae=(1, 1, 1, 8), convolution=(8, 1, 1, 1)), torch.bfloat16)
    half_a_unit = 2.0**-7
    args[0].fill_(0.25), args[1].fill_(1.0), args[2].fill_(half_a_unit), args[3].fill_(half_a_unit)
    ops.causal_conv(*args)
    assert (args[4] == 2 + 2 * half_a_unit).all()


@HALF
@pytest.mark.parametrize("channels", [16, 9])
def test_a_residual_may_be_what_is_written(ops: Ops, dtype: torch.dtype, channels: int) -> None:
    args = case(ops, "causal_conv", Sizes(vae=(2, 17, 3, channels), convolution=(channels, 3, 3, 3)), dtype)
    ops.causal_conv(*args)
    expected = args[4]
    args[3:] = [args[3], args[3]]
    ops.causal_conv(*args)
    assert_same(args[4], expected)


@HALF
def test_frames_that_a_convolution_in_time_makes_two_of(ops: Ops, dtype: torch.dtype) -> None:
    """Half of its channels are the even frames, half the odd ones: each is written where it belongs."""
    window, weight, bias, _, out = case(ops, "causal_conv", Sizes(vae=(2, 3, 2, 16), convolution=(32, 3, 1, 1)), dtype)
    ops.causal_conv(window, weight, bias, None, out)
    video = torch.full((4, 3, 2, 16), torch.nan, dtype=dtype, device=out.device)
    for parity, channels in enumerate((slice(16), slice(16, None))):
        ops.causal_conv(window, weight[channels], bias[channels], None, video[parity::2])
    assert_same(video, out.unflatten(-1, (2, 16)).permute(0, 3, 1, 2, 4).flatten(0, 1))


@HALF
def test_pixels_outside_are_never_looked_at(ops: Ops, dtype: torch.dtype) -> None:
    """Around the window lies what is not a number, and in frames that the kernel does not reach."""
    window, weight, bias, residual, out = case(
        ops, "causal_conv", Sizes(vae=(1, 3, 5, 24), convolution=(16, 2, 3, 3)), dtype
    )
    room = torch.full((4, *window.shape[1:]), torch.nan, dtype=dtype, device=window.device)
    room[1:3] = window
    ops.causal_conv(room[1:3], weight, bias, residual, out)
    inside = out.clone()
    ops.causal_conv(window, weight, bias, residual, out)
    assert_same(inside, out)
