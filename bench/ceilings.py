"""What this device reaches at best, measured in the same run as everything that is held against it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from echo_rt.bench.timing import Timer
from echo_rt.utils.wording import plain


@dataclass(frozen=True)
class Ceiling:
    """A measured rate: ``value`` in ``unit``, and the call that reached it."""

    name: str
    value: float
    unit: str
    median_us: float
    p99_us: float
    how: str


@dataclass(frozen=True)
class Probe:
    """Sizes of the two probes: bytes of each of the copy's buffers, and the side of the square matrices."""

    copy_bytes: int
    matrix_side: int


# On a GPU many times its cache, and matrices that fill it; on a CPU as little as will do to rehearse.
PROBES = {"cuda": Probe(2**31, 8192), "cpu": Probe(2**24, 256)}


def copy_rate(timer: Timer, device: torch.device, copied: int, iterations: int, warmup: int) -> Ceiling:
    """GB/s of a copy of ``copied`` bytes from one buffer to another, counting what is read and what is written."""
    # Whole numbers of 16 bytes, the widest access there is.
    source = torch.ones(max(1, copied // 16), 2, dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    times = timer.measure(lambda: target.copy_(source), iterations, warmup)
    moved = 2 * source.numel() * source.element_size()
    how = f"copy_ of {moved // 2} bytes, read + written"
    return Ceiling("copy", moved / times.median / 1e3, "GB/s", times.median, times.p99, how)


def product_rate(
    timer: Timer, device: torch.device, dtype: torch.dtype, side: int, iterations: int, warmup: int
) -> Ceiling:
    """TFLOP/s of a square matrix product of random values: zeros would draw less power and run faster."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    times = timer.measure(lambda: torch.mm(a, b, out=out), iterations, warmup)
    name = f"product {plain(dtype)}"
    how = f"torch.mm of two {side} x {side} matrices of normal values"
    return Ceiling(name, 2 * side**3 / times.median / 1e6, "TFLOP/s", times.median, times.p99, how)


def measure_ceilings(
    timer: Timer, device: torch.device, dtype: torch.dtype, iterations: int, warmup: int
) -> dict[str, Ceiling]:
    """Unit -> the ceiling in it: ``GB/s`` of a large copy, ``TFLOP/s`` of a large product in ``dtype``."""
    probe = PROBES[device.type]
    found = (
        copy_rate(timer, device, probe.copy_bytes, iterations, warmup),
        product_rate(timer, device, dtype, probe.matrix_side, iterations, warmup),
    )
    return {ceiling.unit: ceiling for ceiling in found}
