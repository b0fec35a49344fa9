"""The host's own work on a block of the released size, and whether blocks grow with the video: from ``make bench``."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from unittest.mock import Mock

import _checkout  # noqa: F401
import pytest
import torch

from echo_rt.bench.run import Run
from echo_rt.bench.runner import BlockRunner
from echo_rt.bench.settings import RELEASED, Request
from echo_rt.engine.executor import Event
from echo_rt.engine.pipeline import _nonfinite, frames_shape
from echo_rt.ops.backends import load_ops
from echo_rt.soak.interval import _HASHER, Figures, digest

BLOCK_SECONDS = 0.2  # of the released size on an H200: the shortest that is a goal (docs/speed.md)
OLD = 1100  # blocks of a video that is compared with a new one
MOST_GROWTH = 1.1  # of a block's time, whose median varies by some percent on a shared CPU
HOST = ("submit", "copy", "soak", "digest", "frames_to_uint8", "range", "nonfinite")


def steady_video() -> BlockRunner:
    """The tiny model's, in its steady state."""
    request = Request(device="cpu", dtype="float32", backend="torch", lookahead=0, variants=("evolve",))
    run = Run(request)
    return run.ready(run.entries[0])


def host_work() -> dict[str, Callable[[], object]]:
    """The host's work on a block of the released size, by the names of :data:`HOST`.

    With a GPU the thread that makes blocks does the first three (``submit`` without what the stages do), another one
    the digest, the device the rest.
    """
    runner, ops, done = steady_video(), load_ops("torch"), Event()
    pipeline, runner.executor.spans = runner.pipeline, None
    slot = copy.copy(pipeline._slots[0])
    runner.executor.run = Mock(return_value=done)  # type: ignore[method-assign]
    video = torch.zeros(frames_shape(RELEASED.config, RELEASED.vae))
    slot.frames, slot.count = video.to(torch.uint8), len(video)
    slot.latents = torch.zeros(RELEASED.config.window.frames_per_block, *RELEASED.config.latent_shape)
    chunk, pixels = slot.read(), slot.frames.clone()
    figures = Figures(RELEASED.config, {}, block=0, frame=0, hash_every=1)

    def submit() -> None:
        pipeline.begin()
        pipeline.finish()

    return {
        "submit": submit,
        "copy": slot.read,
        "soak": lambda: figures.add(chunk, 0.4, warm=True, switching=False),
        "digest": lambda: digest(chunk),
        "frames_to_uint8": lambda: ops.frames_to_uint8(video, pixels),
        "range": lambda: torch.aminmax(video),
        "nonfinite": lambda: _nonfinite(video),
    }


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


def bench_growth(benchmark) -> None:  # type: ignore[no-untyped-def]
    """A block late in a video takes as long as one of a new video: their times, each in its turn."""
    new, old, times = steady_video(), steady_video(), list[float]()
    for _ in range(2 if benchmark.disabled else OLD):
        old.block(0)

    def make_new() -> None:
        begun = time.perf_counter()
        new.block(0)
        times.append(time.perf_counter() - begun)

    benchmark.pedantic(old.block, args=(0,), setup=make_new, rounds=100, warmup_rounds=1)
    if not benchmark.disabled:
        growth = benchmark.extra_info["of a new video's"] = benchmark.stats.stats.median / statistics.median(times)
        assert growth < MOST_GROWTH
