"""Times on the CPU: the torch reference of each operation, a steady block of the tiny model, and the host's own work.

make bench        or        pytest bench --benchmark-only

On a shared CPU only ratios within one run mean anything.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import _checkout
import pytest
import torch
from cases import OPS, Sizes, make_case

import echo_rt
from echo_rt.bench.run import BlockRunner, open_model
from echo_rt.bench.settings import Request
from echo_rt.engine.executor import Event
from echo_rt.engine.pipeline import _nonfinite, frames_shape
from echo_rt.ops.backends import load_ops
from echo_rt.options import MemoryMode
from echo_rt.soak.interval import _HASHER, Figures, digest
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


BLOCK_SECONDS = 0.38  # of the released size, as predicted for an H200 (docs/speed.md)
HOST = ("submit", "copy", "soak", "digest", "frames_to_uint8", "range", "nonfinite")


def host_work() -> dict[str, Callable[[], object]]:
    """The host's work on a block of the released size, by the names of :data:`HOST`.

    With a GPU the thread that makes blocks does the first three (``submit`` without what the stages do), another one
    the digest, the device the rest.
    """
    cpu, released, ops, done = torch.device("cpu"), _checkout.RELEASED, load_ops("torch"), Event()
    request = Request(device=cpu, dtype="float32", backend="torch", lookahead=0)
    model = open_model(request, cpu)
    runner = BlockRunner(model.networks(ops, request), MemoryMode.EVOLVE, graphs=None, depth=1)
    runner.start(model.random_prompt(cpu, 0), 0)
    runner.block(0)
    pipeline, runner.executor.spans = runner.pipeline, None
    slot = copy.copy(pipeline._slots[0])
    runner.executor.run = Mock(return_value=done)  # type: ignore[method-assign]
    video = torch.zeros(frames_shape(released.config, released.vae))
    slot.frames, slot.count = video.to(torch.uint8), len(video)
    slot.latents = torch.zeros(released.config.window.frames_per_block, *released.config.latent_shape)
    chunk, pixels = slot.read(), slot.frames.clone()
    figures = Figures(released.config, {}, block=0, frame=0, hash_every=1)
    calls = (
        lambda: (pipeline.begin(), pipeline.finish()),
        slot.read,
        lambda: figures.add(chunk, 0.4, warm=True, switching=False),
        lambda: digest(chunk),
        lambda: ops.frames_to_uint8(video, pixels),
        lambda: torch.aminmax(video),
        lambda: _nonfinite(video),
    )
    return dict(zip(HOST, calls, strict=True))


@pytest.mark.parametrize("what", HOST)
def bench_host(benchmark, what: str) -> None:  # type: ignore[no-untyped-def]
    """At most 1 % of a block on the thread that makes blocks, and the hash is made before the next block is."""
    benchmark.group, threads = "host", torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        benchmark.pedantic(host_work()[what], rounds=20, warmup_rounds=1)
    torch.set_num_threads(threads)
    _HASHER.submit(int).result()  # what is hashed in the background has ended
    if benchmark.disabled:
        return  # it has run once, without times
    share = benchmark.stats.stats.min / BLOCK_SECONDS  # the least: other programs use the cores
    benchmark.extra_info["of a block"] = share
    assert share < (0.01 if HOST.index(what) < 3 else 1)
