"""A block of the steady state, kernel by kernel: ``python bench/block_profile.py --out DIR``.

torch's profiler listens to a few replayed blocks at the released sizes with random weights. ``idle`` is the share of
the time from the first kernel to the last in which no kernel ran, gaps inside the graphs included. On a CPU the tiny
model's operators stand in place of kernels. Exit code 0 if kernels were seen, 1 if not, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import _checkout
import torch
from registers import short_name
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from echo_rt.bench.run import BlockRunner, busy_seconds, open_model
from echo_rt.bench.settings import Request
from echo_rt.bench.tables import columns, environment
from echo_rt.errors import CaptureError
from echo_rt.ops.backends import BACKENDS, choose_backend
from echo_rt.options import DTYPE_NAMES, MemoryMode
from echo_rt.utils.device import parse_device, parse_dtype, working_dtype
from echo_rt.utils.wording import counted

COLUMNS = columns("kernel|kernel", "calls|calls a block|g", "us|µs a block|.1f", "share|of all kernels|.1%")


class Span(NamedTuple):
    """A kernel's run: name, begin and end in microseconds."""

    name: str
    begin: float
    end: float


def table(spans: Sequence[Span], blocks: int) -> list[dict[str, Any]]:
    """Kernels by their names, the one that takes most time first."""
    times: dict[str, list[float]] = {}
    for span in spans:
        times.setdefault(short_name(span.name), []).append(span.end - span.begin)
    whole = sum(map(sum, times.values()))
    rows = [
        {"kernel": name, "calls": len(each) / blocks, "us": sum(each) / blocks, "share": sum(each) / whole}
        for name, each in times.items()
    ]
    return sorted(rows, key=lambda row: row["us"], reverse=True)


def record(runner: BlockRunner, blocks: int, lookahead: int, on_gpu: bool) -> list[Span]:
    """What ran while ``runner``, idle before and after, made ``blocks`` blocks and ``lookahead`` more begun ahead."""
    activity, place = (ProfilerActivity.CUDA, DeviceType.CUDA) if on_gpu else (ProfilerActivity.CPU, DeviceType.CPU)
    with profile(activities=[activity]) as profiler:
        for _ in range(blocks):
            runner.block(lookahead)
        runner.drain()
    return [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        # On a CPU an operator's children are within it, and would count twice.
        if event.device_type == place and (on_gpu or event.cpu_parent is None)
    ]


def run(arguments: argparse.Namespace) -> tuple[bool, str]:
    """Make the block, listen and write; whether kernels were seen, of graphs where asked for, and the page."""
    device = parse_device(arguments.device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    dtype = parse_dtype(arguments.dtype, device)
    request = Request(size=arguments.size, device=device, dtype=arguments.dtype, backend=arguments.backend)
    model = open_model(request, device)
    memory = (working_dtype(dtype), model.config.transformer.head_dim) if arguments.memory == "evolve" else None
    ops = choose_backend(request.backend, device, memory=memory).ops
    networks, mode, depth = model.networks(ops, request), MemoryMode(arguments.memory), 1 + request.lookahead

    def listen(graphs: bool) -> list[Span]:
        runner = BlockRunner(networks, mode, graphs=None if graphs else False, depth=depth)
        try:
            runner.start(model.random_prompt(device, 0), 0)
            runner.warm_up()
            return record(runner, arguments.blocks, request.lookahead, on_gpu)
        finally:
            runner.close()

    failed = ""
    try:
        spans = listen(arguments.graphs)
    except CaptureError as error:
        failed = f"graphs failed in {error.stage}: {error.cause}"
    if failed:  # the error is gone, and what its frames held with it
        spans = listen(graphs=False)
    made = arguments.blocks + request.lookahead
    if not spans:
        return False, "the profiler saw no kernel"
    begin, end = min(span.begin for span in spans), max(span.end for span in spans)
    idle = 1 - busy_seconds(((span.begin, span.end) for span in spans), begin, end) / (end - begin)
    notes = [
        f"{counted(made, 'block')}; {model.source}; backend {ops.name}; memory {arguments.memory}; "
        f"{'graphs' if arguments.graphs and on_gpu and not failed else failed or 'no graphs'}.",
        f"Idle: {idle:.2%} of {end - begin:.0f} µs.",
    ]
    if not on_gpu:
        notes.append("A rehearsal on the CPU: operators in place of kernels.")
    tables = {"Kernels": (table(spans, made), COLUMNS)}
    text = _checkout.save(
        arguments.out,
        "block_profile",
        "A replayed block, kernel by kernel",
        environment(str(device)),
        tables,
        notes,
        passed=not failed,
        idle=idle if on_gpu else None,
        kernels_a_block=len(spans) / made,
    )
    return not failed, text


def main(argv: Sequence[str]) -> int:
    parser = _checkout.parser(__doc__, dtypes=DTYPE_NAMES)
    parser.add_argument("--backend", choices=BACKENDS, help="default: cuda on a GPU, torch on a CPU")
    modes = [mode.value for mode in MemoryMode]
    parser.add_argument("--memory", choices=modes, default="evolve", help="default: evolve")
    parser.add_argument("--blocks", type=int, default=3, help="profiled blocks; default: 3")
    parser.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=True, help="replay what repeats")
    return _checkout.run(__file__, run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
