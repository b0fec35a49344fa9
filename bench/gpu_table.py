"""The table of a GPU check, and what it lacks: ``python bench/gpu_table.py FOLDER`` reads what bench/gpu.sh left.

FOLDER is the unpacked archive, or a folder of ``bench/results``. Exit code 0 if every step passed and every figure is
there, 1 if not, 2 for a folder that is none.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import _checkout  # noqa: F401
from goals import FIGURES, Results, found

from echo_rt.bench.tables import columns, markdown, summary_line

_STEPS = columns("step|step", "state|state", "seconds|seconds|", "limit|limit|", "note|note")
_FIGURES = columns(
    "what|figure", "measured|measured", "goal|goal", "verdict|verdict", "predicted|predicted", "others|others report"
)


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
    figures = []
    for figure in FIGURES:
        value = found(figure.find, results)
        measured = "missing" if value is None else f"{value:.4g} {figure.unit}".strip()
        verdict = "" if gpu is None else figure.verdict(value)
        figures.append({**vars(figure), "measured": measured, "verdict": verdict})
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
