"""Time of a whole block of the tiny model in the steady state: transformer, memory update and VAE decode."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import echo_rt
from echo_rt.weights.tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "tiny"
    write_tiny_model(folder)
    return folder


@pytest.fixture(params=["evolve", "prior", "off"])
def steady_stream(request: pytest.FixtureRequest, tiny: Path) -> Iterator[echo_rt.Stream]:
    """A stream whose window is full and whose ids have saturated."""
    with echo_rt.Runtime.from_pretrained(
        tiny, checkpoint=tiny / "echo_infinity.pt", device="cpu", memory=request.param
    ) as runtime:
        stream = runtime.stream("a red fox in the snow")
        while next(stream).stats.shift == 0:
            pass
        yield stream


def bench_block(benchmark, steady_stream: echo_rt.Stream) -> None:  # type: ignore[no-untyped-def]
    benchmark.group = "block"
    chunk = benchmark(next, steady_stream)
    assert chunk.stats.shift > 0
