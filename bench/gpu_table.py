"""The table of a GPU check, and what it lacks: ``python bench/gpu_table.py FOLDER`` reads what bench/gpu.sh left.

FOLDER is the unpacked archive, or a folder of ``bench/results``. Goals and predictions are those of the performance
page of the specification, for one H200 at 832x480. Exit code 0 if every step passed and every figure is there, 1 if
not, 2 for a folder that is none.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _checkout  # noqa: F401

from echo_rt.bench.tables import columns, markdown, summary_line

_STEPS = columns("step|step", "state|state", "seconds|seconds|", "limit|limit|", "note|note")
_FIGURES = columns(
    "what|figure", "measured|measured", "goal|goal", "verdict|verdict", "predicted|predicted", "others|others report"
)


class Results:
    """The steps of a check, and what each of them wrote."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with (folder / "steps.tsv").open(encoding="utf-8", newline="") as file:
            self.steps = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))

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

    def value(self, key: str, *place: str, **keys: Any) -> float | None:
        """``key`` of the first such row; None where there is none."""
        return next((row[key] for row in self.rows(*place, **keys)), None)


Find = Callable[[Results], "float | None"]


def block(step: str, variant: str, part: str, key: str = "ms") -> Find:
    """A figure of a part of a block; ``part`` is how its name begins."""

    def find(results: Results) -> float | None:
        rows = results.rows(step, "block", "Block", variant=variant)
        return next((row[key] for row in reversed(rows) if row["part"].startswith(part)), None)

    return find


def _ratio(above: Find, below: Find) -> Find:
    def find(results: Results) -> float | None:
        first, second = above(results), below(results)
        return None if first is None or not second else first / second

    return find


def _memory_cost(results: Results) -> float | None:
    whole = _ratio(block("memory", "evolve", "whole"), block("memory", "off", "whole"))(results)
    return None if whole is None else 100 * (whole - 1)


def _resource(name: str, scale: float = 1.0) -> Find:
    def find(results: Results) -> float | None:
        found = results.read("block", "block").get("resources", {}).get(name)
        return None if found is None else found / scale

    return find


def _idle(results: Results) -> float | None:
    idle = results.read("profile", "block_profile").get("idle")
    return None if idle is None else 100 * idle


def _of_copy(results: Results) -> float | None:
    """Of the kernels that memory limits, the one furthest from the rate of a copy."""
    shares = [row["share"] for row in results.rows("kernels", "kernel_times", "Kernels", limit="memory")]
    return None if not shares or None in shares else 100 * min(shares)


def _vae(results: Results) -> float | None:
    return results.value("ms", "vae", "vae", "Decoders", decoder="echo-rt")


def _attention(*, float8: bool) -> Find:
    def find(results: Results) -> float | None:
        rows = results.rows("attention", "attention", "Attention")
        rates = [row["tflops"] for row in rows if ("float8" in row["name"]) == float8]
        return max((rate for rate in rates if rate is not None), default=None)

    return find


def _convolutions(results: Results) -> float | None:
    """TFLOP/s of all calls of a block together."""
    rows = results.rows("kernels", "kernel_times", "Kernels", op="causal_conv_hopper")
    if not rows or any(row["median_us"] is None for row in rows):
        return None
    return sum(row["calls"] * row["flops"] for row in rows) / sum(row["calls"] * row["median_us"] for row in rows) / 1e6


def _ceiling(unit: str) -> Find:
    return lambda results: results.value("value", "kernels", "kernel_times", "Ceilings", unit=unit)


def _golden(results: Results) -> float | None:
    """Nothing, where not all of them have run."""
    rows = results.rows("golden", "golden", "Bundles")
    ended = results.state("golden") in ("passed", "failed")
    return 100 * sum(row["ok"] for row in rows) / len(rows) if rows and ended else None


@dataclass(frozen=True)
class Figure:
    """A number that a check is for: where it is found, its goal, what was predicted, what others report."""

    what: str
    find: Find
    unit: str
    step: str
    goal: str = ""
    met: Callable[[float], bool] | None = None
    predicted: str = ""
    others: str = ""

    def row(self, results: Results, *, judged: bool) -> dict[str, str]:
        """Its line of the table; ``judged``: whether it is held against its goal."""
        value, verdict = self.find(results), ""
        if judged and self.met is not None:
            verdict = "open" if value is None else "met" if self.met(value) else "unmet"
        measured = "missing" if value is None else f"{value:.4g} {self.unit}".strip()
        own = {name: getattr(self, name) for name in ("what", "goal", "predicted", "others")}
        return {**own, "measured": measured, "verdict": verdict}


_WHOLE, _P99 = block("block", "evolve", "whole"), block("block", "evolve", "whole", "p99_ms")
_PAPER = "the paper, H100: "
_PEERS = "649; with a tiny VAE FlashDreams 344, Self-Forcing 432, FastVideo 511"
FIGURES = (
    Figure("golden bundles as expected", _golden, "%", "golden", "all", lambda v: v == 100),
    Figure("whole block, bfloat16", _WHOLE, "ms", "block", "at most 400, then 324", lambda v: v <= 400, "380",
           _PAPER + _PEERS),
    Figure("video frames a second", block("block", "evolve", "whole", "fps"), "", "block", "30, then 37",
           lambda v: v >= 30, "32", _PAPER + "18.5"),
    Figure("p99 over median", _ratio(_P99, _WHOLE), "", "block", "at most 1.05 over an hour", lambda v: v <= 1.05),
    Figure("transformer, all passes", block("block", "evolve", "transformer"), "ms", "block",
           predicted="288, at best 216"),
    Figure("VAE decode, in the block", block("block", "evolve", "VAE"), "ms", "block", predicted="109, at best 62"),
    Figure("VAE decode, alone", _vae, "ms", "vae", "at most 100", lambda v: v <= 100, "109, at best 62"),
    Figure("whole block, float8 products", block("float8", "evolve", "whole"), "ms", "float8", predicted="357 in sum"),
    Figure("memory against no memory", _memory_cost, "% more", "memory", "at most 10.6", lambda v: v <= 10.6,
           "11.6 by arithmetic", _PAPER + "10.6"),
    Figure("growth of device memory", _resource("growth"), "bytes", "block", "0", lambda v: v == 0),
    Figure("peak of device memory", _resource("peak", 1e9), "GB", "block", "at most 12", lambda v: v <= 12, "11.4"),
    Figure("GPU idle in a replayed block", _idle, "%", "profile", "under 2", lambda v: v < 2),
    Figure("attention over the cache, best", _attention(float8=False), "TFLOP/s", "attention", predicted="593",
           others="16k keys, H100: FlashAttention-3 648, cuDNN 595"),
    Figure("attention over the cache, float8", _attention(float8=True), "TFLOP/s", "attention", predicted="961",
           others="about 1150"),
    Figure("3x3 convolutions, our kernel", _convolutions, "TFLOP/s", "kernels", predicted="432, at best 592"),
    Figure("memory-bound kernels, the slowest", _of_copy, "% of a copy", "kernels", "at least 85", lambda v: v >= 85),
    Figure("a large copy", _ceiling("GB/s"), "GB/s", "kernels", predicted="4300"),
    Figure("a large product, bfloat16", _ceiling("TFLOP/s"), "TFLOP/s", "kernels", predicted="790"),
)  # fmt: skip


def lacking(results: Results) -> Iterator[str]:
    """What a complete check would have and this one has not."""
    yield from (f"step {row['step']} {row['state']}" for row in results.steps if row["state"] != "passed")
    for figure in FIGURES:
        if figure.find(results) is None:
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
    # The block's own header was read while the clocks were up.
    header = results.read("block", "block").get("environment") or results.read("machine", "environment")
    gpu, missing = header.get("gpu"), list(lacking(results))
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
