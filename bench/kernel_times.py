"""Every kernel at the sizes of a model: ``python bench/kernel_times.py --out DIR`` writes kernel_times.json and .md.

Exit code 0 if every result was right and every kernel was timed, 1 if not, 2 for arguments that cannot be had. An unmet
goal is a number like any other: it is printed, and is no failure.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _checkout  # noqa: F401
import torch
from op_inputs import OPS, variants
from op_times import Row, Run, time_memory_update, time_variant
from roofline import Ceiling, measure_ceilings

from echo_rt.bench.environment import environment
from echo_rt.bench.settings import MODELS, RELEASED, TINY
from echo_rt.bench.tables import Column, check_results_folder, write_results
from echo_rt.bench.timing import DEVICE_CLOCK, timer_for
from echo_rt.cli.arguments import parse_path
from echo_rt.errors import ConfigError, EchoError
from echo_rt.ops.backends import BACKENDS, check_device, load_ops
from echo_rt.utils.device import DTYPES, parse_device
from echo_rt.utils.wording import counted, plain

MEMORY_UPDATE = "memory_update"
# Timed calls and calls before them: quick or not, by device.
_COUNTS = {("cuda", False): (200, 20), ("cuda", True): (50, 5), ("cpu", False): (10, 1), ("cpu", True): (3, 0)}

COLUMNS = (
    Column("op", "operation", text=True),
    Column("variant", "call", text=True),
    Column("calls", "calls a block"),
    Column("median_us", "µs", ".1f"),
    Column("p99_us", "p99", ".1f"),
    Column("rate", "rate", ".1f"),
    Column("unit", "", text=True),
    Column("share", "of ceiling", ".0%"),
    Column("copy_share", "of a copy", ".0%"),
    Column("torch_ratio", "x torch", ".2f"),
    Column("library_ratio", "x library", ".2f"),
    Column("library", "best library call", text=True),
    Column("error", "error", ".1e"),
    Column("verdict", "goals", text=True),
)
CEILING_COLUMNS = (
    Column("name", "ceiling", text=True),
    Column("value", "rate", ".1f"),
    Column("unit", "", text=True),
    Column("median_us", "µs", ".1f"),
    Column("p99_us", "p99", ".1f"),
    Column("how", "measured by", text=True),
)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=parse_path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu; default: cuda")
    parser.add_argument("--size", choices=MODELS, help="default: released on a GPU, tiny on a CPU")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    parser.add_argument("--backend", choices=BACKENDS, help="default: cuda on a GPU, emulated on a CPU")
    parser.add_argument("--op", action="append", choices=[*OPS, MEMORY_UPDATE], help="only this one; may be repeated")
    parser.add_argument("--quick", action="store_true", help="fewer calls, and no torch.compile beside them")
    parser.add_argument("--iterations", type=int, help="timed calls of each")
    return parser.parse_args(argv)


def _run(arguments: argparse.Namespace) -> Run:
    device = parse_device(arguments.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events are recorded on the current one
    ops = load_ops(arguments.backend or {"cuda": "cuda", "cpu": "emulated"}[device.type])
    check_device(ops, device)
    iterations, warmup = _COUNTS[device.type, arguments.quick]
    if arguments.iterations is not None:
        iterations = arguments.iterations
    if iterations < 1:
        raise ConfigError(f"--iterations must be at least 1, got {iterations}")
    # On a CPU the emulation of one kernel at the released sizes takes minutes: only who asks for it has to wait.
    size = arguments.size or {"cuda": RELEASED, "cpu": TINY}[device.type].name
    model, dtype = MODELS[size], DTYPES[arguments.dtype]
    timer = timer_for(device)
    found = measure_ceilings(timer, device, dtype, iterations, warmup)
    # Judged is what the goals speak of: the released sizes, timed by a GPU.
    judged = timer.clock == DEVICE_CLOCK and model is RELEASED
    compiled = device.type == "cuda" and not arguments.quick
    return Run(device, dtype, ops, model, timer, iterations, warmup, found, judged, compiled)


def _notes(run: Run, rows: list[Row]) -> list[str]:
    notes = [
        f"{counted(run.iterations, 'call')} each after {run.warmup}; clock: {run.timer.clock}; backend {run.ops.name}, "
        f"{plain(run.dtype)}, sizes: {run.model.name}.",
    ]
    if not run.judged:
        notes.append("A rehearsal: goals are judged on a GPU at the released sizes alone.")
    if not run.compiled:
        notes.append("torch.compile was not among the libraries.")
    for row in rows:
        where = f"{row.op} {row.variant}".strip()
        notes += [f"{where}: {problem}" for problem in row.problems]
        notes += [f"{where}: {name} did not run: {why}" for name, why in row.absent.items()]
    return notes


def main(argv: Sequence[str]) -> int:
    arguments = _arguments(argv)
    try:
        check_results_folder(arguments.out)
        run = _run(arguments)
    except EchoError as error:
        print(f"kernel_times.py: {error}", file=sys.stderr)
        return 2
    header = environment(str(run.device))  # now, while the clocks are those of a device at work
    rows: list[Row] = []
    text = ""
    chosen = arguments.op or [*OPS, MEMORY_UPDATE]
    try:
        for op in chosen:
            with torch.inference_mode():
                if op == MEMORY_UPDATE:
                    rows.append(time_memory_update(run))
                else:
                    rows += [time_variant(run, variant) for variant in variants(op, run.model)]
            print(f"{op}: {', '.join(row.verdict for row in rows if row.op == op)}", file=sys.stderr, flush=True)
            # After each, as the time may run out; what has not all been run has not passed.
            text = _save(arguments.out, run, header, rows, op == chosen[-1] and all(row.ok for row in rows))
    except EchoError as error:
        print(f"kernel_times.py: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0 if all(row.ok for row in rows) else 1


def _save(out: Path, run: Run, header: dict[str, Any], rows: list[Row], passed: bool) -> str:
    ceilings: list[Ceiling] = list(run.ceilings.values())
    return write_results(
        out,
        "kernel_times",
        "Kernels",
        header,
        {"Ceilings": (ceilings, CEILING_COLUMNS), "Kernels": (rows, COLUMNS)},
        _notes(run, rows),
        passed=passed,
        goals_met=sum(goal["met"] is True for row in rows for goal in row.goals),
        goals_unmet=[f"{row.op} {row.variant}: {g['goal']}" for row in rows for g in row.goals if g["met"] is False],
        iterations=run.iterations,
        warmup=run.warmup,
        clock=run.timer.clock,
        backend=run.ops.name,
        dtype=plain(run.dtype),
        model=run.model.config.to_flat(),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
