"""The report's pictures. matplotlib is an optional dependency."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from echo_rt.errors import BackendError
from echo_rt.soak.curves import Curve, Curves
from echo_rt.utils.atomic_file import write_whole

HOW_TO_GET_THEM = "plots need matplotlib, which is not installed: pip install 'echo-rt[soak]'"

PICTURES = ("latency.png", "memory.png", "latents.png")

_MEBIBYTE = 2.0**20
_SIZE = (10.0, 4.0)  # inches


def available() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def require_matplotlib() -> None:
    """:class:`BackendError` unless plots can be drawn."""
    if not available():
        raise BackendError(HOW_TO_GET_THEM)


def draw(folder: Path, curves: Curves) -> list[tuple[str, str]]:
    """Write the pictures that have something to show; their titles and file names. Raises ``OutputError``."""
    drawn = []
    contents = (
        ("Block latency", "ms", 1.0, [curves.latency]),
        ("Memory", "MiB", _MEBIBYTE, [curves.memory[:2], curves.memory[2:]]),
        ("Drift of the latent statistics", "", 1.0, [[curve] for curve in curves.latents]),
    )
    for name, (title, unit, scale, panels) in zip(PICTURES, contents, strict=True):
        shown = [[curve for curve in panel if curve.points] for panel in panels]
        if any(shown):
            write_whole(
                folder / name, _picture(title, unit, scale, [panel for panel in shown if panel], curves.resumes)
            )
            drawn.append((title, name))
    return drawn


def _picture(title: str, unit: str, scale: float, panels: Sequence[Sequence[Curve]], resumes: Sequence[int]) -> bytes:
    # Figure itself, not pyplot: that one keeps every figure, and asks for a display.
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(_SIZE[0], _SIZE[1] * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        for curve in panel:
            blocks, values = zip(*curve.points, strict=True)
            marker = "." if len(blocks) == 1 else None  # a line of one point is none
            axis.plot(blocks, [value / scale for value in values], label=curve.label, linewidth=1, marker=marker)
        for block in resumes:
            axis.axvline(block, color="grey", linewidth=0.5, linestyle=":")
        axis.set_ylabel(unit)
        axis.legend(loc="upper left")
    axes[0].set_title(title)
    axes[-1].set_xlabel("block")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
