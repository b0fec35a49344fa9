"""The table of a GPU check, and what it lacks: ``python bench/gpu_table.py FOLDER`` reads what bench/gpu.sh left.

FOLDER is the unpacked archive, or a folder of ``bench/results``. Goals are those of the performance page of the
specification, for one H200 at 832x480, predictions those of docs/speed.md. Exit code 0 if every step passed and every
figure is there, 1 if not, 2 for a folder that is none.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import mul
from pathlib import Path
from statistics import fmean
from typing import Any

import _checkout  # noqa: F401

from echo_rt.bench.tables import columns, markdown, summary_line

_STEPS = columns("step|step", "state|state", "seconds|seconds|", "limit|limit|", "note|note")
_FIGURES = columns(
    "what|figure", "measured|measured", "goal|goal", "verdict|verdict", "predicted|predicted", "others|others report"
)


class Results:
    """The steps of a check, and what each of them wrote; ``LookupError`` for a figure that is not there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with (folder / "steps.tsv").open(encoding="utf-8", newline="") as file:
            self.steps = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))

    @property
    def header(self) -> dict[str, Any]:
        """The machine; the block's own header, if there is one, as it was read while the clocks were up."""
        header: dict[str, Any] = self.read("block", "block").get("environment") or self.read("machine", "environment")
        return header

    def state(self, step: str) -> str:
        """What became of the step: ``not reached`` where it has not ended."""
        return next((row["state"] for row in self.steps if row["step"] == step), "not reached")

    def read(self, step: str, name: str) -> dict[str, Any]:
        """What the step wrote as ``name``; empty where it did not."""
        path = self._folder / step / f"{name}.json"
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return content

    def rows(self, step: str, name: str, table: str, **keys: Any) -> list[dict[str, Any]]:
        """The rows of a table that have these values."""
        rows = self.read(step, name).get("tables", {}).get(table, [])
        return [row for row in rows if all(row[key] == value for key, value in keys.items())]

    def column(self, key: str, *place: str, **keys: Any) -> list[float]:
        """``key`` of all such rows; there is at least one, and each has it."""
        values = [row[key] for row in self.rows(*place, **keys)]
        if not values or None in values:
            raise LookupError(key)
        return values

    def part(self, step: str, variant: str, part: str, key: str = "ms") -> float:
        """A figure of a part of a block; ``part`` is how its name begins."""
        rows = self.rows(step, "block", "Block", variant=variant)
        return [float(row[key]) for row in rows if row["part"].startswith(part) and row[key] is not None][-1]

    def whole(self, key: str = "ms") -> float:
        """A figure of a whole block."""
        return self.part("block", "evolve", "whole", key)

    def ceiling(self, unit: str) -> float:
        return self.column("value", "kernels", "kernel_times", "Ceilings", unit=unit)[0]

    def attention(self, place: str = "Attention", *, float8: bool) -> float:
        """TFLOP/s of the fastest attention; ``place``: its table."""
        rows = self.rows("attention", "attention", place)
        rates = [r["tflops"] for r in rows if r["dtype"].startswith("float8") == float8 and r["tflops"] is not None]
        return float(sorted(rates)[-1])

    def convolutions(self) -> float:
        """TFLOP/s of all calls of a block together."""
        place, op = ("kernels", "kernel_times", "Kernels"), "causal_conv_hopper"
        calls, flops, us = (self.column(key, *place, op=op) for key in ("calls", "flops", "median_us"))
        return float(sum(map(mul, calls, flops)) / sum(map(mul, calls, us))) / 1e6

    def golden(self) -> float:
        """Nothing, where not all of them have run."""
        if self.state("golden") not in ("passed", "failed"):
            raise LookupError("golden")
        return 100 * fmean(self.column("ok", "golden", "golden", "Bundles"))


def found(find: Callable[..., float], *given: Any) -> float | None:
    """``find(*given)`` of what a check left; None where the check did not come to it."""
    try:
        return find(*given)
    except (LookupError, TypeError, ZeroDivisionError):  # the second of a None, as a rehearsal has them
        return None


@dataclass(frozen=True)
class Figure:
    """A number that a check is for: how it is found, its goal, what was predicted, what others report."""

    what: str
    find: Callable[[Results], float]
    unit: str
    step: str
    goal: str = ""
    met: Callable[[float], bool] | None = None
    predicted: str = ""
    others: str = ""

    def row(self, results: Results, *, judged: bool) -> dict[str, str]:
        """Its line of the table; ``judged``: whether it is held against its goal."""
        value, verdict = found(self.find, results), ""
        if judged and self.met is not None:
            verdict = "open" if value is None else "met" if self.met(value) else "unmet"
        measured = "missing" if value is None else f"{value:.4g} {self.unit}".strip()
        own = {name: getattr(self, name) for name in ("what", "goal", "predicted", "others")}
        return {**own, "measured": measured, "verdict": verdict}


_PAPER = "the paper, H100: "
_PEERS = "649; with a tiny VAE FlashDreams 344, Self-Forcing 432, FastVideo 511"
_KERNELS = ("kernels", "kernel_times", "Kernels")
FIGURES = (
    Figure("golden bundles as expected", Results.golden, "%", "golden", "all", lambda v: v == 100),
    Figure("whole block, bfloat16", Results.whole, "ms", "block", "at most 400, then 324", lambda v: v <= 400, "360",
           _PAPER + _PEERS),
    Figure("video frames a second", lambda r: r.whole("fps"), "", "block", "30, then 37", lambda v: v >= 30, "33",
           _PAPER + "18.5"),
    Figure("p99 over median", lambda r: r.whole("p99_ms") / r.whole(), "", "block", "at most 1.05 over an hour",
           lambda v: v <= 1.05),
    Figure("transformer, all passes", lambda r: r.part("block", "evolve", "transformer"), "ms", "block",
           predicted="286"),
    Figure("VAE decode, in the block", lambda r: r.part("block", "evolve", "VAE"), "ms", "block", predicted="86"),
    Figure("VAE decode, alone", lambda r: r.column("ms", "vae", "vae", "Decoders", decoder="echo-rt")[0], "ms", "vae",
           "at most 100", lambda v: v <= 100, "86"),
    Figure("whole block, float8", lambda r: r.part("float8", "evolve", "whole"), "ms", "float8", "at most 270",
           lambda v: v <= 270, "274"),
    Figure("memory against no memory",
           lambda r: 100 * (r.part("memory", "evolve", "whole") / r.part("memory", "off", "whole") - 1), "% more",
           "memory", "at most 10.6", lambda v: v <= 10.6, "11.6 by arithmetic", _PAPER + "10.6"),
    Figure("growth of device memory", lambda r: r.read("block", "block")["resources"]["growth"], "bytes", "block", "0",
           lambda v: v == 0),
    Figure("peak of device memory", lambda r: r.read("block", "block")["resources"]["peak"] / 1e9, "GB", "block",
           "at most 12", lambda v: v <= 12, "11.4"),
    Figure("GPU idle in a replayed block", lambda r: 100 * r.read("profile", "block_profile")["idle"], "%", "profile",
           "under 2", lambda v: v < 2),
    Figure("attention over the cache, best", lambda r: r.attention(float8=False), "TFLOP/s", "attention",
           predicted="591", others="16k keys, H100: FlashAttention-3 648, cuDNN 595"),
    Figure("attention over the cache, float8", lambda r: r.attention(float8=True), "TFLOP/s", "attention",
           predicted="945", others="about 1150"),
    Figure("3x3 convolutions, our kernel", Results.convolutions, "TFLOP/s", "kernels", predicted="545"),
    Figure("memory-bound kernels, the slowest", lambda r: 100 * min(r.column("share", *_KERNELS, limit="memory")),
           "% of a copy", "kernels", "at least 85", lambda v: v >= 85),
    Figure("a large copy", lambda r: r.ceiling("GB/s"), "GB/s", "kernels", predicted="4300"),
    Figure("a large product, bfloat16", lambda r: r.ceiling("TFLOP/s"), "TFLOP/s", "kernels", predicted="790"),
)  # fmt: skip


def lacking(results: Results) -> Iterator[str]:
    """What a complete check would have and this one has not."""
    yield from (f"step {row['step']} {row['state']}" for row in results.steps if row["state"] != "passed")
    for figure in FIGURES:
        if found(figure.find, results) is None:
            yield f"{figure.what}: step {figure.step} {results.state(figure.step)}"


def remarks(results: Results) -> Iterator[str]:
    """What a number alone does not say: variants that are wrong, kernels that failed, bundles that are off."""
    for step in ("block", "float8", "memory"):
        for row in results.rows(step, "block", "Variants"):
            yield f"{step}, {row['variant']}: {row['verdict']}" + ("" if row["graphs"] else "; without graphs")
    for row in results.rows("kernels", "kernel_times", "Kernels"):
        yield from (f"{row['op']} {row['variant']}: {problem}" for problem in row["problems"])
    if bundles := results.rows("golden", "golden", "Bundles"):
        yield f"golden: {sum(row['ok'] for row in bundles)} of {len(bundles)} runs so far as expected"
    for row in results.rows("golden", "golden", "Bundles", ok=False):
        yield f"{row['bundle']} ({row['backend']}, {row['dtype']}) is off: {row['note'] or row['error']}"


def page(results: Results) -> tuple[str, bool]:
    """The table as Markdown, and whether the check is complete."""
    header, missing = results.header, list(lacking(results))
    gpu = header.get("gpu")
    lines = [summary_line(header) if header else "The machine is unknown: its step did not pass."]
    if gpu is not None:
        lines.append(", ".join(f"{name} {value}" for name, value in gpu.items()))
    elif header:
        lines.append("A rehearsal without a GPU: it shows that the check works. Its times are no results.")
    figures = [figure.row(results, judged=gpu is not None) for figure in FIGURES]
    parts = ["# GPU check\n", *(f"{line}\n" for line in lines), "## Figures\n", markdown(figures, _FIGURES)]
    parts += ["## Steps\n", markdown(results.steps, _STEPS)]
    for title, entries in (("Remarks", list(remarks(results))), ("Missing", missing)):
        if entries:
            parts += [f"## {title}\n", "".join(f"- {entry}\n" for entry in entries)]
    return "\n".join(parts), not missing


def main(argv: Sequence[str]) -> int:
    if len(argv) != 1 or not (Path(argv[0]) / "steps.tsv").is_file():
        print(f"gpu_table.py: expected one folder with a steps.tsv, found {' '.join(argv) or 'none'}", file=sys.stderr)
        return 2
    text, complete = page(Results(Path(argv[0])))
    print(text, end="")
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
