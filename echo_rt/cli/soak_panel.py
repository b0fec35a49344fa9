"""State of a soak: a live panel on a terminal, a plain line per interval elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from echo_rt.cli.progress import Display
from echo_rt.cli.stdio import complain
from echo_rt.soak.checks import Status, Verdict
from echo_rt.soak.config import SoakConfig
from echo_rt.soak.journal import Line
from echo_rt.utils.wording import clock, counted, printable

_BETWEEN_DRAWINGS = 0.25  # seconds
_MEBIBYTE = 2**20
_COLOURS = {Status.KEPT: "green", Status.BROKEN: "bold red", Status.UNCHECKED: "dim"}


def rows(line: Line) -> dict[str, str]:
    """The figures of a line for a reader."""
    latency, place, device, gpu = line["latency"], line["position"], line["device"], line["gpu"]
    host, state, latents, video = line["host"]["rss"], line["memory_state"], line["latents"], line["video"]
    shown = {
        "video": f"{clock(line['video_seconds'])} ({counted(line['frame'], 'frame')})",
        "rate": f"{line['fps']:.1f} fps",
        "latency": f"p50 {_number(latency['p50'])}  p99 {_number(latency['p99'])}  max {_number(latency['max'])} ms",
        "host memory": "unknown" if host is None else f"{host / _MEBIBYTE:.1f} MiB",
    }
    if device is not None:
        allocated, reserved = device["allocated"] / _MEBIBYTE, device["reserved"] / _MEBIBYTE
        shown["device memory"] = f"{allocated:.1f} MiB allocated, {reserved:.1f} reserved"
    if gpu is not None:
        power = None if gpu["power_mw"] is None else gpu["power_mw"] / 1e3
        text = f"{_number(gpu['temperature_c'])} °C  {_number(gpu['sm_clock_mhz'])} MHz  {_number(power)} W"
        shown["GPU"] = f"{text}  uncorrected ECC errors {_number(gpu['ecc_uncorrected'])}"
    return shown | {
        "position": f"newest id {place['newest_id']}, shift {place['shift']}",
        "memory state": f"norm {_number(state['norm'])}, gate {_number(state['gate_mean'])}",
        "latents": f"mean {_number(latents['mean'])}, deviation {_number(latents['std'])}",
        "pixels": f"{_number(video['min'])} .. {_number(video['max'])} before clamping",
    }


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


class Panel:
    """A watcher of a soak that shows it on standard error."""

    def __init__(self, config: SoakConfig, *, quiet: bool = False) -> None:
        self._total = "" if config.blocks is None else f" of {config.blocks}"
        self._line: Line | None = None
        self._verdicts: Sequence[Verdict] = ()
        self._next_drawing = 0.0
        self._quiet = quiet
        self._display = Display(quiet=quiet)

    def block_done(self, block: int, frames: int, seconds: float) -> None:
        """Redraw now and then."""
        now = time.monotonic()
        if self._display.on and now >= self._next_drawing:
            self._next_drawing = now + _BETWEEN_DRAWINGS
            self._display.draw(self._box(f"block {block}{self._total}, {1e3 * seconds:.0f} ms"))

    def line_done(self, line: Line, verdicts: Sequence[Verdict]) -> None:
        """Show the figures of ``line``."""
        self._line, self._verdicts = line, verdicts
        if not self._display.on and not self._quiet:
            broken = [verdict.promise for verdict in verdicts if verdict.status is Status.BROKEN]
            shown = " · ".join(f"{name} {value}" for name, value in rows(line).items())
            promises = f"BROKEN: {', '.join(broken)}" if broken else "no promise broken"
            complain(f"echo-rt: block {line['block']}{self._total} · {shown} · {promises}")

    def _box(self, title: str) -> Any:
        from rich.console import Group
        from rich.panel import Panel as Box
        from rich.table import Table
        from rich.text import Text

        body: list[Any] = [Text("first interval")]
        if self._line is not None:
            figures, promises = Table.grid(padding=(0, 2)), Table.grid(padding=(0, 2))
            for name, value in rows(self._line).items():
                figures.add_row(Text(name, style="dim"), Text(value))
            for one in self._verdicts:
                status = Text(one.status.value, style=_COLOURS[one.status])
                promises.add_row(status, Text(one.promise), Text(printable(one.evidence)))
            body = [figures, Text(""), promises]
        return Box(Group(*body), title=f"echo-rt soak · {title}", title_align="left")

    def close(self) -> None:
        """Leave the panel as it was drawn last; may be called twice."""
        self._display.close()
