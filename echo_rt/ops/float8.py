"""Float8 rows: what they are, how numbers become them, and the product of two of them. Knows torch alone.

A row of numbers is kept as e4m3fn (4 bits of exponent, 3 of mantissa, largest value 448, no infinity) and one float32
scale: ``number = value · scale``, ``scale = largest magnitude of the row / 448``. Activations have a scale for each
token, weights one for each output channel, so a product is scaled after its sum and nothing is lost within it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from echo_rt.utils.device import FLOAT8

FLOAT8_MAX = 448.0
_BYTE = torch.uint8  # which a CPU indexes float8 as

# Inputs and outputs of a product on tensor cores are multiples of this.
_WIDTH_STEP = 16
# What a row's largest magnitude counts as at least: neither the scale of a row of zeros nor its reciprocal may leave
# float32's normal numbers.
_LEAST_MAXIMUM = 2.0**-100


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """``values`` rounded to ``dtype``; as float8 without a scale, and beyond 448 it is 448. A NaN stays one."""
    return (values.clamp(-FLOAT8_MAX, FLOAT8_MAX) if dtype == FLOAT8 else values).to(dtype)


def copy_rows(to: Tensor, rows: Tensor, values: Tensor) -> None:
    """Round ``values`` float32 into ``rows`` (int64) of ``to`` (written)."""
    kept = rounded(values, to.dtype)
    if to.dtype == FLOAT8:
        to, kept = to.view(_BYTE), kept.view(_BYTE)
    to.index_copy_(0, rows, kept)


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """``rows`` float32 ``[n, any]`` as e4m3fn of that shape and scales float32 [n]. A NaN makes its row's scale NaN.

    Rounded to nearest, ties to even, of ``row · (1 / scale)``: kernels do these very steps (row_float8.cuh).
    """
    scales = rows.abs().amax(-1).clamp(min=_LEAST_MAXIMUM) * (1 / FLOAT8_MAX)
    values = rows * scales.reciprocal().unsqueeze(-1)
    # A cast alone makes NaN of what rounding has brought past the largest value, in some versions of torch.
    return rounded(values, FLOAT8), scales


def product(values: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor) -> Tensor:
    """Float8 rows ``[n, in]`` times float8 ``weight [out, in]``, plus ``bias [out]``, in the bias's dtype ``[n, out]``.

    ``scales`` [n] and ``weight_scales`` [out] are float32. This is the product in float32 of the very numbers, scaled
    after the sum and rounded once. A GPU's tensor cores do so, but for widths that are not multiples of 16, which no
    released model has: those are multiplied by the definition, as all are on a CPU.
    """
    if values.device.type == "cuda" and not any(width % _WIDTH_STEP for width in weight.shape):
        return on_tensor_cores(values, scales, weight, weight_scales, bias)
    total = values.float() @ weight.float().t()
    return (total * scales.unsqueeze(-1) * weight_scales + bias.float()).to(bias.dtype)


def on_tensor_cores(values: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor) -> Tensor:
    """:func:`product` by the library: its second matrix lies column by column, and scales have two dimensions."""
    out: Tensor = torch._scaled_mm(
        values,
        weight.t(),
        scales.unsqueeze(-1),
        weight_scales.unsqueeze(0),
        bias=bias,
        out_dtype=bias.dtype,
        use_fast_accum=True,
    )
    return out
