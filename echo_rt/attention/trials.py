"""Trying an attention on a GPU: is it right on the model's own shapes, and how long does it take there?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from echo_rt.attention.kinds import Attention
from echo_rt.autotune.stopwatch import current, stopwatch
from echo_rt.utils.wording import counted

_CHECKED_QUERIES = 32


@dataclass(frozen=True)
class AttentionShapes:
    """Of one call, in tokens: ``queries`` attend to ``keys``, in ``heads`` heads of ``head_dim`` numbers."""

    queries: int
    keys: int
    heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.queries} queries, {self.keys} keys, {counted(self.heads, 'head')} of {self.head_dim}"


def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula in float64, ``[n, H·d]``; a head at a time, as it is many times the size of its input."""
    scale = 1 / math.sqrt(q.shape[-1])
    heads = [
        torch.softmax(q[:, head].double() @ k[:, head].double().T * scale, dim=-1) @ v[:, head].double()
        for head in range(q.shape[1])
    ]
    return torch.stack(heads, dim=1).flatten(1)


class Trials:
    """Random ``q``, ``k`` and ``v`` of ``shapes``, with k and v laid out as in the KV buffer."""

    def __init__(self, shapes: AttentionShapes, device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, shapes.heads, shapes.head_dim, generator=generator, device=device, dtype=dtype)

        self._device = device
        self.q = normal(shapes.queries)
        self.k, self.v = normal(2, shapes.keys)

    def error(self, attention: Attention) -> float:
        """The largest relative error among queries from first to last; infinite for an output of the wrong kind."""
        q, k, v = self.q, self.k, self.v
        with current(self._device):
            out = attention(q, k, v)
            if out.shape != (q.shape[0], q.shape[1] * q.shape[2]) or out.dtype != q.dtype:
                return math.inf
            checked = min(_CHECKED_QUERIES, q.shape[0])
            rows = torch.linspace(0, q.shape[0] - 1, checked, device=q.device).round().long()
            exact = exact_attention(q[rows], k, v)
            errors = (out[rows].double() - exact).norm(dim=1) / exact.norm(dim=1)
        # A comparison with NaN is false whatever one asks; an infinite error is not.
        return float(errors.nan_to_num(nan=math.inf).max())

    def stopwatch(self, attention: Attention) -> Callable[[], float]:
        """A function that runs ``attention`` as in the steady state and returns the milliseconds of a call."""
        q, k, v = self.q, self.k, self.v
        return stopwatch(lambda: attention(q, k, v), self._device)
