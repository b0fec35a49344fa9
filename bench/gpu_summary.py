"""The summary of a GPU check: what ran, what it found, and whether all of it is well. Short, as JSON and Markdown."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echo_rt.bench.tables import Column, write_results
from echo_rt.wording import counted

# What a whole block takes with float8 linear layers lies in a folder of its own, beside that of bfloat16.
FLOAT8_FOLDER = "float8"

_COLUMNS = (
    Column("name", "stage", text=True),
    Column("state", "state", text=True),
    Column("seconds", "s", ".1f"),
    Column("limit", "limit", ".0f"),
    Column("exit_code", "exit code"),
    Column("why", "", text=True),
)


@dataclass(frozen=True)
class Outcome:
    """What became of a stage.

    ``state``: ``passed``, ``failed``, ``timed out``, ``skipped`` (no time was left), ``not run`` (its tool is not
    there), or ``interrupted`` (with the whole check).
    """

    name: str
    state: str
    seconds: float
    limit: float
    exit_code: int | None
    why: str

    @property
    def ok(self) -> bool:
        return self.state == "passed"


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _verdict(description: Mapping[str, Any], outcomes: Sequence[Outcome]) -> tuple[bool, str]:
    planned, done = list(description["planned"]), [outcome.name for outcome in outcomes]
    unrun = [name for name in planned if name not in done]
    bad = [f"{outcome.name} {outcome.state}" for outcome in outcomes if not outcome.ok]
    bad += [f"{name} not reached" for name in unrun]
    if bad:
        return False, f"NOT OK: {', '.join(bad)}"
    return True, f"ok: {'all ' if len(done) > 1 else ''}{counted(len(done), 'stage')} passed"


def _kernel_notes(results: Mapping[str, Any]) -> list[str]:
    rows = results["tables"]["Kernels"]
    failed = [f"{row['op']} {row['variant']}".strip() for row in rows if row["problems"]]
    notes = [f"Kernels: {len(rows) - len(failed)} of {len(rows)} right and timed ({results['clock']})."]
    notes += [f"Kernel failed: {name}." for name in failed]
    met, unmet = results["goals_met"], results["goals_unmet"]
    if met or unmet:
        notes.append(f"Goals: {met} met, {len(unmet)} unmet" + "".join(f"; {goal}" for goal in unmet) + ".")
    else:
        notes.append("Goals: not judged.")
    return notes


def _block_notes(results: Mapping[str, Any]) -> list[str]:
    tables = results["tables"]
    right = sum(row["bound"] is not None and row["idle"] is not None for row in tables["Variants"])
    notes = [f"Block: {right} of {len(tables['Variants'])} variants right and timed ({results['clock']})."]
    unmet = [f"{row['goal']}: {row['value']:.4g}" for row in tables.get("Goals", []) if row["verdict"] == "unmet"]
    if "Goals" not in tables:
        notes.append("Goals of a block: not judged.")
    else:
        met = sum(row["verdict"] == "met" for row in tables["Goals"])
        notes.append(f"Goals of a block: {met} met, {len(unmet)} unmet" + "".join(f"; {goal}" for goal in unmet) + ".")
    return notes


def _savings_notes(results: Mapping[str, Any]) -> list[str]:
    """Of each saving the row that saves most."""
    rows = results["tables"]["Savings"]
    notes = [f"Exact savings: {row['saving']}, {row['what']}: {row['problem']}." for row in rows if row["problem"]]
    if not results["result"]:
        return [*notes, "Exact savings: not judged."]
    best: dict[str, Mapping[str, Any]] = {}
    for row in sorted((row for row in rows if not row["problem"]), key=lambda row: row["share"]):
        best[row["saving"]] = row
    found = "; ".join(f"{saving} {row['share']:.2%} ({row['what']})" for saving, row in best.items())
    return [*notes, f"Exact savings of a block, at best: {found}."]


def _vae_notes(results: Mapping[str, Any]) -> list[str]:
    rows = results["tables"]["Decoders"]
    timed = {row["decoder"] for row in results["tables"]["Stages"]}
    notes = [f"VAE: {len(timed)} of {len(rows)} decoders right and timed ({results['clock']})."]
    for row in results["tables"].get("Goals", []):
        value = "" if row["value"] is None else f": {row['value']:.4g} {row['unit']}"
        notes.append(f"Goal of the VAE {row['verdict']}: {row['goal']}{value}.")
    return notes


def _golden_notes(results: Mapping[str, Any]) -> list[str]:
    rows = results["tables"]["Bundles"]
    bad = [f"{row['bundle']} ({row['backend']}, {row['dtype']})" for row in rows if not row["ok"]]
    return [f"Golden bundles: {len(rows) - len(bad)} of {len(rows)} as expected" + "".join(f"; off: {b}" for b in bad)]


def write_summary(
    out: Path,
    facts: Mapping[str, Any],
    description: Mapping[str, Any],
    outcomes: Sequence[Outcome],
    seconds: float,
) -> None:
    """Write summary.json and summary.md into ``out``; ``description`` is the plan, ``facts`` the machine."""
    ok, verdict = _verdict(description, outcomes)
    names = ("kernel_times", "block", "savings", "golden")
    kernels, block, savings, golden = (_read(out / f"{name}.json") for name in names)
    vae = _read(out / "vae.json")
    notes = [verdict, f"{seconds:.0f} s of {description['budget_s']:.0f} s."]
    if description["device"] == "cpu":
        notes.append("A rehearsal on the CPU with emulated kernels: it shows that the check works, nothing of a GPU.")
    if description["left_out"]:
        notes.append(f"Not a whole check: left out by --stages were {', '.join(description['left_out'])}.")
    notes += [f"Not part of the check here: {name}, as {why}." for name, why in description["without"].items()]
    if not description["sanitizer"]:
        notes.append("compute-sanitizer was left out by --no-sanitizer.")
    if kernels is not None:
        notes += _kernel_notes(kernels)
    if block is not None:
        notes += _block_notes(block)
    if (float8 := _read(out / FLOAT8_FOLDER / "block.json")) is not None:
        notes += [f"In float8: {note}" for note in _block_notes(float8)]
    if savings is not None:
        notes += _savings_notes(savings)
    if vae is not None:
        notes += _vae_notes(vae)
    if golden is not None:
        notes += _golden_notes(golden)
    write_results(
        out,
        "summary",
        "GPU check",
        # The kernels' own header was read while the clocks were up, and knows the build.
        kernels["environment"] if kernels is not None else facts,
        {"Stages": ([dataclasses.asdict(outcome) for outcome in outcomes], _COLUMNS)},
        notes,
        ok=ok,
        verdict=verdict,
        seconds=seconds,
        plan=dict(description),
    )
