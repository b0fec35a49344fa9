"""``echo-rt recipes``: how each published checkpoint is sampled, with every value."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from echo_rt.cli.arguments import Arguments
from echo_rt.cli.stdio import say
from echo_rt.recipes import RECIPES, Recipe
from echo_rt.utils.signals import StopRequest

DESCRIPTION = """
Show the recipes that --recipe names, with every value: how the publisher samples each checkpoint, what has to be
downloaded, and where this program differs.
"""


def run(arguments: Arguments, report: dict[str, Any], stop: StopRequest) -> int:
    """Print the table."""
    report["recipes"] = [recipe.as_json() for recipe in RECIPES.values()]
    if not arguments.json:
        say(*[line for recipe in RECIPES.values() for line in ("", *_page(recipe))][1:])
    return 0


def _page(recipe: Recipe) -> Iterator[str]:
    values = {name: _words(value) for name, value in recipe.as_json()["facts"].items()}
    values |= {"EMA weights": _yes(recipe.ema), "LoRA": _yes(recipe.lora), "memory encoder": recipe.memory}
    if recipe.normalize_k is not None:
        values["memory keys"] = "normalized" if recipe.normalize_k else "not normalized"
    wide = max(map(len, values))
    yield recipe.name
    yield from (f"  {name:<{wide}}  {value}" for name, value in values.items())
    yield from dict.fromkeys(f"  {file['download']}" for file in recipe.as_json()["files"])
    yield from (f"  {note}" for note in recipe.notes)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _words(value: Any) -> str:
    """A value as ``--set`` takes it; an empty list is a dash."""
    if isinstance(value, list):
        return ",".join(map(str, value)) or "-"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
