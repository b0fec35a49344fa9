"""The linear layers of the transformer, each fused with the operation that produces its input.

A float8 layer reads rows that the preceding kernel quantizes while it has them in registers; a transformer layer is
written once for both kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import MappingProxyType

import torch
from torch import Tensor

from echo_rt.errors import ConfigError
from echo_rt.model.linear_products import TORCH, LinearShape, Products, gelu_tanh
from echo_rt.ops.float8 import product, quantize_rows
from echo_rt.ops.schema import Ops
from echo_rt.utils.device import FLOAT8, dtype_name, placed

# The products of a layer that read what a kernel of ours writes, by the names of their weights. Those of one line are
# one product. The output projections of both attentions read what a library wrote: quantizing that were another pass.
FLOAT8_PRODUCTS = (("self_attn.q", "self_attn.k", "self_attn.v"), ("cross_attn.q",), ("ffn.0",), ("ffn.2",))
# Self-attention itself, with the KV cache that it reads.
SELF_ATTENTION = "self_attn.attention"


@dataclass(frozen=True)
class Linear:
    """A linear layer: weight ``[out, in]``, bias ``[out]``, and what computes it for the shapes of ``products``."""

    weight: Tensor
    bias: Tensor
    products: Products = field(default_factory=dict)

    def __call__(self, x: Tensor) -> Tensor:
        return self._of(x, gelu=False)

    def after_norm(self, ops: Ops, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        return self(ops.modulated_layer_norm(x, shift, scale, eps))

    def after_residual_norm(
        self, ops: Ops, x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
    ) -> Tensor:
        return self(ops.gated_residual_norm(x, y, gate, shift, scale, eps))

    def after_gelu(self, ops: Ops, x: Tensor) -> Tensor:
        return self(gelu_tanh(x))

    def then_gelu(self, x: Tensor) -> Tensor:
        """Apply the layer to ``x [n, in]``, then :func:`gelu_tanh`."""
        return self._of(x, gelu=True)

    def _of(self, x: Tensor, gelu: bool) -> Tensor:
        outputs, inputs = self.weight.shape
        product = self.products.get(LinearShape(len(x), inputs, outputs, gelu), TORCH)
        return product(x, self.weight, self.bias, gelu)


@dataclass(frozen=True)
class Float8Linear:
    """A linear layer in float8: weight e4m3fn ``[out, in]``, a float32 scale per output, bias in the output's dtype."""

    weight: Tensor
    scales: Tensor
    bias: Tensor

    @classmethod
    def quantize(cls, weight: Tensor, bias: Tensor) -> Float8Linear:
        """Quantize a float32 ``weight``."""
        return cls(*quantize_rows(weight), bias)

    def after_norm(self, ops: Ops, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        return self._of(x, lambda out, scales: ops.modulated_layer_norm_quantize(x, shift, scale, out, scales, eps))

    def after_residual_norm(
        self, ops: Ops, x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
    ) -> Tensor:
        quantize = ops.gated_residual_norm_quantize
        return self._of(x, lambda out, scales: quantize(x, y, gate, shift, scale, out, scales, eps))

    def after_gelu(self, ops: Ops, x: Tensor) -> Tensor:
        return self._of(x, lambda out, scales: ops.gelu_quantize(x, out, scales))

    def _of(self, x: Tensor, quantize: Callable[[Tensor, Tensor], None]) -> Tensor:
        """Multiply the rows made of ``x [n, any]`` that ``quantize`` writes, and their scales [n]."""
        values = torch.empty(x.shape, dtype=FLOAT8, device=x.device)
        scales = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
        quantize(values, scales)
        return product(values, scales, self.weight, self.scales, self.bias)


# ``input @ weight.T + bias``, where an operation makes the input from ``x``; arguments as in :class:`Ops`.
Product = Linear | Float8Linear


class Weights:
    """Tensors by their original names, placed in ``dtype``.

    ``kept``: layers that :meth:`product` leaves in it; ``products``: what computes linear layers of these shapes.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        device: torch.device,
        dtype: torch.dtype,
        kept: frozenset[str] = frozenset(),
        products: Products = MappingProxyType({}),
    ) -> None:
        self._tensors, self._device, self._dtype, self._kept = tensors, device, dtype, kept
        self._products = products

    def matrix(self, name: str) -> Tensor:
        return self._tensors[name].to(self._device, self._dtype)

    def vector(self, name: str) -> Tensor:
        """Return a tensor in float32, aligned for the kernels."""
        return placed(self._tensors[name], self._device, torch.float32)

    def linear(self, *names: str) -> Linear:
        """Return one linear layer for several projections of the same input, stacked along the output."""
        weight, bias = (self._stacked(self.matrix, names, part) for part in ("weight", "bias"))
        return Linear(weight, bias, self._products)

    def product(self, *names: str) -> Product:
        """Return :meth:`linear` in float8, unless kept from it; quantized from the stored, unrounded values."""
        if not self._kept.isdisjoint(names):
            return self.linear(*names)
        weight, bias = self._stacked(self.vector, names, "weight"), self._stacked(self.matrix, names, "bias")
        return Float8Linear.quantize(weight, bias)

    @staticmethod
    def _stacked(read: Callable[[str], Tensor], names: Sequence[str], part: str) -> Tensor:
        first, *others = (read(f"{name}.{part}") for name in names)
        return torch.cat((first, *others)) if others else first


def feed_forward(
    ops: Ops, into: Product, out: Product, x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> Tensor:
    """``out(GELU(into(norm(x + y))))``; ``x`` is written. GELU is fused into the layer or kernel that can take it."""
    if isinstance(into, Linear) and isinstance(out, Linear):
        return out(into.then_gelu(ops.gated_residual_norm(x, y, None, shift, scale, eps)))
    return out.after_gelu(ops, into.after_residual_norm(ops, x, y, None, shift, scale, eps))


def float8_layers() -> str:
    """List the names of the layers that can be float8, for a message."""
    return ", ".join(f"blocks.N.{name}" for names in (*FLOAT8_PRODUCTS, (SELF_ATTENTION,)) for name in names)


def float8_attention(layers: int, kept: Collection[str]) -> dict[int, frozenset[int]]:
    """Numbers of the layers whose self-attention is float8, with the denoising steps at which it is not.

    All layers but those in ``kept`` (of :func:`kept_from_float8`) and the last: the memory reads its cache, in 16 bits.
    """
    names = {index: f"blocks.{index}.{SELF_ATTENTION}" for index in range(layers - 1)}
    steps = [name.split("@") for name in kept if "@" in name]
    return {
        index: frozenset(int(step) for of, step in steps if of == name)
        for index, name in names.items()
        if name not in kept
    }


def kept_from_float8(layers: int, steps: int, dtype: torch.dtype, patterns: Sequence[str]) -> frozenset[str]:
    """Names such as ``blocks.0.ffn.2`` of the products that could be float8 and are not, as ``patterns`` say.

    A product of several projections is kept as a whole. ``blocks.0.self_attn.attention`` is a layer's self-attention,
    and ``blocks.0.self_attn.attention@1`` is it at denoising step 1 of a block, of ``steps``; not named beside the
    former. All of them where ``dtype`` is not float8. Raises :class:`ConfigError` for patterns without float8, and for
    one that matches nothing.
    """
    listed = isinstance(patterns, Sequence) and not isinstance(patterns, str)
    if not listed or not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigError(f"float8_except must be a sequence of patterns like '*.ffn.2', got {patterns!r}")
    able = (*FLOAT8_PRODUCTS, (SELF_ATTENTION,), *((f"{SELF_ATTENTION}@{step}",) for step in range(steps)))
    products = [[f"blocks.{index}.{name}" for name in names] for index in range(layers) for names in able]
    if dtype != FLOAT8:
        if patterns:
            raise ConfigError(f"float8_except is for dtype 'float8', and the dtype is {dtype_name(dtype)!r}")
        patterns = ["*"]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for names in products for name in names):
            raise ConfigError(
                f"float8_except: {pattern!r} matches no layer that can be float8: {float8_layers()}, "
                f"blocks.N.{SELF_ATTENTION}@S at denoising step S; N in 0..{layers - 1}, S in 0..{steps - 1}"
            )
    matched = [names for names in products if any(fnmatchcase(name, p) for name in names for p in patterns)]
    kept = {name for names in matched for name in names}
    return frozenset(name for name in kept if "@" not in name or name.partition("@")[0] not in kept)
