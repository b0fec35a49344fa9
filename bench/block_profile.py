"""A block of the steady state, kernel by kernel: ``python bench/block_profile.py --out DIR``.

torch's profiler listens to a few replayed blocks at the released sizes with random weights. ``idle`` is the share of
the time from the first kernel to the last in which no kernel ran, gaps inside the graphs included. On a CPU the tiny
model's operators stand in place of kernels. Exit code 0 if kernels were seen, 1 if not, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import _checkout
from registers import short_name
from torch.profiler import DeviceType, ProfilerActivity, profile

from echo_rt.bench.run import Run
from echo_rt.bench.runner import BlockRunner, busy_seconds
from echo_rt.bench.settings import Request
from echo_rt.bench.tables import columns, environment
from echo_rt.ops.backends import BACKENDS
from echo_rt.options import DTYPE_NAMES
from echo_rt.utils.wording import counted

COLUMNS = columns("kernel|kernel", "calls|calls a block|g", "us|µs a block|.1f", "share|of all kernels|.1%")


Span = tuple[str, float, float]  # a kernel's run: name, begin and end in microseconds


def table(spans: Sequence[Span], blocks: int) -> list[dict[str, Any]]:
    """Kernels by their names, the one that takes most time first."""
    times: dict[str, list[float]] = defaultdict(list)
    for name, begin, end in spans:
        times[short_name(name)].append(end - begin)
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
        (event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        # On a CPU an operator's children are within it, and would count twice.
        if event.device_type == place and (on_gpu or event.cpu_parent is None)
    ]


def run(arguments: argparse.Namespace) -> tuple[bool, str]:
    """Make the block, listen and write; whether kernels were seen, of graphs where asked for, and the page."""
    asked = {name: getattr(arguments, name) for name in ("size", "device", "dtype", "backend")}
    setting = Run(Request(**asked, variants=("evolve",)))
    on_gpu, ahead, (entry,) = setting.on_gpu, setting.request.lookahead, setting.entries
    spans = setting.or_without_graphs(entry, lambda each: record(setting.ready(each), arguments.blocks, ahead, on_gpu))
    entry.release()
    failed = entry.graphs_failed and f"graphs failed in {entry.graphs_failed}"
    made = arguments.blocks + ahead
    if not spans:
        return False, "the profiler saw no kernel"
    begin, end = min(begin for _, begin, _ in spans), max(end for *_, end in spans)
    idle = 1 - busy_seconds((span[1:] for span in spans), begin, end) / (end - begin)
    notes = [
        f"{counted(made, 'block')}; {setting.model.source}; backend {setting.backend.name}; memory evolve; "
        f"{failed or ('graphs' if on_gpu else 'no graphs')}.",
        f"Idle: {idle:.2%} of {end - begin:.0f} µs.",
        *["A rehearsal on the CPU: operators in place of kernels."][on_gpu:],
    ]
    tables, title = {"Kernels": (table(spans, made), COLUMNS)}, "A replayed block, kernel by kernel"
    facts = {"passed": not failed, "idle": idle if on_gpu else None, "kernels_a_block": len(spans) / made}
    header = environment(str(setting.device))
    return not failed, _checkout.save(arguments.out, "block_profile", title, header, tables, notes, **facts)


def main(argv: Sequence[str]) -> int:
    parser = _checkout.parser(__doc__, dtypes=DTYPE_NAMES)
    parser.add_argument("--backend", choices=BACKENDS, help="default: cuda on a GPU, torch on a CPU")
    parser.add_argument("--blocks", type=int, default=3, help="profiled blocks; default: 3")
    return _checkout.run(__file__, run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
