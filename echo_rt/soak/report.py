"""``report.md`` and ``report.html``: what was run, how each promise stands, the figures, plots where matplotlib is."""

from __future__ import annotations

import io
import json
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from markdown_it import MarkdownIt

from echo_rt.errors import BackendError, OutputError
from echo_rt.soak.checks import Promises
from echo_rt.soak.config import Limits, SoakConfig
from echo_rt.soak.interval import Histogram
from echo_rt.soak.journal import JOURNAL_FILE, Line
from echo_rt.utils.atomic_file import PartFile, raising, reason, write_whole
from echo_rt.utils.build_info import __version__
from echo_rt.utils.packages import needing
from echo_rt.utils.wording import counted, printable

REPORT_FILE, PAGE_FILE = "report.md", "report.html"
_SIZE = (10.0, 3.5)  # of a panel, in inches
_CAPACITY = 4096  # points of a curve; a picture is not that wide
_MARKS = 200  # of a kind in a picture
_ROOM = 1.5  # a threshold this far above the figures is out of the picture
_FROM_WARM = ("first_block", "block", "device", "host", "latents")  # of a line; its hashes are many
_STYLE = """<style>body { font: 15px/1.5 sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } th, td { border: 1px solid #ccc; padding: .2rem .6rem; text-align: left; }
svg { width: 100%; height: auto; } pre { overflow: auto; background: #f4f4f4; padding: .6rem; }</style>"""


# ---------------------------------------------------------------- what is told


def _mean(a: float, b: float) -> float:
    return (a + b) / 2


class Curve(NamedTuple):
    """The figure ``group.name`` of lines; of too many points, neighbours become one, whose value ``merge`` makes."""

    label: str
    group: str
    name: str
    merge: Callable[[float, float], float] = max


class Panel(NamedTuple):
    """Curves over one axis, in ``unit``, which is ``scale`` of the lines' units.

    ``threshold``: its name in :meth:`History.thresholds`. ``from_zero``: where the axis begins; otherwise it is as high
    as a standard deviation at least. Either way a small change does not look like a large one.
    """

    threshold: str
    unit: str
    scale: float
    curves: list[Curve]
    from_zero: bool = True


_LATENCY = [Curve("p50", "latency", "p50", _mean), Curve("p99", "latency", "p99"), Curve("longest", "latency", "max")]
_DEVICE = [Curve("device reserved", "device", "reserved"), Curve("device allocated", "device", "allocated")]
_HOST = [Curve("host resident", "host", "rss")]
_MEAN, _STD = [Curve("mean", "latents", "mean", _mean)], [Curve("standard deviation", "latents", "std", _mean)]
_DRIFT = [Panel("mean", "", 1.0, _MEAN, from_zero=False), Panel("std", "", 1.0, _STD)]
# Title and panels of each picture, by its file.
PICTURES = {
    "latency.svg": ("Block latency", [Panel("latency", "ms", 1.0, _LATENCY)]),
    "memory.svg": ("Memory", [Panel("device", "MiB", 2.0**20, _DEVICE), Panel("host", "MiB", 2.0**20, _HOST)]),
    "latents.svg": ("Drift of the latent statistics", _DRIFT),
}


@dataclass
class Life:
    """One process: its blocks ``first .. last``, and figures of its first line after the warm-up."""

    first: int
    last: int
    warm: Line | None = None


class History(Promises):
    """The journal in bounded memory: promises, totals with the blocks that were made twice, curves without them.

    ``device``: its name, asked for before the soak: a GPU that is lost does not answer.
    """

    def __init__(self, limits: Limits, device: str) -> None:
        super().__init__(limits)
        self.device = device
        self.latency = Histogram()
        self.longest = (0.0, 0)
        self.runs = self.switches = 0
        self.slowest_switch = self.longest_stall = 0.0
        self.newest: Line = {}
        self.lives: list[Life] = []
        curves = [curve for _, panels in PICTURES.values() for panel in panels for curve in panel.curves]
        self.points: dict[Curve, list[tuple[float, float]]] = {curve: [] for curve in curves}

    def see(self, line: Line) -> None:
        """Take in one more line."""
        super().see(line)
        self.runs = line["run"]
        if "blocks" not in line:
            return
        self.latency.update(Histogram.of_line(line["latency"]["bins"]))
        self.longest = max(self.longest, (line["latency"]["max"], line["latency"]["max_block"]))
        self.switches += line["switch_latency"]["blocks"]
        self.slowest_switch = max(self.slowest_switch, line["switch_latency"]["max"] or 0.0)
        self.longest_stall = max(self.longest_stall, (line["snapshots"] or {}).get("stall") or 0.0)
        begun = not self.newest or line["run"] != self.newest["run"]
        if begun:
            self.lives.append(Life(line["first_block"], line["block"]))
        for curve, points in self.points.items():
            if begun:  # this process makes later blocks again
                points[:] = [point for point in points if point[0] < line["first_block"]]
            value = (line[curve.group] or {}).get(curve.name)
            if value is not None:
                points.append((line["block"], value))
            if len(points) > _CAPACITY:
                pairs = zip(points[::2], points[1::2], strict=False)
                odd = points[-1:] if len(points) % 2 else []
                points[:] = [(a[0], curve.merge(a[1], b[1])) for a, b in pairs] + odd
        self.lives[-1].last = line["block"]
        if line["warm"] and self.lives[-1].warm is None:
            self.lives[-1].warm = {name: line[name] for name in _FROM_WARM}
        self.newest = line

    def thresholds(self, warm: Line) -> dict[str, tuple[float | None, float | None, float]]:
        """By panel: the value at a process's first ``warm`` line, and what may be added: a constant, and per block."""
        limits, middle = self.limits, 1e3 * (self.latency.quantile(0.5) or 0.0)
        ratio, latents = limits.latency_ratio, warm["latents"]
        drift = None if limits.drift is None or latents["std"] is None else limits.drift * latents["std"]
        slack = None if limits.host_slope is None else limits.host_slack
        return {
            "latency": (middle, middle * (ratio - 1) if isinstance(ratio, (int, float)) and middle else None, 0.0),
            "device": ((warm["device"] or {}).get("reserved"), limits.device_growth, 0.0),
            "host": (warm["host"]["rss"], slack, limits.host_slope or 0.0),
            "mean": (latents["mean"], drift, 0.0),
            "std": (latents["std"], drift, 0.0),
        }


# ---------------------------------------------------------------- the report


def write_report(config: SoakConfig, history: History, last: Line, part: PartFile) -> None:
    """Write the report into ``part``, and page and pictures into ``config.out``; raises ``OutputError``.

    ``last`` is the journal's last line. The report goes first: where the disk takes no more files, ``part`` is there.
    """
    promises = [[v.promise, f"**{v.status.value}**", v.limit, v.evidence] for v in history.verdicts()]
    until = [f"{config.limits.warmup_blocks} blocks"]
    until += ["its first prompt switch"] * (config.switch_every is not None)
    until += ["its first snapshot"] * (config.snapshot_every is not None)
    pictures, missing = _pictures(config, history)
    shown = "".join(f"\n![{PICTURES[name][0]}]({name})\n" for name in pictures)
    parts = (
        _head(last),
        "## Promises\n\n" + _table(["promise", "status", "threshold", "evidence"], promises),
        f"Each process has a warm-up: {', '.join(until)}. All lasting allocations are made in it, so memory may rise "
        "there in a step; the limits on memory and latency hold from its end on.\n",
        "## Figures\n\n" + _table(["figure", "value"], _figures(history, last)),
        f"## Plots\n\n{_LEGEND if pictures else missing}\n{shown}",
        _setting(config, history.device, last),
    )
    text = "\n".join(parts)
    with raising(OutputError, f"{part.path}: cannot write"):
        part.append(text.encode())
    part.commit()
    for file, content in {PAGE_FILE: _page(text, pictures), **pictures}.items():
        write_whole(config.folder / file, content.encode())


def _page(text: str, pictures: Mapping[str, str]) -> str:
    """The same as one page of HTML that needs no other file."""
    body = MarkdownIt("js-default").render(text)
    for name, svg in pictures.items():
        before, _, after = body.partition(f'<img src="{name}"')
        body = before + svg + after.partition(">")[2]
    return f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Soak</title>{_STYLE}\n{body}</html>\n'


def _plain(text: str) -> str:
    """``text`` in Markdown, without links or pictures of its own."""
    return re.sub(r"([|\[])", r"\\\1", printable(text))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_plain(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _head(last: Line) -> str:
    said, problem = "", last["problem"]
    if last["failure"] is not None:
        said = f"\nThe stream failed before block {last['block']}: {_plain(last['failure'])}\n"
    if problem is not None:
        why = "After that" if said else "The stream did not fail; the soak ended with"
        said += f"\n{why}: {_plain(problem)}\n"
    return f"# Soak: {_plain(last['end'])} after {counted(last['block'], 'block')}\n{said}"


def _figures(history: History, last: Line) -> list[list[str]]:
    newest = history.newest
    figures: dict[str, object] = {
        "processes": history.runs,
        "blocks, including those made again": history.blocks,
        "blocks made again": history.again,
        "hours of streaming": f"{last['elapsed'] / 3600:.3f}",
    }
    if newest:
        p50, p99 = (history.latency.quantile(share) for share in (0.5, 0.99))
        taken = newest["snapshots"]
        figures |= {
            "video frames": newest["frame"],
            "video": f"{newest['video_seconds']:.1f} s",
            "frames per second, at the end": f"{newest['fps']:.2f}",
            "block latency p50 after warm-up": "none" if p50 is None else f"{1e3 * p50:.1f} ms",
            "block latency p99 after warm-up": "none" if p99 is None else f"{1e3 * p99:.1f} ms",
            "longest block, including warm-up": "{:.1f} ms (block {})".format(*history.longest),
            "blocks around prompt switches": f"{history.switches}, the longest {history.slowest_switch:.1f} ms",
            "snapshots of the last process": (
                f"{taken['written']} written, {taken['skipped']} skipped" if taken else "none"
            ),
            "longest stall by a snapshot": f"{history.longest_stall:.1f} ms",
        }
    return [[name, str(value)] for name, value in figures.items()]


def _setting(config: SoakConfig, device: str, last: Line) -> str:
    if "backend" in last:
        device += f", backend {last['backend']} ({last['backend_reason']})"
    versions = f"echo-rt {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    machine = f"{platform.system()} {platform.machine()}, {_plain(device)}. All figures: `{JOURNAL_FILE}`."
    settings = json.dumps(config.settings(), indent=2)
    taken = last.get("taken") or {}
    recipe = _plain(f"Recipe {taken['recipe']} ({taken.get('recipe_reason')}).") + "\n\n" if taken.get("recipe") else ""
    return f"## Setting\n\n{versions}, {machine}\n\n{recipe}```json\n{settings}\n```\n"


# ---------------------------------------------------------------- plots

_LEGEND = (
    "Grey: the warm-up of a process. Dotted: a process began. Dashed: the threshold. Triangles: prompt switches above, "
    f"snapshots below, at most {_MARKS} of each. Axes begin at 0, or show a standard deviation, so that only what "
    "matters looks large."
)


def _pictures(config: SoakConfig, history: History) -> tuple[dict[str, str], str]:
    """Return the SVG by file name of each plot that has points, or why there is none."""
    if config.plots is False:
        return {}, "Left out, as asked."
    made = {}
    try:
        for name, (title, panels) in PICTURES.items():
            drawn = [panel for panel in panels if any(map(history.points.get, panel.curves))]
            if drawn:
                made[name] = _picture(name, title, drawn, config, history)
    except BackendError as error:
        return {}, f"Left out: {error}; then give the same command again."
    except OSError as error:  # a soak that has used up its files has a report
        return {}, f"Left out: {reason(error)}."
    return made, "There is no line to draw."


def _picture(name: str, title: str, panels: Sequence[Panel], config: SoakConfig, history: History) -> str:
    with needing("matplotlib", "--plots"):
        # Figure itself, not pyplot, which keeps every figure and asks for a display.
        from matplotlib import rc_context
        from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure: Any = Figure(figsize=(_SIZE[0], _SIZE[1] * len(panels)), layout="constrained")
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axis, panel in zip(axes, panels, strict=True):
            _draw(axis, panel, config, history)
        axes[0].set_title(title)
        axes[-1].set_xlabel("block")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


def _draw(axis: Any, panel: Panel, config: SoakConfig, history: History) -> None:
    shown = []
    for curve in panel.curves:
        if points := history.points[curve]:
            blocks, values = [x for x, _ in points], [y / panel.scale for _, y in points]
            marker = "." if len(blocks) == 1 else None  # a line of one point is invisible
            axis.plot(blocks, values, label=curve.label, linewidth=1, marker=marker)
            shown += values
    low, high = min(shown), max(shown)
    for life in _some(history.lives):
        axis.axvspan(life.first, life.warm["first_block"] if life.warm else life.last, color="grey", alpha=0.15)
        axis.axvline(life.first, color="grey", linewidth=0.7, linestyle=":")
        if life.warm is None:
            continue
        base, more, slope = history.thresholds(life.warm)[panel.threshold]
        if base is None or more is None:
            continue
        ends = (life.warm["block"], life.warm["block"] + more / slope if slope else life.last, life.last)
        limits = [(base + max(more, slope * (x - ends[0]))) / panel.scale for x in ends if x <= life.last]
        axis.plot([x for x in ends if x <= life.last], limits, color="tab:red", linewidth=1, linestyle="--")
        high = max([high, *(limit for limit in limits if limit < _ROOM * high)])
    for every, marker, y in ((config.switch_every, "v", 0.96), (config.snapshot_every, "^", 0.04)):
        if every is not None:
            at = _some(range(every, history.never, every))
            where = axis.get_xaxis_transform()
            axis.plot(at, [y] * len(at), marker, markersize=3, color="grey", transform=where)
    if panel.from_zero:
        axis.set_ylim(min(0.0, low), 1.15 * high or 1.0)
    else:
        around = max(0.6 * (high - low), 0.5 * (history.newest["latents"]["std"] or 1.0))
        axis.set_ylim((low + high) / 2 - around, (low + high) / 2 + around)
    axis.set_ylabel(panel.unit)
    axis.legend(loc="lower left", fontsize="small")


def _some(marks: Sequence[Any]) -> Sequence[Any]:
    return marks[:: 1 + len(marks) // _MARKS]
