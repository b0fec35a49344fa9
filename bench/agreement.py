"""Whether a result is right, before it may be called fast: everything a call returns or writes, against another's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from echo_rt.bench.measure import difference
from echo_rt.utils.device import FLOAT8

# Twice what tests/ops/test_ops.py allows between a backend and the formula: here both sides are rounded.
# float8 is quantized from float32 results that differ by their last bits: some values lie on two sides of a tie.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4, FLOAT8: 4e-3}
# A library rounds on the way where the definition does not.
LIBRARY_BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3, FLOAT8: 3e-2}


@dataclass(frozen=True)
class Agreement:
    """The worst of a call's tensors: its relative error and the bound it is held to."""

    error: float = 0.0
    bound: float = 0.0

    @property
    def ok(self) -> bool:
        return self.error <= self.bound  # NaN is not

    def worse(self, other: Agreement) -> Agreement:
        """Whichever is further from its bound; what is beyond it comes first."""
        if self.ok != other.ok:
            return other if self.ok else self
        return other if other.error * max(self.bound, 1e-30) > self.error * max(other.bound, 1e-30) else self


def compare(actual: Tensor, expected: Tensor, bounds: dict[torch.dtype, float]) -> Agreement:
    """Of one tensor; whole numbers must be the same."""
    return Agreement(difference(actual, expected), bounds.get(expected.dtype, 0.0))


def copies(args: Sequence[Any]) -> list[Any]:
    """The arguments with tensors of their own."""
    return [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]


def compare_calls(
    actual: tuple[Any, Sequence[Any]], expected: tuple[Any, Sequence[Any]], bounds: dict[torch.dtype, float]
) -> Agreement:
    """Of two calls, each what it returned and its arguments afterwards: the worst of all tensors."""
    worst = Agreement()
    for a, e in zip([actual[0], *actual[1]], [expected[0], *expected[1]], strict=True):
        if isinstance(a, Tensor) != isinstance(e, Tensor):
            return Agreement(float("nan"), 0.0)
        if isinstance(e, Tensor):
            worst = worst.worse(compare(a, e, bounds))
    return worst
