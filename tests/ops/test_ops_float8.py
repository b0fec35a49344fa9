"""The operations that make rows of float8, on every backend that is there, against their formulas in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cases import SIZES, Sizes
from op_checks import (
    ALL_SIZES,
    BACKENDS,
    DTYPES,
    as_float64,
    assert_same,
    case,
    copies,
    layer_norm,
    rms,
    rotate,
    spread,
)
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


def check_rounded(values: Tensor, torchs: Tensor, expected: Tensor) -> None:
    """Float8 without a scale, as torch's but for ties, each the nearest there is to ``expected``, 448 at the most."""
    assert values.dtype == FLOAT8
    assert int((values.view(torch.uint8) != torchs.view(torch.uint8)).sum()) <= max(2, TIES * values.numel())
    expected = expected.clamp(-FLOAT8_MAX, FLOAT8_MAX)
    half_step = (expected.abs() * 2**-4).clamp(min=2**-10) + 1e-6 * expected.abs().max()
    assert bool(((values.double() - expected).abs() <= half_step).all())


@DTYPES
@ALL_SIZES
@pytest.mark.parametrize("raw", [True, False], ids=["raw", "no-raw"])
@pytest.mark.parametrize("kept_frames", [None, 1], ids=["all", "last-frame"])
def test_qkv_norm_rope_store(ops: Ops, dtype: torch.dtype, size: str, raw: bool, kept_frames: int | None) -> None:
    """Queries and cache in float8; what is not rotated in the dtype of ``qkv``, with the bits of a 16-bit cache's."""
    s = replace(SIZES[size], float8=True)
    args = case(ops, "qkv_norm_rope_store", s, dtype)
    args[0][:, 2 * s.dim :] *= 200  # some values are beyond float8
    args[0] = spread(args[0])
    if kept_frames:
        args[7] = args[7][: kept_frames * s.tokens]
    if not raw:
        args[8] = None
    plain = copies([*args[:5], *(cache.to(dtype) for cache in args[5:7]), *args[7:]])
    before, theirs = copies(args), copies(args)
    their_q, q = reference.qkv_norm_rope_store(*theirs), ops.qkv_norm_rope_store(*args)
    ops.qkv_norm_rope_store(*plain)
    qkv, norm_q, norm_k, temporal, spatial = as_float64(args)[:5]
    index, stored = args[7], slice(len(qkv) - len(args[7]), None)
    wanted_q, wanted_k = (
        rotate(rms(part, norm).reshape(-1, s.heads, s.head_dim), temporal, spatial)
        for part, norm in ((qkv[:, : s.dim], norm_q), (qkv[:, s.dim : 2 * s.dim], norm_k))
    )
    check_rounded(q, their_q, wanted_q)
    rows = torch.zeros(s.rows, dtype=torch.bool, device=index.device)
    rows[index] = True
    for cache, expected in ((5, wanted_k), (6, qkv[:, 2 * s.dim :].reshape(wanted_k.shape))):
        check_rounded(args[cache][index], theirs[cache][index], expected[stored])
        assert_same(args[cache][~rows], before[cache][~rows])
    assert args[6][index].float().abs().max() == FLOAT8_MAX
    if raw:
        assert_same(args[8], plain[8])


def test_a_value_that_is_not_finite_stays_visible_in_the_cache(ops: Ops) -> None:
    args = case(ops, "qkv_norm_rope_store", replace(SIZES["small"], float8=True), torch.bfloat16)
    args[0][1, -1], args[0][2, 0] = math.nan, math.nan
    q = ops.qkv_norm_rope_store(*args)
    assert args[6][args[7]].isnan().flatten(1).any(1).nonzero().flatten().tolist() == [1]
    assert q.isnan().flatten(1).all(1).nonzero().flatten().tolist() == [2]


@DTYPES
@ALL_SIZES
@pytest.mark.parametrize("given", ["all", "sink", "memory-keys", "memory-values", "nothing"])
def test_reanchor(ops: Ops, dtype: torch.dtype, size: str, given: str) -> None:
    s = replace(SIZES[size], float8=True)
    args = case(ops, "reanchor", s, dtype)
    args[5] = 200 * args[5]
    for index, name in ((3, "sink"), (4, "memory-keys"), (5, "memory-values")):
        args[index] = args[index] if given in ("all", name) else None
    before, theirs = args[0].clone(), copies(args)
    ops.reanchor(*args)
    reference.reanchor(*theirs)
    kv, memory = args[0], args[6]
    _, anchor, spatial, sink_k, memory_k, memory_v, _ = as_float64(args)
    written = torch.zeros(kv.shape[:3], dtype=torch.bool, device=kv.device)
    for layer in range(s.layers):
        for side, source, rows, turns in (
            (0, sink_k, slice(memory, memory + s.sink_frames * s.tokens), anchor[s.memory_frames :]),
            (0, memory_k, slice(0, memory), anchor[: s.memory_frames]),
            (1, memory_v, slice(0, memory), None),
        ):
            if source is None:
                continue
            source = source[layer] if source is sink_k else source
            expected = source if turns is None else rotate(source, turns, spatial)
            check_rounded(kv[layer, side, rows], theirs[0][layer, side, rows], expected)
            written[layer, side, rows] = True
    assert_same(kv[~written], before[~written])


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
