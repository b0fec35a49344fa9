"""``report.md``: what was run, how each promise stands, the figures; with plots where matplotlib is installed."""

from __future__ import annotations

import importlib.util
import io
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from echo_rt.errors import BackendError
from echo_rt.soak.checks import Verdict
from echo_rt.soak.config import SoakConfig
from echo_rt.soak.interval import Histogram
from echo_rt.soak.journal import JOURNAL_FILE, Line, read_lines
from echo_rt.utils.atomic_file import write_whole
from echo_rt.utils.build_info import __version__
from echo_rt.utils.wording import counted

REPORT_FILE = "report.md"
PICTURES = ("latency.png", "memory.png", "latents.png")
_NO_MATPLOTLIB = "plots need matplotlib, which is not installed: pip install 'echo-rt[soak]'"
_MEBIBYTE = 2.0**20
_SIZE = (10.0, 4.0)  # of a panel, in inches
_CAPACITY = 4096  # points of a curve; a picture is not that wide


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def require_matplotlib() -> None:
    """Raise :class:`BackendError` unless plots can be drawn."""
    if not can_plot():
        raise BackendError(_NO_MATPLOTLIB)


def device_name(device: torch.device) -> str:
    """Name of the device for the report. Ask before the soak: a GPU that is lost does not answer."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _mean(a: float, b: float) -> float:
    return (a + b) / 2


@dataclass
class Curve:
    """A figure over the blocks. Beyond 4096 points, neighbours become one, whose value ``merge`` makes."""

    label: str
    value: Callable[[Line], float | None]
    merge: Callable[[float, float], float] = max
    points: list[tuple[float, float]] = field(default_factory=list)

    def add(self, x: float, y: float | None) -> None:
        """Add a point, unless there is no value."""
        if y is None:
            return
        self.points.append((x, y))
        if len(self.points) > _CAPACITY:
            pairs = zip(self.points[::2], self.points[1::2], strict=False)
            odd = self.points[-1:] if len(self.points) % 2 else []
            self.points = [(a[0], self.merge(a[1], b[1])) for a, b in pairs] + odd

    def cut(self, x: float) -> None:
        """Drop the points from ``x`` on: a later process generated these blocks again."""
        while self.points and self.points[-1][0] >= x:
            self.points.pop()


class History:
    """The journal in bounded memory: totals, which include blocks that were made twice, and curves, which do not.

    ``plots``: by file, the title, the unit, its size in the line's unit, and the panels with their curves.
    """

    def __init__(self) -> None:
        self.latency = Histogram()
        self.longest = (0.0, 0)
        self.made = self.runs = self.switches = 0
        self.slowest_switch = self.longest_stall = 0.0
        self.newest: Line = {}
        self.resumes: list[int] = []
        latency = [
            Curve("p50", lambda line: line["latency"]["p50"], _mean),
            Curve("p99", lambda line: line["latency"]["p99"]),
            Curve("longest", lambda line: line["latency"]["max"]),
        ]
        device = [
            Curve("device allocated", lambda line: (line["device"] or {}).get("allocated")),
            Curve("device reserved", lambda line: (line["device"] or {}).get("reserved")),
        ]
        host = [Curve("host resident", lambda line: line["host"]["rss"])]
        mean = [Curve("mean", lambda line: line["latents"]["mean"], _mean)]
        deviation = [Curve("standard deviation", lambda line: line["latents"]["std"], _mean)]
        self.plots: dict[str, tuple[str, str, float, list[list[Curve]]]] = {
            "latency.png": ("Block latency", "ms", 1.0, [latency]),
            "memory.png": ("Memory", "MiB", _MEBIBYTE, [device, host]),
            "latents.png": ("Drift of the latent statistics", "", 1.0, [mean, deviation]),
        }
        self.curves = [*latency, *device, *host, *mean, *deviation]

    def see(self, line: Line) -> None:
        """Take in one more line."""
        if "blocks" in line:
            self.made += line["blocks"]
            self.latency.merge(Histogram(line["latency"]["bins"]))
            self.longest = max(self.longest, (line["latency"]["max"], line["latency"]["max_block"]))
            self.switches += line["switch_latency"]["blocks"]
            self.slowest_switch = max(self.slowest_switch, line["switch_latency"]["max"] or 0.0)
            self.longest_stall = max(self.longest_stall, (line["snapshots"] or {}).get("stall") or 0.0)
            resumed = self.newest and line["run"] != self.newest["run"]
            if resumed:
                self.resumes.append(line["first_block"])
            for curve in self.curves:
                if resumed:
                    curve.cut(line["first_block"])
                curve.add(line["block"], curve.value(line))
            self.newest = line
        self.runs = line["run"]


def write_report(config: SoakConfig, verdicts: Sequence[Verdict], last: Line, device: str = "CPU") -> Path:
    """Write the report of the journal in ``config.out``; ``last`` is its last line. Raises ``OutputError``."""
    history = History()
    for line in read_lines(config.folder):
        history.see(line)
    path = config.folder / REPORT_FILE
    promises = [[v.promise, f"**{v.status.value}**", v.limit, v.evidence] for v in verdicts]
    parts = (
        _head(last),
        "## Promises\n\n" + _table(["promise", "status", "threshold", "evidence"], promises),
        "## Figures\n\n" + _table(["figure", "value"], _figures(history, last)),
        f"## Plots\n\n{_plots(config, history)}",
        _setting(config, device, last),
    )
    write_whole(path, "\n".join(parts).encode())
    return path


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _head(last: Line) -> str:
    said, problem = "", last["problem"]
    if last["failure"] is not None:
        said = f"\nThe stream failed before block {last['block']}: {last['failure']}\n"
    if problem is not None:
        said += f"\nAfter that: {problem}\n" if said else f"\nThe stream did not fail; the soak ended with: {problem}\n"
    return f"# Soak: {last['end']} after {counted(last['block'], 'block')}\n{said}"


def _figures(history: History, last: Line) -> list[list[str]]:
    rows = [
        ["processes", str(history.runs)],
        ["blocks, including those made again", str(history.made)],
        ["hours of streaming", f"{last['elapsed'] / 3600:.3f}"],
    ]
    newest = history.newest
    if not newest:
        return rows
    p50, p99 = (history.latency.quantile(share) for share in (0.5, 0.99))
    taken = newest["snapshots"]
    return [
        *rows,
        ["video frames", str(newest["frame"])],
        ["video", f"{newest['video_seconds']:.1f} s"],
        ["frames per second, at the end", f"{newest['fps']:.2f}"],
        ["block latency p50 after warm-up", "none" if p50 is None else f"{1e3 * p50:.1f} ms"],
        ["block latency p99 after warm-up", "none" if p99 is None else f"{1e3 * p99:.1f} ms"],
        ["longest block, including warm-up", "{:.1f} ms (block {})".format(*history.longest)],
        ["blocks around prompt switches", f"{history.switches}, the longest {history.slowest_switch:.1f} ms"],
        [
            "snapshots of the last process",
            f"{taken['written']} written, {taken['skipped']} skipped" if taken else "none",
        ],
        ["longest stall by a snapshot", f"{history.longest_stall:.1f} ms"],
    ]


def _plots(config: SoakConfig, history: History) -> str:
    """Draw the plots that have points, and return the lines that show them."""
    if config.plots is False:
        return "Left out, as asked.\n"
    if not can_plot():
        return f"Left out: {_NO_MATPLOTLIB}; then give the same command again.\n"
    shown = []
    for name, (title, unit, scale, panels) in history.plots.items():
        drawn = [panel for panel in ([curve for curve in curves if curve.points] for curves in panels) if panel]
        if drawn:
            write_whole(config.folder / name, _picture(title, unit, scale, drawn, history.resumes))
            shown.append(f"![{title}]({name})\n")
    return "\n".join(shown)


def _picture(title: str, unit: str, scale: float, panels: Sequence[Sequence[Curve]], resumes: Sequence[int]) -> bytes:
    # Figure itself, not pyplot, which keeps every figure and asks for a display.
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(_SIZE[0], _SIZE[1] * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        for curve in panel:
            blocks, values = zip(*curve.points, strict=True)
            marker = "." if len(blocks) == 1 else None  # a line of one point is invisible
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


def _setting(config: SoakConfig, device: str, last: Line) -> str:
    if "backend" in last:
        device += f", backend {last['backend']} ({last['backend_reason']})"
    versions = f"echo-rt {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    machine = f"{platform.system()} {platform.machine()}, {device}. All figures: `{JOURNAL_FILE}`."
    settings = json.dumps(config.settings(), indent=2)
    taken = last.get("taken") or {}
    recipe = f"Recipe {taken['recipe']} ({taken['recipe_reason']}).\n\n" if taken.get("recipe") else ""
    return f"## Setting\n\n{versions}, {machine}\n\n{recipe}```json\n{settings}\n```\n"
