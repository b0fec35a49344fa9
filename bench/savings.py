"""What each exact saving gives at best: ``python bench/savings.py --out DIR`` writes savings.json and savings.md.

``--counts`` prints what is counted for an H200 at the released sizes and measures nothing (docs/savings.md). Exit code
0 if all was right and measured, 1 if not, 2 for arguments that cannot be had.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _checkout  # noqa: F401
import torch
from roofline import measure_ceilings
from savings_counts import H200, PRODUCTS, Counts, Limits
from savings_probes import COLLAPSED, CUT_SHORT, MERGED, Comparison, Probes

from echo_rt.attention.pieces import PIECES
from echo_rt.bench.environment import environment
from echo_rt.bench.measure import take_turn
from echo_rt.bench.model import random_prompt
from echo_rt.bench.request import Request
from echo_rt.bench.rig import Parts, Rig, Site
from echo_rt.bench.settings import MODELS, RELEASED, turns_of
from echo_rt.bench.tables import Column, check_results_folder, markdown, write_results
from echo_rt.bench.timing import DEVICE_CLOCK, Sample, Timer, milliseconds, timer_for
from echo_rt.cli.model_options import BACKEND_HELP
from echo_rt.cli.paths import parse_path
from echo_rt.errors import EchoError
from echo_rt.ops.backends import choose_backend
from echo_rt.options import MemoryMode
from echo_rt.utils.device import DTYPES, model_context, parse_device, parse_dtype, warn_of_faulty_convolutions
from echo_rt.utils.wording import counted, plain

NAME = "savings"
COLUMNS = (
    Column("saving", "saving", text=True),
    Column("what", "of it", text=True),
    Column("now_ms", "without, ms", ".3f"),
    Column("then_ms", "with, ms", ".3f"),
    Column("saved_ms", "saved, ms", ".3f"),
    Column("share", "of a block", ".2%"),
    Column("counted_ms", "counted, ms", ".3f"),
    Column("problem", "", text=True),
)
_IN_PIECES = "attention in pieces"
_BLOCK = "a whole block"
_WITHOUT, _WITH = "without", "with"


@dataclass(frozen=True)
class Row:
    """Milliseconds a block, medians; None where nothing was measured. ``counted_ms`` is of what is saved."""

    saving: str
    what: str
    now_ms: float | None
    then_ms: float | None
    saved_ms: float | None
    share: float | None
    counted_ms: float
    problem: str = ""


@dataclass(frozen=True)
class Effort:
    """Rounds, and in each of them: blocks, calls of every probe, and calls before those."""

    rounds: int
    blocks: int
    calls: int
    warmup: int


@dataclass(frozen=True)
class Measured:
    """All that was found out."""

    header: dict[str, Any]
    rows: list[Row]
    block_ms: float
    transformer_ms: float
    microseconds: dict[str, list[float]]
    notes: list[str]
    facts: dict[str, Any]

    @property
    def passed(self) -> bool:
        return not any(row.problem for row in self.rows)


def counted_rows(counts: Counts, lengths: tuple[int, ...]) -> list[Row]:
    """The counts alone, where nothing is measured: shares are those of the transformer's counted time."""

    def row(saving: str, what: str, now: float, then: float) -> Row:
        return Row(saving, what, now, then, now - then, (now - then) / counts.transformer, now - then)

    merged = {f"product {name}": counts.merged_product(name) for name in PRODUCTS}
    merged |= {"attention to the text": counts.merged_cross_attention(), "norms": counts.merged_rest()}
    rows = [row(MERGED, what, count.now, count.then) for what, count in merged.items()]
    for real in lengths:
        for outside, what in ((False, f"{real} + 1 keys, in a kernel"), (True, f"{real} keys, merged outside")):
            count = counts.collapsed(real, merged_outside=outside)
            rows.append(row(COLLAPSED, what, count.now, count.then))
    short = counts.cut_short()
    rows.append(row(CUT_SHORT, "last layer behind its keys", short.now, short.then))
    for pieces in PIECES:
        count = counts.in_pieces(pieces)
        rows.append(row(_IN_PIECES, f"{pieces} pieces of the keys", count.now, count.then))
    return rows


def measure(request: Request, device: torch.device, timer: Timer, limits: Limits, effort: Effort) -> Measured:
    """Make a model as ``request`` says and measure; the counts are those of a GPU of these ``limits``.

    Raises :class:`ConfigError` and :class:`BackendError` for what cannot be had.
    """
    dtype = parse_dtype(request.dtype, device)
    choose_backend(request.backend, device)  # one that was named is refused before the weights are there
    model = request.load(device)
    backend = choose_backend(request.backend, device, memory=(dtype, model.config.transformer.head_dim))
    ops = backend.ops
    warn_of_faulty_convolutions(device, dtype)
    site = Site.choose(model, device, dtype, ops, request.attention)
    parts, counts = Parts(site, ops), Counts(model.config, limits)
    rig = Rig(parts, MemoryMode.EVOLVE, graphs=None, depth=1)
    try:
        rig.start(random_prompt(model.config.transformer, device, request.seed), request.seed)
        rig.warm_up()
        header = environment(str(device))  # now, while the clocks are those of a device at work
        with model_context(device, dtype):
            comparisons = Probes(parts, rig, counts, request.seed).comparisons()
            sample, times = _in_turns(rig, comparisons, timer, effort)
    finally:
        rig.close()
    block_ms, transformer_ms = milliseconds(sample.whole)[0], milliseconds(sample.transformer)[0]
    rows = _with_sum([_row(each, times, block_ms) for each in comparisons], block_ms)
    facts = {
        "clock": timer.clock,
        "model": {"source": model.source, **model.config.to_flat()},
        "dtype": plain(dtype),
        "backend": backend.name,
        "backend_reason": backend.reason,
        "attention": [site.over_cache.attention.name, site.over_text.attention.name],
        "limits": {"flops": limits.flops, "bytes": limits.bytes, "multiprocessors": limits.multiprocessors},
        "effort": {"rounds": effort.rounds, "blocks": effort.blocks, "calls": effort.calls, "warmup": effort.warmup},
    }
    notes = _notes(facts, effort, limits, block_ms, transformer_ms)
    return Measured(header, rows, block_ms, transformer_ms, times, notes, facts)


def _in_turns(
    rig: Rig, comparisons: list[Comparison], timer: Timer, effort: Effort
) -> tuple[Sample, dict[str, list[float]]]:
    """Blocks, and microseconds of every call by name, another one first in each round."""
    right = [each for each in comparisons if not each.problem]
    calls = {_key(each, _WITHOUT): each.now for each in right} | {_key(each, _WITH): each.then for each in right}
    sample, times = Sample(), {name: list[float]() for name in calls}
    for number in range(effort.rounds):
        for name in turns_of(number, [_BLOCK, *calls]):
            if name == _BLOCK:
                take_turn(rig, 0, effort.blocks, sample, lambda: None)
            else:
                times[name] += timer.measure(calls[name], effort.calls, effort.warmup).microseconds
    return sample, times


def _key(comparison: Comparison, side: str) -> str:
    return f"{comparison.saving}: {comparison.what}, {side}"


def _row(each: Comparison, times: dict[str, list[float]], block_ms: float) -> Row:
    if each.problem:
        return Row(each.saving, each.what, None, None, None, None, each.count.saved, each.problem)
    now, then = (each.times * milliseconds([t / 1e6 for t in times[_key(each, side)]])[0] for side in (_WITHOUT, _WITH))
    return Row(each.saving, each.what, now, then, now - then, (now - then) / block_ms, each.count.saved)


def _with_sum(rows: list[Row], block_ms: float) -> list[Row]:
    """The rows, behind those of the merged pass their sum: such a pass would have all of them."""
    parts = [row for row in rows if row.saving == MERGED]
    now, then = (sum(getattr(row, name) for row in parts) for name in ("now_ms", "then_ms"))
    counted = sum(row.counted_ms for row in parts)
    whole = Row(MERGED, "sum of its parts", now, then, now - then, (now - then) / block_ms, counted)
    return [*parts, whole, *(row for row in rows if row not in parts)]


def _notes(facts: dict[str, Any], effort: Effort, limits: Limits, block_ms: float, transformer_ms: float) -> list[str]:
    rehearsal = "Times of the host clock on a CPU: a rehearsal, no results."
    return [
        *([] if facts["clock"] == DEVICE_CLOCK else [rehearsal]),
        f"{facts['model']['source']}, {facts['dtype']}, backend {facts['backend']} "
        f"({facts['backend_reason']}); attention to the text: {facts['attention'][1]}. Clock: {facts['clock']}.",
        f"A whole block, made one at a time: {block_ms:.3f} ms, its transformer {transformer_ms:.3f} ms (medians of "
        f"{effort.rounds * effort.blocks}); shares are of the former.",
        f"All take turns, in each of {counted(effort.rounds, 'round')} {counted(effort.calls, 'call')} each; a call is "
        "what a pass does of its kind, and is scaled to a block.",
        "Upper bounds: what a saving would cost elsewhere (docs/savings.md) is not in them.",
        f"Counted: at {limits.flops / 1e12:.4g} TFLOP/s and {limits.bytes / 1e12:.4g} TB/s, both measured in this run, "
        f"with {limits.multiprocessors} multiprocessors; kernels beginning and ending are not counted.",
    ]


def write(found: Measured, folder: Path) -> str:
    """``savings.json`` and ``savings.md``; returns the text of the latter. Raises ``OutputError``."""
    result = found.facts["clock"] == DEVICE_CLOCK
    return write_results(
        folder,
        NAME,
        "Exact savings" if result else "Exact savings: a rehearsal on a CPU, no results",
        found.header,
        {"Savings": (found.rows, COLUMNS)},
        found.notes,
        passed=found.passed,
        result=result,
        block_ms=found.block_ms,
        transformer_ms=found.transformer_ms,
        microseconds=found.microseconds,
        **found.facts,
    )


# By device, quick or not.
_EFFORTS = {
    ("cuda", False): Effort(rounds=5, blocks=5, calls=5, warmup=2),
    ("cuda", True): Effort(rounds=2, blocks=3, calls=3, warmup=1),
    ("cpu", False): Effort(rounds=2, blocks=2, calls=2, warmup=0),
    ("cpu", True): Effort(rounds=1, blocks=1, calls=1, warmup=0),
}
# Calls that a ceiling is the median of.
_CEILING_CALLS = {"cuda": 20, "cpu": 3}


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=parse_path, metavar="DIR", help="folder for the results")
    what.add_argument("--counts", action="store_true", help="print the counts alone")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu (a rehearsal); default: cuda")
    parser.add_argument("--size", choices=MODELS, help="default: released on a GPU, tiny on a CPU")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--backend", help=BACKEND_HELP)
    parser.add_argument("--attention", metavar="NAME", help="default: the fastest")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and calls")
    return parser.parse_args(argv)


def _limits(timer: Timer, device: torch.device, dtype: torch.dtype) -> Limits:
    """Of this device, now. On a CPU what is counted is arithmetic without a meaning."""
    found = measure_ceilings(timer, device, dtype, _CEILING_CALLS[device.type], warmup=1)
    cores = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return Limits(1e12 * found["TFLOP/s"].value, 1e9 * found["GB/s"].value, cores)


def main(argv: Sequence[str]) -> int:
    arguments = _arguments(argv)
    if arguments.counts:
        text = RELEASED.config.transformer.text_len
        rows = counted_rows(Counts(RELEASED.config, H200), (text // 16, text // 4, text // 2))
        print(markdown(rows, [column for column in COLUMNS if column.key not in ("counted_ms", "problem")]), end="")
        return 0
    try:
        check_results_folder(arguments.out)
        device = parse_device(arguments.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # events are recorded on the current one
        names = ("size", "dtype", "backend", "attention")
        request = Request(device=str(device), **{name: getattr(arguments, name) for name in names})
        timer = timer_for(device)
        limits = _limits(timer, device, parse_dtype(arguments.dtype, device))
        found = measure(request, device, timer, limits, _EFFORTS[device.type, arguments.quick])
        print(write(found, arguments.out))
    except EchoError as error:
        print(f"savings.py: {error}", file=sys.stderr)
        return 2
    return 0 if found.passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
