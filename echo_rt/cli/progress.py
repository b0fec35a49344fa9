"""Progress of a video or a soak: live on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from echo_rt.cli.stdio import complain
from echo_rt.soak.config import SoakConfig
from echo_rt.utils.wording import clock, counted, printable

if TYPE_CHECKING:
    from rich.console import RenderableType

    from echo_rt.soak.checks import Verdict
    from echo_rt.soak.journal import Line

_RATE_BLOCKS = 16  # the rate is that of the latest so many blocks
_PLAIN_SECONDS = 5.0  # between two plain lines
_DRAWING_SECONDS = 0.25  # between two drawings of a panel
_BAR_WIDTH = 20  # characters
_MEBIBYTE = 2**20
_COLOURS = {"kept": "green", "broken": "bold red", "not checked": "dim"}


class Display:
    """A place on the terminal that rich redraws: ``live`` if standard error is a terminal and rich is installed.

    A terminal that is lost ends the display, not the command. ``plain``: lines are shown instead.
    """

    def __init__(self, *, quiet: bool) -> None:
        self.live: Any = None
        if not quiet and sys.stderr.isatty() and find_spec("rich") is not None:
            from rich.console import Console
            from rich.live import Live

            # Without a thread: one that fails to draw would end with a traceback.
            self.live = Live(console=Console(stderr=True), auto_refresh=False)
            with contextlib.suppress(OSError):
                self.live.start()
        self.plain = not quiet and self.live is None

    def draw(self, shown: RenderableType) -> None:
        """Replace what is shown."""
        with contextlib.suppress(OSError):
            self.live.update(shown, refresh=True)

    def close(self) -> None:
        """Leave what was drawn last; may be called twice."""
        live, self.live = self.live, None
        if live is not None:
            with contextlib.suppress(OSError):
                live.stop()


class ProgressReport(Display):
    """Counts blocks and frames, and unless ``quiet`` shows them on standard error.

    ``total_frames`` is None for a video without an end, of which ``fps`` are a second. ``begun_at``: block and frame
    that this run resumes at; ``blocks`` and ``frames`` count those of this run.
    """

    def __init__(
        self, total_frames: int | None, fps: float, *, quiet: bool = False, begun_at: tuple[int, int] = (0, 0)
    ) -> None:
        super().__init__(quiet=quiet)
        self._total, self._fps = total_frames, fps
        self._first_block, self._first_frame = begun_at
        self.frames = self.blocks = 0
        self._started = self._next_line = time.monotonic()
        self._marks: deque[tuple[float, int]] = deque([(self._started, 0)], maxlen=_RATE_BLOCKS + 1)

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    @property
    def rate(self) -> float:
        """Frames per second over the latest blocks; 0 before the first."""
        (start, first), (end, last) = self._marks[0], self._marks[-1]
        return (last - first) / (end - start) if end > start else 0.0

    def block_done(self, frames: int, prompt: str) -> None:
        """Count one more block of ``frames`` frames, made with ``prompt``."""
        self.blocks += 1
        self.frames += frames
        now = time.monotonic()
        self._marks.append((now, self.frames))
        if self.live:
            self.draw(self._bar(self._line(prompt)))
        elif self.plain and now >= self._next_line:
            self._next_line = now + _PLAIN_SECONDS
            complain(f"echo-rt: {self._line(prompt)}")

    def _line(self, prompt: str) -> str:
        total = "" if self._total is None else f"/{self._total}"
        reached = self._first_frame + self.frames
        parts = [
            counted(self._first_block + self.blocks, "block"),
            f"{reached}{total} frames",
            f"{clock(reached / self._fps)} of video",
            f"{self.rate:.1f} fps",
            f"{clock(self.elapsed)} elapsed",
        ]
        if self._total is not None and self.rate > 0:
            parts.append(f"{clock((self._total - reached) / self.rate)} left")
        return printable(" · ".join([*parts, prompt]))

    def _bar(self, line: str) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Column, Table
        from rich.text import Text

        row = Table.grid(Column(), Column(no_wrap=True, overflow="ellipsis"), padding=(0, 1))
        row.add_row(ProgressBar(self._total, self._first_frame + self.frames, width=_BAR_WIDTH), Text(line))
        return row


def rows(line: Line) -> dict[str, str]:
    """The figures of a soak's line for a reader."""
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


class Panel(Display):
    """A watcher of a soak that shows it on standard error."""

    def __init__(self, config: SoakConfig, *, quiet: bool = False) -> None:
        super().__init__(quiet=quiet)
        self._total = "" if config.blocks is None else f" of {config.blocks}"
        self._line: Line | None = None
        self._verdicts: Sequence[Verdict] = ()
        self._next_drawing = 0.0

    def block_done(self, block: int, frames: int, seconds: float) -> None:
        """Redraw now and then."""
        now = time.monotonic()
        if self.live and now >= self._next_drawing:
            self._next_drawing = now + _DRAWING_SECONDS
            self.draw(self._box(f"{counted(block + 1, 'block')}{self._total}, {1e3 * seconds:.0f} ms"))

    def line_done(self, line: Line, verdicts: Sequence[Verdict]) -> None:
        """Show the figures of ``line``."""
        self._line, self._verdicts = line, verdicts
        if self.plain:
            broken = ", ".join(verdict.promise for verdict in verdicts if verdict.status == "broken")
            shown = " · ".join(f"{name} {value}" for name, value in rows(line).items())
            promises = f"BROKEN: {broken}" if broken else "no promise broken"
            complain(f"echo-rt: {counted(line['block'] + 1, 'block')}{self._total} · {shown} · {promises}")

    def _box(self, title: str) -> RenderableType:
        from rich.console import Group
        from rich.panel import Panel as Box
        from rich.table import Table
        from rich.text import Text

        figures, promises = Table.grid(padding=(0, 2)), Table.grid(padding=(0, 2))
        for name, value in rows(self._line).items() if self._line else [("", "first interval")]:
            figures.add_row(Text(name, style="dim"), Text(value))
        for one in self._verdicts:
            status = Text(one.status.value, style=_COLOURS[one.status])
            promises.add_row(status, Text(one.promise), Text(printable(one.evidence)))
        return Box(Group(figures, Text(""), promises), title=f"echo-rt soak · {title}", title_align="left")
