"""What each exact saving gives at best: ``python bench/savings.py --out DIR`` writes savings.json and savings.md.

``--counts`` prints what is counted for an H200 at the released sizes and measures nothing (docs/savings.md). Exit code
0 if all was right and measured, 1 if not, 2 for arguments that cannot be had.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import _checkout  # noqa: F401
import torch
from roofline import measure_ceilings
from savings_counts import H200, PRODUCTS, Counts, Limits
from savings_probes import COLLAPSED, CUT_SHORT, MERGED, Comparison, Probes

from echo_rt.attention.backends import SPLITS
from echo_rt.bench.environment import environment
from echo_rt.bench.measure import take_turn
from echo_rt.bench.model import random_prompt
from echo_rt.bench.request import Request
from echo_rt.bench.rig import Parts, Rig, Site
from echo_rt.bench.settings import MODELS, RELEASED, turns_of
from echo_rt.bench.tables import Column, check_results_folder, markdown, write_results
from echo_rt.bench.timing import DEVICE_CLOCK, Sample, Timer, milliseconds, timer_for
from echo_rt.cli.arguments import parse_path
from echo_rt.cli.model_options import BACKEND_HELP
from echo_rt.errors import EchoError
from echo_rt.ops.backends import choose_backend
from echo_rt.options import MemoryMode
from echo_rt.utils.device import DTYPES, model_context, parse_device, parse_dtype, warn_of_faulty_convolutions
from echo_rt.utils.wording import counted, plain

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

    @classmethod
    def of(cls, saving: str, what: str, now: float, then: float, *, of: float, counted_ms: float) -> Row:
        """With what is saved, and its share ``of`` so many milliseconds."""
        return cls(saving, what, now, then, now - then, (now - then) / of, counted_ms)


@dataclass(frozen=True)
class Effort:
    """Rounds, and in each of them: blocks, calls of every probe, and calls before those."""

    rounds: int
    blocks: int
    calls: int
    warmup: int


@dataclass(frozen=True)
class Measured:
    """All that was found out; ``facts`` are further entries of the JSON."""

    header: dict[str, Any]
    rows: list[Row]
    facts: dict[str, Any]

    @property
    def passed(self) -> bool:
        return not any(row.problem for row in self.rows)


def counted_rows(counts: Counts, lengths: tuple[int, ...]) -> list[Row]:
    """The counts alone, where nothing is measured: shares are those of the transformer's counted time."""
    found = [(MERGED, f"product {name}", counts.merged_product(name)) for name in PRODUCTS]
    found += [
        (MERGED, "attention to the text", counts.merged_cross_attention()),
        (MERGED, "norms", counts.merged_rest()),
    ]
    for real in lengths:
        found.append((COLLAPSED, f"{real} + 1 keys, in a kernel", counts.collapsed(real, merged_outside=False)))
        found.append((COLLAPSED, f"{real} keys, merged outside", counts.collapsed(real, merged_outside=True)))
    found.append((CUT_SHORT, "last layer behind its keys", counts.cut_short()))
    found += [("attention in pieces", f"{pieces} pieces of the keys", counts.in_pieces(pieces)) for pieces in SPLITS]
    return [
        Row.of(saving, what, count.now, count.then, of=counts.transformer, counted_ms=count.saved)
        for saving, what, count in found
    ]


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
    block_ms = milliseconds(sample.whole)[0]
    facts = {
        "result": timer.clock == DEVICE_CLOCK,
        "block_ms": block_ms,
        "transformer_ms": milliseconds(sample.transformer)[0],
        "microseconds": times,
        "clock": timer.clock,
        "model": {"source": model.source, **model.config.to_flat()},
        "dtype": plain(dtype),
        "backend": backend.name,
        "backend_reason": backend.reason,
        "attention": [site.over_cache.attention.name, site.over_text.attention.name],
        "limits": asdict(limits),
        "effort": asdict(effort),
    }
    return Measured(header, _rows(comparisons, times, block_ms), facts)


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


def _rows(comparisons: list[Comparison], times: dict[str, list[float]], block_ms: float) -> list[Row]:
    """One for each comparison, and behind those of the merged pass their sum: such a pass would have all of them."""
    merged, others = [], []
    for each in comparisons:
        saving, what, counted = each.saving, each.what, each.count.saved
        if each.problem:
            others.append(Row(saving, what, None, None, None, None, counted, each.problem))
            continue
        now, then = (each.times * statistics.median(times[_key(each, side)]) / 1e3 for side in (_WITHOUT, _WITH))
        row = Row.of(saving, what, now, then, of=block_ms, counted_ms=counted)
        (merged if saving == MERGED else others).append(row)
    now, then, counted = (sum(getattr(row, name) for row in merged) for name in ("now_ms", "then_ms", "counted_ms"))
    return [*merged, Row.of(MERGED, "sum of its parts", now, then, of=block_ms, counted_ms=counted), *others]


def write(found: Measured, folder: Path) -> str:
    """``savings.json`` and ``savings.md``; returns the text of the latter. Raises ``OutputError``."""
    facts = found.facts
    effort, limits = facts["effort"], facts["limits"]
    notes = [] if facts["result"] else ["Times of the host clock on a CPU: a rehearsal, no results."]
    notes += [
        f"{facts['model']['source']}, {facts['dtype']}, backend {facts['backend']} "
        f"({facts['backend_reason']}); attention to the text: {facts['attention'][1]}. Clock: {facts['clock']}.",
        f"A whole block, made one at a time: {facts['block_ms']:.3f} ms, its transformer {facts['transformer_ms']:.3f} "
        f"ms (medians of {effort['rounds'] * effort['blocks']}); shares are of the former.",
        f"All take turns, in each of {counted(effort['rounds'], 'round')} {counted(effort['calls'], 'call')} each; a "
        "call is what a pass does of its kind, and is scaled to a block.",
        "Upper bounds: what a saving would cost elsewhere (docs/savings.md) is not in them.",
        f"Counted: at {limits['flops'] / 1e12:.4g} TFLOP/s and {limits['bytes'] / 1e12:.4g} TB/s, both measured in "
        f"this run, with {limits['multiprocessors']} multiprocessors; kernels beginning and ending are not counted.",
    ]
    title = "Exact savings" if facts["result"] else "Exact savings: a rehearsal on a CPU, no results"
    tables = {"Savings": (found.rows, COLUMNS)}
    return write_results(folder, "savings", title, found.header, tables, notes, passed=found.passed, **facts)


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
