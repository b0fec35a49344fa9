"""``echo-rt doctor``: what is here, what is not, and what to do about it."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from echo_rt.cli.signals import StopRequest
from echo_rt.cli.stdio import say

if TYPE_CHECKING:
    from echo_rt.cli.doctor_checks import Fact

_MARKS = {"ok": "✓", "absent": "-", "missing": "✗"}


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Declare the subcommand."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "doctor",
        help="show what is installed, built and working",
        description="Show what is installed, built and working. Exit code 0 if generate can run, 1 if not.",
    )
    return parser


def run(arguments: argparse.Namespace, report: dict[str, Any], stop: StopRequest) -> int:
    """Gather the facts and print them; 0 if ``generate`` can run."""
    with stop.interruptible():
        from echo_rt.cli.doctor_checks import gather

        facts = gather()
    missing = [fact for fact in facts if fact.status == "missing"]
    report["ok"] = not missing
    report["facts"] = [dataclasses.asdict(fact) for fact in facts]
    if not arguments.json:
        say("\n".join(_page(facts, missing)))
    return 1 if missing else 0


def _page(facts: list[Fact], missing: list[Fact]) -> Iterator[str]:
    # Plain text, because the package that would draw a table may be what is missing.
    width = max(len(fact.name) for fact in facts)
    group = ""
    for fact in facts:
        if fact.group != group:
            group = fact.group
            yield group
        yield f"  {_MARKS[fact.status]} {fact.name:<{width}}  {fact.value}"
        if fact.advice:
            yield f"    {'':<{width}}  -> {fact.advice}"
    if missing:
        yield f"generate cannot run: {', '.join(fact.name for fact in missing)}"
    else:
        yield "generate can run"
