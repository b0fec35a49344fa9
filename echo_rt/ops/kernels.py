"""The hand-written kernels as a backend: ``cuda`` on a GPU, ``emulated`` where the same sources run on the host.

Importing this module loads ``echo_rt._ops``, which registers ``torch.ops.echo_rt.*`` (schemas: ``bindings/ops.cpp``).
The module is a namespace over them, with one function for each of :data:`echo_rt.ops.schema.OPERATIONS`; the bindings
check the arguments and raise ValueError. Fake kernels tell ``torch.compile`` and ``torch.export`` what each returns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from echo_rt import _ops
from echo_rt.ops.schema import OPERATIONS

name: str = _ops.BACKEND

# Head sizes that memory_attention has tensor-core tiles for.
HEAD_SIZES = (64, 128)


def _fake_nothing(*arguments: Tensor | float | None) -> None:
    """The whole effect is in the arguments that the schema marks as written."""


def _fake_like_first(first: Tensor, *rest: Tensor | float | None) -> Tensor:
    return first.new_empty(first.shape)  # contiguous, whatever the strides of the rows that came


def _fake_queries(*arguments: Tensor | float | None) -> Tensor:
    qkv, k_cache = arguments[0], arguments[5]
    assert isinstance(qkv, Tensor) and isinstance(k_cache, Tensor)
    return k_cache.new_empty(qkv.shape[0], *k_cache.shape[1:])


def _fake_merged(outputs: Tensor, logsumexps: Tensor) -> Tensor:
    _, tokens, heads, head_dim = outputs.shape
    return outputs.new_empty(tokens, heads * head_dim)


_FAKES: dict[str, Callable[..., Tensor]] = {
    "memory_attention": _fake_like_first,
    "modulated_layer_norm": _fake_like_first,
    "gated_residual_norm": _fake_like_first,
    "qkv_norm_rope_store": _fake_queries,
    "merge_attention": _fake_merged,
}

for _operation in OPERATIONS:
    globals()[_operation] = getattr(torch.ops.echo_rt, _operation).default
    torch.library.register_fake(f"echo_rt::{_operation}", _FAKES.get(_operation, _fake_nothing))
