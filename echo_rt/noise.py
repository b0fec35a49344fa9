"""Noise that depends on (seed, block, step, element) and on nothing else.

A counter-based generator (Philox 4x32 with 10 rounds; Salmon et al., SC 2011) has no state to carry: a stream is
reproducible, resumable at any block, and the same however it is consumed. The integers are exact on every device;
the normal numbers come from Box-Muller in float64 and are rounded to float32 once.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from echo_rt.options import check_seed

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


class NoiseSource(Protocol):
    """Where a rollout's noise comes from."""

    def fill(self, out: Tensor, block: int, step: int) -> None:
        """Fill float32 ``out`` with the standard normal noise of denoising step ``step`` of ``block``."""


def philox(
    counter: tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int], key: tuple[int, int]
) -> list[Tensor]:
    """Four 32-bit words for each counter (int64 tensors of one shape, or ints), as int64 tensors."""
    c0, c1, c2, c3 = (c if isinstance(c, Tensor) else torch.tensor(c, device="cpu") for c in counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2^64, which leaves both halves of the 32x32-bit product right.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, low0 = (p0 >> 32) & _MASK, p0 & _MASK
        high1, low1 = (p1 >> 32) & _MASK, p1 & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return [c0, c1, c2, c3]


class CounterNoise:
    """Standard normal noise keyed by ``seed`` (0 .. 2^64-1), block and step."""

    def __init__(self, seed: int) -> None:
        self.seed = check_seed(seed)

    def fill(self, out: Tensor, block: int, step: int) -> None:
        """Fill float32 ``out`` (contiguous, any shape) in place, on its own device."""
        index = torch.arange((out.numel() + 3) // 4, device=out.device)
        words = philox((index, step, block & _MASK, block >> 32), (self.seed & _MASK, self.seed >> 32))
        # (word + 1/2) / 2^32 lies strictly between 0 and 1, so the logarithm is finite.
        uniform = [(word.double() + 0.5) / 2.0**32 for word in words]
        values = []
        for radius, turn in (uniform[:2], uniform[2:]):
            length, angle = torch.sqrt(-2.0 * torch.log(radius)), 2.0 * math.pi * turn
            values += [length * torch.cos(angle), length * torch.sin(angle)]
        out.copy_(torch.stack(values, dim=-1).flatten()[: out.numel()].view(out.shape))
