"""The operations that make rows of float8, on every backend that is there, against their formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch
from cases import SIZES, Sizes
from op_checks import ALL_SIZES, BACKENDS, DTYPES, as_float64, assert_same, case, copies, layer_norm, spread
from torch import Tensor

from echo_rt.ops import reference
from echo_rt.ops.backends import load_ops
from echo_rt.ops.float8 import FLOAT8_MAX
from echo_rt.ops.schema import Ops
from echo_rt.utils.device import FLOAT8


@pytest.fixture(params=BACKENDS)
def ops(request: pytest.FixtureRequest) -> Ops:
    return load_ops(request.param)


# Of a row's largest magnitude, which is a float32 of few roundings.
SCALE_SLACK = 1e-5
# Float8 of the float64 formula and of a float32 one may fall on two sides of a tie: of so many bytes, one may.
TIES = 1e-3


def check_quantized(ops_out: tuple[Tensor, Tensor], torchs: tuple[Tensor, Tensor], expected: Tensor) -> None:
    """Rows of float8 and their scales: as torch's but for ties, each the nearest there is to ``expected``."""
    (values, scales), (their_values, their_scales) = ops_out, torchs
    assert values.dtype == FLOAT8 and scales.dtype == torch.float32
    torch.testing.assert_close(scales, their_scales, rtol=1e-6, atol=0)
    torch.testing.assert_close(scales.double(), expected.abs().amax(-1) / FLOAT8_MAX, rtol=SCALE_SLACK, atol=0)
    apart = values.view(torch.uint8) != their_values.view(torch.uint8)
    assert int(apart.sum()) <= max(2, TIES * apart.numel())
    # Half a step of the mantissa's three bits, or of the subnormals (2^-9); beside it float32's own errors.
    scale = scales[:, None].double()
    half_step = (expected.abs() * 2**-4).maximum(scale * 2**-10) + 1e-6 * FLOAT8_MAX * scale
    assert bool(((values.double() * scale - expected).abs() <= half_step).all())


@DTYPES
@ALL_SIZES
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "spread"])
def test_modulated_layer_norm_quantize(ops: Ops, dtype: torch.dtype, size: str, dense: bool) -> None:
    args = case(ops, "modulated_layer_norm_quantize", SIZES[size], dtype)
    if not dense:
        args[0] = spread(args[0])
    x, shift, scale = as_float64(args[:3])
    theirs = copies(args)
    reference.modulated_layer_norm_quantize(*theirs)
    ops.modulated_layer_norm_quantize(*args)
    check_quantized((args[3], args[4]), (theirs[3], theirs[4]), layer_norm(x, shift, scale))


@DTYPES
@ALL_SIZES
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_gated_residual_norm_quantize(ops: Ops, dtype: torch.dtype, size: str, gated: bool) -> None:
    args = case(ops, "gated_residual_norm_quantize", SIZES[size], dtype)
    args[:2] = spread(args[0]), spread(args[1])
    if not gated:
        args[2] = None
    theirs, plain = copies(args), copies([*args[:5], args[7]])
    reference.gated_residual_norm_quantize(*theirs)
    ops.gated_residual_norm_quantize(*args)
    ops.gated_residual_norm(*plain)
    assert_same(args[0], plain[0])  # the sum is what it is without float8
    shift, scale = as_float64(args[3:5])
    check_quantized((args[5], args[6]), (theirs[5], theirs[6]), layer_norm(args[0].double(), shift, scale))


@DTYPES
@ALL_SIZES
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "spread"])
def test_gelu_quantize(ops: Ops, dtype: torch.dtype, size: str, dense: bool) -> None:
    args = case(ops, "gelu_quantize", SIZES[size], dtype)
    args[0] *= 3  # into both tails
    if not dense:
        args[0] = spread(args[0])
    x, theirs = args[0].double(), copies(args)
    reference.gelu_quantize(*theirs)
    ops.gelu_quantize(*args)
    expected = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    check_quantized((args[1], args[2]), (theirs[1], theirs[2]), expected)


@ALL_SIZES
def test_quantized_rows_of_zeros_stay_zeros_and_a_nan_stays_in_sight(ops: Ops, size: str) -> None:
    x, out, out_scale = case(ops, "gelu_quantize", Sizes(tokens=2, ffn_dim=SIZES[size].ffn_dim), torch.bfloat16)
    x[:4] = 0
    x[0, -1], x[1, 0], x[2, 1] = math.nan, math.inf, 1e-38
    ops.gelu_quantize(x, out, out_scale)
    assert out_scale[0].isnan() and out[0].float().isnan().all()
    assert out_scale[1].isinf() and out[1, 0].float().isnan()  # what a product makes NaN of, too
    for row in (2, 3):
        assert out_scale[row].isfinite() and out_scale[row] > 0 and not out[row].float().any()
    assert out_scale[4:].isfinite().all() and out[4:].float().isfinite().all()
