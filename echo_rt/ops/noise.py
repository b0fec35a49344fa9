"""Noise that depends on (seed, block, step, element) and on nothing else.

A counter-based generator (Philox 4x32 with 10 rounds; Salmon et al., SC 2011) has no state to carry. The integers are
exact on every device; the normal numbers come from Box-Muller in float64 and are rounded to float32 once. Block number
and seed may be tensors: then a captured graph makes new noise for each block it is replayed for.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox(
    counter: tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int], key: tuple[Tensor | int, Tensor | int]
) -> list[Tensor]:
    """Four 32-bit words for each counter, as int64 tensors; counter and key are ints or int64 tensors of any shape."""
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


def seed_words(seed: int) -> tuple[int, int]:
    """The low and the high 32 bits of ``seed`` (0 .. 2^64-1): the generator's key."""
    return seed & _MASK, seed >> 32


def fill_normal(out: Tensor, block: Tensor | int, step: int, key: tuple[Tensor | int, Tensor | int]) -> None:
    """Fill float32 ``out`` (contiguous, any shape) with the standard normal noise of ``step`` of ``block``.

    Elements 4i .. 4i+3 come from the counter (i, step, block's low word, block's high word). Scalar tensors must be
    int64 on the device of ``out``.
    """
    index = torch.arange((out.numel() + 3) // 4, device=out.device)
    words = philox((index, step, block & _MASK, block >> 32), key)
    # (word + 1/2) / 2^32 lies strictly between 0 and 1, so the logarithm is finite.
    uniform = [(word.double() + 0.5) / 2.0**32 for word in words]
    values = []
    for radius, turn in (uniform[:2], uniform[2:]):
        length, angle = torch.sqrt(-2.0 * torch.log(radius)), 2.0 * math.pi * turn
        values += [length * torch.cos(angle), length * torch.sin(angle)]
    out.copy_(torch.stack(values, dim=-1).flatten()[: out.numel()].view(out.shape))
