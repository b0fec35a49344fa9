"""``report.md``: what was run, how each promise stands, what the figures were; with pictures where they can be had."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from echo_rt.soak import plots
from echo_rt.soak.config import SoakConfig
from echo_rt.soak.curves import Curves
from echo_rt.soak.journal import JOURNAL_FILE, Line, read_lines
from echo_rt.soak.latency import Histogram
from echo_rt.soak.outcome import Verdict
from echo_rt.utils.atomic_file import write_whole
from echo_rt.utils.build_info import __version__
from echo_rt.utils.wording import counted

REPORT_FILE = "report.md"


class _Totals:
    """What the whole journal adds up to, block counts and latencies of blocks made twice included."""

    def __init__(self) -> None:
        self.latency = Histogram()
        self.longest = (0.0, 0)
        self.made = self.runs = self.switches = 0
        self.slowest_switch = self.longest_stall = 0.0
        self.newest: Line = {}

    def see(self, line: Line) -> Line:
        self.runs = line["run"]
        if "blocks" in line:
            self.newest = line
            self.made += line["blocks"]
            self.latency.merge(Histogram(line["latency"]["bins"]))
            self.longest = max(self.longest, (line["latency"]["max"], line["latency"]["max_block"]))
            self.switches += line["switch_latency"]["blocks"]
            self.slowest_switch = max(self.slowest_switch, line["switch_latency"]["max"] or 0.0)
            self.longest_stall = max(self.longest_stall, (line["snapshots"] or {}).get("stall") or 0.0)
        return line


def device_name(device: torch.device) -> str:
    """For the report. To be asked for before the soak: a GPU that is lost does not answer."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def write_report(config: SoakConfig, verdicts: Sequence[Verdict], last: Line, device: str = "CPU") -> Path:
    """Make the report of the journal in ``config.out``; ``last`` is its last line. Raises ``OutputError``."""
    totals = _Totals()
    curves = Curves.of(totals.see(line) for line in read_lines(config.folder))
    path = config.folder / REPORT_FILE
    parts = [_head(last), _promises(verdicts), _figures(totals, last), _pictures(config, curves)]
    parts.append(_setting(config, device, last))
    write_whole(path, "\n".join(parts).encode())
    return path


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _head(last: Line) -> str:
    said = ""
    if last["failure"] is not None:
        said = f"\nThe stream failed before block {last['block']}: {last['failure']}\n"
        if last["problem"] is not None:
            said += f"\nAfter that: {last['problem']}\n"
    elif last["problem"] is not None:
        said = f"\nWhat ended it was not the stream: {last['problem']}\n"
    return f"# Soak: {last['end']} after {counted(last['block'], 'block')}\n{said}"


def _promises(verdicts: Sequence[Verdict]) -> str:
    rows = [[v.promise, f"**{v.status.value}**", v.limit, v.evidence] for v in verdicts]
    return "## Promises\n\n" + _table(["promise", "status", "threshold", "evidence"], rows)


def _milliseconds(seconds: float | None) -> str:
    return "none" if seconds is None else f"{1e3 * seconds:.1f} ms"


def _figures(totals: _Totals, last: Line) -> str:
    newest, elapsed = totals.newest, last["elapsed"]
    rows = [
        ["processes", str(totals.runs)],
        ["blocks, those made again included", str(totals.made)],
        ["hours of streaming", f"{elapsed / 3600:.3f}"],
    ]
    if newest:
        latency, longest = totals.latency, totals.longest
        rows += [
            ["video frames", str(newest["frame"])],
            ["video", f"{newest['video_seconds']:.1f} s"],
            ["frames a second, at the end", f"{newest['fps']:.2f}"],
            ["block latency p50 after warm-up", _milliseconds(latency.quantile(0.5))],
            ["block latency p99 after warm-up", _milliseconds(latency.quantile(0.99))],
            ["longest block, warm-up included", f"{longest[0]:.1f} ms (block {longest[1]})"],
            ["blocks around prompt switches", f"{totals.switches}, the longest {totals.slowest_switch:.1f} ms"],
            ["snapshots, by the last process", _snapshots(newest)],
            ["longest stall by a snapshot", f"{totals.longest_stall:.1f} ms"],
        ]
    return "## Figures\n\n" + _table(["figure", "value"], rows)


def _snapshots(line: Line) -> str:
    taken = line["snapshots"]
    return "none asked for" if taken is None else f"{taken['written']} written, {taken['skipped']} skipped"


def _pictures(config: SoakConfig, curves: Curves) -> str:
    if config.plots is False:
        return "## Plots\n\nLeft out, as asked.\n"
    if not plots.available():
        return f"## Plots\n\nLeft out: {plots.HOW_TO_GET_THEM}; then give the same command again.\n"
    drawn = plots.draw(config.folder, curves)
    return "## Plots\n\n" + "\n".join(f"![{title}]({name})\n" for title, name in drawn)


def _setting(config: SoakConfig, device: str, last: Line) -> str:
    facts = json.dumps(config.facts(), indent=2)
    if "backend" in last:
        device += f", backend {last['backend']} ({last['backend_reason']})"
    return (
        f"## Setting\n\necho-rt {__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}, {device}. All figures: `{JOURNAL_FILE}`.\n\n```json\n{facts}\n```\n"
    )
