"""Times on the CPU: the torch reference of each operation, and a whole steady block of the tiny model.

make bench        or        pytest bench --benchmark-only

On a shared CPU only ratios within one run mean anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import _checkout  # noqa: F401
import pytest
import torch
from cases import OPS, Sizes, make_case

import echo_rt
from echo_rt.ops.backends import load_ops
from echo_rt.weights.tiny_model import CHECKPOINT_FILE, write_tiny_model

# A latent frame of 64 tokens and Wan's head size: large enough that arithmetic, not the call, is what takes time.
SIZES = Sizes(frames=3, tokens=64, heads=2, head_dim=128, layers=4, vae=(12, 32, 32, 32))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "tiny"
    write_tiny_model(folder)
    return folder


@pytest.fixture(params=["evolve", "prior", "off"])
def steady_stream(request: pytest.FixtureRequest, tiny: Path) -> Iterator[echo_rt.Stream]:
    """A stream whose window is full and whose ids have saturated."""
    facts = {"checkpoint": tiny / CHECKPOINT_FILE, "device": "cpu", "memory": request.param}
    with echo_rt.Runtime.from_pretrained(tiny, **facts) as runtime:
        stream = runtime.stream("a red fox in the snow")
        while next(stream).stats.shift == 0:
            pass
        yield stream


@pytest.mark.parametrize("op", OPS)
def bench_op(benchmark, op: str) -> None:  # type: ignore[no-untyped-def]
    args = make_case(op, SIZES, torch.float32)
    benchmark.group = op
    with torch.no_grad():
        benchmark(getattr(load_ops("torch"), op), *args)


def bench_block(benchmark, steady_stream: echo_rt.Stream) -> None:  # type: ignore[no-untyped-def]
    benchmark.group = "block"
    assert benchmark(next, steady_stream).stats.shift > 0
