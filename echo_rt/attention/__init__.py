"""Attention without a mask, by whichever implementation is fastest here: on a GPU measured on the model's own shapes.

A model is given its attention when it is loaded, as it is given its operations.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from echo_rt.attention.backends import CONVERTED, FLOAT8_LIBRARIES, IMPLEMENTATIONS, Converted, Library, Matmul
from echo_rt.attention.backends import Attention as Attention
from echo_rt.attention.backends import AttentionCandidate as AttentionCandidate
from echo_rt.attention.backends import AttentionShapes as AttentionShapes
from echo_rt.attention.backends import ByDtype as ByDtype
from echo_rt.attention.backends import implementations as implementations
from echo_rt.autotune.cache import Cache
from echo_rt.autotune.tuner import Check, Selection, Tuner
from echo_rt.config import ModelConfig
from echo_rt.ops.schema import Ops
from echo_rt.utils.device import FLOAT8, parse_dtype, working_dtype

AttentionSelection = Selection[Attention]
CACHE = Cache("attention", AttentionShapes)
cache_folder = CACHE.path

# Shapes to try candidates on without a model; the head size is Wan's.
_PROBE = AttentionShapes(queries=64, keys=200, heads=2, head_dim=128)
_CHECKED_QUERIES = 32


def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute the formula in float64, ``[n, H·d]``; head by head, as the scores are large."""
    scale = 1 / math.sqrt(q.shape[-1])
    heads = [
        torch.softmax(q[:, head].double() @ k[:, head].double().T * scale, dim=-1) @ v[:, head].double()
        for head in range(q.shape[1])
    ]
    return torch.stack(heads, dim=1).flatten(1)


class AttentionCheck(Check[Attention]):
    """Random ``q``, ``k`` and ``v`` of ``shapes``, with k and v laid out as in the KV buffer.

    Their spread is a trained model's (measured on the demo model): keys have a mean for each channel, in some channels
    several times what they vary by.
    """

    calls = 4

    def __init__(self, shapes: AttentionShapes, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(device, working_dtype(dtype), (shapes.queries, shapes.heads * shapes.head_dim))
        kv = self.normal(2, shapes.keys, shapes.heads, shapes.head_dim)
        mean = 0.5 * self.normal(shapes.heads, shapes.head_dim)
        mean[:, ::32] += 8
        kv[0] += mean
        self.q = (1.3 * self.normal(shapes.queries, shapes.heads, shapes.head_dim)).to(dtype)
        self.k, self.v = (1.3 * kv).to(dtype)
        self.inputs = (self.q, self.k, self.v)

    def call(self, attention: Attention, /) -> Callable[[], Tensor]:
        return partial(attention, self.q, self.k, self.v)

    def errors(self, out: Tensor) -> Tensor:
        """Return the errors of queries spread from first to last."""
        checked = min(_CHECKED_QUERIES, len(out))
        rows = torch.linspace(0, len(out) - 1, checked, device=out.device).round().long()
        exact = exact_attention(self.q[rows], self.k, self.v)
        errors: Tensor = (out[rows].double() - exact).norm(dim=1) / exact.norm(dim=1)
        return errors


def attention_tuner(
    device: torch.device,
    dtype: torch.dtype,
    shapes: AttentionShapes,
    candidates: Sequence[AttentionCandidate] = IMPLEMENTATIONS,
) -> Tuner[Attention, AttentionShapes]:
    """Return the tuner that selects an attention for ``shapes``."""
    return Tuner(CACHE, device, dtype, shapes, candidates, partial(AttentionCheck, shapes, device, dtype))


def _over_cache(config: ModelConfig) -> AttentionShapes:
    transformer = config.transformer
    return AttentionShapes(config.tokens_per_block, config.cached_tokens, transformer.num_heads, transformer.head_dim)


def attention_in_float8(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    attention: Attention,
    *,
    cache: Path | None,
    prescribed: str | None = None,
) -> AttentionSelection:
    """Select the attention over a float8 KV buffer: a library's, or that of ``attention`` in ``dtype``."""
    tuner = attention_tuner(device, FLOAT8, _over_cache(config), _of_float8(attention, dtype))
    return tuner.select(None, prescribed, cache=cache)


def _of_float8(attention: Attention, dtype: torch.dtype) -> tuple[AttentionCandidate, ...]:
    """Return the candidates of float8 tensors; ``attention`` in ``dtype`` is that of the first."""
    make = partial(Converted, attention, dtype)
    return (AttentionCandidate(CONVERTED, make, devices=("cuda", "cpu"), dtypes=(FLOAT8,)), *FLOAT8_LIBRARIES)


def attentions(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    ops: Ops,
    requested: str | None = None,
    *,
    cache: Path | None,
    prescribed: tuple[str | None, str | None] = (None, None),
) -> tuple[AttentionSelection, AttentionSelection]:
    """Select the attention of a model over its full KV buffer, and over the text."""
    over_cache = _over_cache(config)
    over_text = dataclasses.replace(over_cache, keys=config.transformer.text_len)
    first, second = (
        attention_tuner(device, dtype, shapes, implementations(ops)).select(requested, name, cache=cache)
        for shapes, name in zip((over_cache, over_text), prescribed, strict=True)
    )
    return first, second


def untried_attention(device: torch.device) -> Attention:
    """Return an attention that works for any head size on ``device`` without trying: torch's own on a CPU."""
    return Library("sdpa", scaled_dot_product_attention) if device.type == "cpu" else Matmul()


def probes(device: torch.device, ops: Ops) -> tuple[Tuner[Attention, AttentionShapes], ...]:
    """Return tuners that try all candidates without a model, in the dtype that models have there and in float8."""
    float8 = _of_float8(untried_attention(device), working_dtype(FLOAT8))
    return (
        attention_tuner(device, parse_dtype(None, device), _PROBE, implementations(ops)),
        attention_tuner(device, FLOAT8, _PROBE, float8),
    )
