"""A run as bars. matplotlib is an optional dependency."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from echo_rt.errors import BackendError
from echo_rt.utils.atomic_file import write_whole

_WIDTH, _BAR = 9.0, 0.28  # inches


def available() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def require_matplotlib() -> None:
    """:class:`BackendError` unless a chart can be drawn."""
    if not available():
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
