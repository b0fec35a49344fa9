"""``echo-rt verify``: golden bundles, run through the code that ``generate`` uses."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echo_rt.options import DTYPE_NAMES

if TYPE_CHECKING:
    from echo_rt.verify import BundleReport


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Declare the subcommand."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "verify",
        help="hold golden bundles against this installation",
        description="Run golden bundles and compare every tensor with the published implementation's. "
        "Exit code 0 if all are within bounds, 1 if not, 2 for a folder that is no bundle.",
    )
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE", help="folder of a golden bundle")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, default="float32", help="default: float32")
    parser.add_argument("--backend", help="who does the operations: torch (see echo-rt doctor)")
    parser.add_argument("--dump", type=Path, metavar="DIR", help="keep what was computed in DIR/BUNDLE/")
    return parser


def run(arguments: argparse.Namespace, report: dict[str, Any]) -> int:
    """Verify every bundle and print its tensors; 0 if all are within bounds, else 1."""
    from echo_rt.verify import verify_bundle

    report["passed"] = True
    report["bundles"] = []
    for path in arguments.bundles:
        bundle = verify_bundle(
            path, device=arguments.device, dtype=arguments.dtype, backend=arguments.backend, dump=arguments.dump
        )
        report["passed"] = report["passed"] and bundle.passed
        report["bundles"].append(_as_json(bundle))
        if not arguments.json:
            _print(bundle)
    return 0 if report["passed"] else 1


def _as_json(bundle: BundleReport) -> dict[str, Any]:
    # JSON has no infinity and no NaN: an error that is not a number is null.
    tensors = [
        {
            "name": row.name,
            "error": row.error if row.error < float("inf") else None,
            "bound": row.bound,
            "ok": row.ok,
        }
        for row in bundle.rows
    ]
    return {"name": bundle.name, "kind": bundle.kind, "passed": bundle.passed, "tensors": tensors}


def _print(bundle: BundleReport) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, padding=(0, 2), title=f"{escape(bundle.name)} ({bundle.kind})", title_justify="left")
    table.add_column("tensor", no_wrap=True)
    for column in ("error", "bound"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in bundle.rows:
        verdict = "[green]ok[/]" if row.ok else "[red]off[/]"
        table.add_row(escape(row.name), f"{row.error:.2e}", f"{row.bound:.1e}", verdict)
    console = Console(highlight=False)
    console.print(table)
    good = sum(row.ok for row in bundle.rows)
    state = "[green]passed[/]" if bundle.passed else "[red]failed[/]"
    console.print(f"{escape(bundle.name)}: {state}, {good} of {len(bundle.rows)} tensors within bounds\n")
