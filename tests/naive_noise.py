"""The counter-based noise once more, from its definition: one number at a time, in Python's own integers and floats."""

from __future__ import annotations

import math

LOW = 2**32 - 1


def naive_noise(seed: int, block: int, step: int, count: int) -> list[float]:
    """The first ``count`` standard normal numbers of a denoising step."""
    values: list[float] = []
    for index in range((count + 3) // 4):
        c = [index, step, block & LOW, block >> 32]
        key = [seed & LOW, seed >> 32]
        for _ in range(10):
            a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = [(b >> 32) ^ c[1] ^ key[0], b & LOW, (a >> 32) ^ c[3] ^ key[1], a & LOW]
            key = [(key[0] + 0x9E3779B9) & LOW, (key[1] + 0xBB67AE85) & LOW]
        u = [(word + 0.5) / 2**32 for word in c]
        for radius, turn in ((u[0], u[1]), (u[2], u[3])):
            length = math.sqrt(-2 * math.log(radius))
            values += [length * math.cos(2 * math.pi * turn), length * math.sin(2 * math.pi * turn)]
    return values[:count]
