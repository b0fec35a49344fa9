"""``echo-rt doctor``: what is here, what is not, and what to do about it."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from echo_rt.cli.doctor_checks import Fact

_MARKS = {"ok": "[green]✓[/]", "absent": "[yellow]–[/]", "missing": "[red]✗[/]"}


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Declare the subcommand."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "doctor",
        help="show what is installed, built and working",
        description="Show what is installed, built and working. Exit code 0 if generate can run, 1 if not.",
    )
    return parser


def run(arguments: argparse.Namespace, report: dict[str, Any]) -> int:
    """Gather the facts and print them; 0 if ``generate`` can run."""
    from echo_rt.cli.doctor_checks import gather

    facts = gather()
    missing = [fact for fact in facts if fact.status == "missing"]
    report["ok"] = not missing
    report["facts"] = [dataclasses.asdict(fact) for fact in facts]
    if not arguments.json:
        _print(facts, missing)
    return 1 if missing else 0


def _print(facts: list[Fact], missing: list[Fact]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 1))
    for width in (2, None, None):
        table.add_column(width=width, overflow="fold")
    group = ""
    for fact in facts:
        if fact.group != group:
            group = fact.group
            table.add_row("", f"[bold]{escape(group)}[/]", "")
        value = escape(fact.value) + (f"\n[dim]→ {escape(fact.advice)}[/]" if fact.advice else "")
        table.add_row(_MARKS[fact.status], escape(fact.name), value)
    console = Console(highlight=False)
    console.print(table)
    if missing:
        console.print(f"[red]generate cannot run[/]: {', '.join(escape(fact.name) for fact in missing)}")
    else:
        console.print("[green]generate can run[/]")
