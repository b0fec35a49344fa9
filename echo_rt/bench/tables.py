"""The one writer of benchmark results: rows as an aligned Markdown table, as JSON under a header, and as bars.

A row is a dataclass or a mapping. The table is plain text that reads as well in a terminal as in a browser. Bars need
matplotlib, an optional dependency.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echo_rt.bench.environment import summary_line
from echo_rt.errors import BackendError, ConfigError, TargetError
from echo_rt.utils.atomic_file import reason, write_whole

_WIDTH, _BAR = 9.0, 0.28  # inches of a chart


@dataclass(frozen=True)
class Column:
    """One column: the key of a row, its heading, how a number is put, and whether it is text (set to the left)."""

    key: str
    heading: str
    form: str = ""
    text: bool = False


def as_mapping(row: Any) -> dict[str, Any]:
    """A row's entries by name."""
    if dataclasses.is_dataclass(row) and not isinstance(row, type):
        return dataclasses.asdict(row)
    if isinstance(row, Mapping):
        return dict(row)
    raise ConfigError(f"a row must be a dataclass or a mapping, got {type(row).__name__}")


def _cell(row: Mapping[str, Any], column: Column) -> str:
    if column.key not in row:
        raise ConfigError(f"a row lacks {column.key!r}; it has {', '.join(row)}")
    value = row[column.key]
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return format(value, column.form).replace("|", r"\|").replace("\n", " ")


def markdown(rows: Sequence[Any], columns: Sequence[Column]) -> str:
    """The table, with columns as wide as what they hold; None is a dash."""
    body = [[_cell(as_mapping(row), column) for column in columns] for row in rows]
    head = [column.heading for column in columns]
    widths = [max(map(len, cells)) for cells in zip(head, *body, strict=True)]
    # Three dashes, one of which may be the colon, are the least that Markdown takes for a rule.
    widths = [max(3, width) for width in widths]
    rule = ["-" * w if c.text else "-" * (w - 1) + ":" for c, w in zip(columns, widths, strict=True)]

    def line(cells: Sequence[str]) -> str:
        placed = [f"{s:<{w}}" if c.text else f"{s:>{w}}" for s, c, w in zip(cells, columns, widths, strict=True)]
        return f"| {' | '.join(placed)} |"

    return "\n".join([line(head), line(rule), *map(line, body)]) + "\n"


def finite(value: Any) -> Any:
    """``value`` for JSON, which has no infinity and no NaN: those become None."""
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


Tables = Mapping[str, tuple[Sequence[Any], Sequence[Column]]]


def results(
    title: str, header: Mapping[str, Any], tables: Tables, notes: Sequence[str] = (), **facts: Any
) -> tuple[dict[str, Any], str]:
    """The content of the JSON, and the page. The arguments are those of :func:`write_results`."""
    content = {
        "title": title,
        "environment": header,
        **facts,
        "tables": {heading: [as_mapping(row) for row in rows] for heading, (rows, _) in tables.items()},
        "notes": list(notes),
    }
    parts = [f"# {title}\n", f"{summary_line(dict(header))}\n"]
    for heading, (rows, columns) in tables.items():
        parts += [f"## {heading}\n", markdown(rows, columns)]
    if notes:
        parts.append("\n".join(f"- {note}" for note in notes) + "\n")
    return finite(content), "\n".join(parts)


def check_results_folder(folder: Path) -> None:
    """Raises ``TargetError`` now, and not after the run, where ``folder`` cannot be one; makes nothing."""
    whole = folder.absolute()
    try:
        there = next(place for place in (whole, *whole.parents) if place.exists())
    except OSError as error:  # a name that no folder can have
        raise TargetError(f"{folder}: cannot be a folder: {reason(error)}") from None
    if not there.is_dir():
        raise TargetError(f"{folder}: expected a folder for results, got a file in its place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise TargetError(f"{folder}: cannot be written into: {there} is write-protected")


def write_results(
    folder: Path,
    name: str,
    title: str,
    header: Mapping[str, Any],
    tables: Tables,
    notes: Sequence[str] = (),
    page: bool = True,
    **facts: Any,
) -> str:
    """Write ``name.json`` and ``name.md`` into ``folder``, each whole or not at all; returns the text of the latter.

    ``tables``: heading -> rows and columns. ``notes``: lines after the tables. ``facts``: further entries of the JSON.
    ``page``: whether the text is a file of its own.
    """
    content, text = results(title, header, tables, notes, **facts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TargetError(f"{folder}: cannot make the folder: {reason(error)}") from None
    write_whole(folder / f"{name}.json", (json.dumps(content, indent=1) + "\n").encode())
    if page:
        write_whole(folder / f"{name}.md", text.encode())
    return text


def can_draw() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def require_matplotlib() -> None:
    """:class:`BackendError` unless a chart can be drawn."""
    if not can_draw():
        raise BackendError("a chart needs matplotlib, which is not installed: pip install 'echo-rt[bench]'")


def draw(path: Path, title: str, bars: Sequence[tuple[str, str, float, float]]) -> None:
    """Bars of (group, part, median, 99th percentile) in milliseconds, into a PNG; raises ``OutputError``."""
    # Figure itself, not pyplot: that one keeps every figure, and asks for a display.
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(_WIDTH, 1.5 + _BAR * len(bars)), layout="constrained")
    axis = figure.subplots()
    parts = list(dict.fromkeys(part for _, part, _, _ in bars))
    for number, part in enumerate(parts):
        places = [place for place, bar in enumerate(bars) if bar[1] == part]
        medians = [bars[place][2] for place in places]
        beyond = [bars[place][3] - bars[place][2] for place in places]
        axis.barh(places, medians, xerr=[[0.0] * len(places), beyond], label=part, color=f"C{number}", capsize=2)
    for place, bar in enumerate(bars):
        axis.annotate(f" {bar[2]:.3g}", (bar[3], place), va="center", fontsize=8)
    axis.set_yticks(range(len(bars)), [group for group, *_ in bars])
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_xlabel("ms a block, median; whisker: 99th percentile")
    axis.set_title(title)
    axis.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_whole(path, buffer.getvalue())
