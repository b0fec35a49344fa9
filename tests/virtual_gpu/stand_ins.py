"""What operators of libraries compute that are others on the CPU, or not there: attention, convolutions, products.

Each is a pair: how to compute the result, and the shapes of what is returned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """In float32, ``[batch, heads, tokens, channels]``; whichever kinds the caller allows."""
    out, _ = torch.ops.aten._scaled_dot_product_attention_math(q.float(), k.float(), v.float(), scale=scale)
    return out.to(q.dtype)


def _sums(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    """Log-sum-exps of the scores, float32 ``[batch, heads, tokens]``."""
    scores = q.float() @ k.float().transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
    return scores.logsumexp(-1)


def _attended(q: Tensor) -> Tensor:
    """What attention returns lies as ``[batch, tokens, heads, channels]``."""
    return torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def _flash(q: Tensor, k: Tensor, v: Tensor, *rest: Any, scale: float | None = None) -> tuple[Tensor, Tensor]:
    return _attention(q, k, v, scale), _sums(q, k, scale)


def _flash_shape(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **named: Any) -> tuple[Any, ...]:
    none = torch.empty(0, device="meta")
    log_sum = torch.empty(q.shape[:3], dtype=torch.float32, device="meta")
    return _attended(q), log_sum, none, none, q.shape[2], k.shape[2], none, none, none


def _cudnn(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, log_sum: bool, *rest: Any, scale: float | None = None
) -> tuple[Tensor, ...]:
    if bias is not None:
        raise NotImplementedError("attention with a bias on the virtual GPU")
    out = _attention(q, k, v, scale)
    return (out, _sums(q, k, scale).unsqueeze(-1)) if log_sum else (out,)


def _cudnn_shape(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **named: Any) -> tuple[Any, ...]:
    out, sums, *others = _flash_shape(q, k, v)
    return out, sums.unsqueeze(-1), *others


def _efficient(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, log_sum: bool, *rest: Any, scale: float | None = None
) -> tuple[Tensor]:
    if bias is not None or log_sum:
        raise NotImplementedError("attention with a bias, or that returns its sums, on the virtual GPU")
    return (_attention(q, k, v, scale),)


def _efficient_shape(q: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, ...]:
    none = torch.empty(0, device="meta")
    return _attended(q), none, none, none


def _convolution(
    x: Tensor,
    weight: Tensor,
    padding: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *_: Any,
) -> Tensor:
    """In float32: the CPU's sums in 16 bits are not those of cuDNN."""
    arguments = (None, stride, padding, dilation, False, [0] * len(stride), groups)
    return torch.ops.aten.convolution(x.float().contiguous(), weight.float().contiguous(), *arguments).to(x.dtype)


def _convolution_shape(
    x: Tensor,
    weight: Tensor,
    padding: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *_: Any,
) -> Tensor:
    out = torch.ops.aten.convolution(x, weight, None, stride, padding, dilation, False, [0] * len(stride), groups)
    last = torch.channels_last_3d if x.dim() == 5 else torch.channels_last
    is_last = any(t.is_contiguous(memory_format=last) and not t.is_contiguous() for t in (x, weight))
    memory_format = last if is_last else torch.contiguous_format
    return torch.empty(out.shape, dtype=x.dtype, device="meta", memory_format=memory_format)


def _scaled_product(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    scale_result: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> Tensor:
    out = (a.float() @ b.float()) * scale_a * scale_b
    if bias is not None:
        out = out + bias.float()
    return out.to(out_dtype or a.dtype)


def _scaled_product_shape(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    scale_result: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> Tensor:
    """What cuBLAS asks of a product scaled by rows: a row-major, b column-major, a scale for each row and column."""
    if a.stride(1) != 1 or b.stride(0) != 1:
        raise RuntimeError(f"_scaled_mm needs rows of a and columns of b in one piece; got {a.stride()}, {b.stride()}")
    if scale_a.shape != (a.shape[0], 1) or scale_b.shape != (1, b.shape[1]):
        raise RuntimeError(f"_scaled_mm needs a scale for each row; got {tuple(scale_a.shape)}, {tuple(scale_b.shape)}")
    return torch.empty(a.shape[0], b.shape[1], dtype=out_dtype or a.dtype, device="meta")


def _activated_product(
    bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1, use_gelu: bool = False
) -> Tensor:
    """GELU by its tanh formula, as cuBLAS has it; the CPU's operator has the one with erf."""
    out = torch.addmm(bias, a, b, beta=beta, alpha=alpha)
    return torch.nn.functional.gelu(out, approximate="tanh") if use_gelu else torch.relu(out)


def _wide_products(
    added: Tensor,
    a: Tensor,
    b: Tensor,
    out_dtype: torch.dtype,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: Tensor,
) -> Tensor:
    """Of 16-bit matrices, with a result that is not rounded to 16 bits; a factor of 0 means that nothing is read."""
    sums = alpha * (a.to(out_dtype) @ b.to(out_dtype))
    return out.copy_(sums + beta * added if beta else sums)


def _wide_products_shape(added: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, **named: Any) -> Tensor:
    return torch.empty(len(a), a.shape[1], b.shape[2], dtype=out_dtype, device="meta")


STAND_INS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "aten::_scaled_dot_product_flash_attention": (_flash, _flash_shape),
    "aten::_scaled_dot_product_cudnn_attention": (_cudnn, _cudnn_shape),
    "aten::_scaled_dot_product_efficient_attention": (_efficient, _efficient_shape),
    "aten::cudnn_convolution": (_convolution, _convolution_shape),
    "aten::_addmm_activation": (_activated_product, _activated_product),
    "aten::baddbmm.dtype_out": (_wide_products, _wide_products_shape),
    "aten::_scaled_mm": (_scaled_product, _scaled_product_shape),
}
