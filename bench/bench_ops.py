"""Time of the torch reference of each operation, on the CPU. On a shared one only ratios within one run mean anything.

make bench        or        pytest bench --benchmark-only
"""

from __future__ import annotations

import pytest
import torch
from cases import OPS, Sizes, make_case

from echo_rt.ops.backends import load_ops

# A latent frame of 64 tokens and Wan's head size: large enough that arithmetic, not the call, is what takes time.
SIZES = Sizes(frames=3, tokens=64, heads=2, head_dim=128, layers=4, vae=(12, 32, 32, 32))


@pytest.mark.parametrize("op", OPS)
def bench_op(benchmark, op: str) -> None:  # type: ignore[no-untyped-def]
    args = make_case(op, SIZES, torch.float32)
    function = getattr(load_ops("torch"), op)
    benchmark.group = op
    with torch.no_grad():
        benchmark(function, *args)
