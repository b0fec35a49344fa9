"""Progress of a video: a live line on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from importlib.util import find_spec
from typing import TYPE_CHECKING

from echo_rt.cli.stdio import complain
from echo_rt.utils.wording import clock, printable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

_RATE_BLOCKS = 16  # the rate is that of the latest so many blocks
_PLAIN_SECONDS = 5.0  # between two plain lines
_BAR_WIDTH = 20  # characters


class Display:
    """A place on the terminal that rich redraws: ``on`` if standard error is a terminal and rich is installed.

    A terminal that is lost ends the display, not the command.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._live: Live | None = None
        self.on = not quiet and sys.stderr.isatty() and find_spec("rich") is not None
        if self.on:
            from rich.console import Console
            from rich.live import Live

            # Without a thread: one that fails to draw would end with a traceback.
            self._live = Live(console=Console(stderr=True), auto_refresh=False)
            with contextlib.suppress(OSError):
                self._live.start()

    def draw(self, shown: RenderableType) -> None:
        """Replace what is shown."""
        if self._live is not None:
            with contextlib.suppress(OSError):
                self._live.update(shown, refresh=True)

    def close(self) -> None:
        """Leave what was drawn last; may be called twice."""
        live, self._live = self._live, None
        if live is not None:
            with contextlib.suppress(OSError):
                live.stop()


class ProgressReport:
    """Counts blocks and frames, and shows them on standard error.

    Args:
        total_frames: frames of the whole video, None for one without an end.
        fps: frames per second of video.
        quiet: count only.
        begun_at: block and frame that this run resumes at; ``blocks`` and ``frames`` count those of this run.
    """

    def __init__(
        self, total_frames: int | None, fps: float, *, quiet: bool = False, begun_at: tuple[int, int] = (0, 0)
    ) -> None:
        self.total_frames = total_frames
        self.fps = fps
        self._first_block, self._first_frame = begun_at
        self.frames = self.blocks = 0
        self._started = self._next_line = time.monotonic()
        self._marks: deque[tuple[float, int]] = deque([(self._started, 0)], maxlen=_RATE_BLOCKS + 1)
        self._quiet = quiet
        self._display = Display(quiet=quiet)

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
        line = self._line(prompt)
        if self._display.on:
            self._display.draw(_bar(line, self._first_frame + self.frames, self.total_frames))
        elif not self._quiet and now >= self._next_line:
            self._next_line = now + _PLAIN_SECONDS
            complain(f"echo-rt: {line}")

    def _line(self, prompt: str) -> str:
        total = "" if self.total_frames is None else f"/{self.total_frames}"
        reached = self._first_frame + self.frames
        parts = [
            f"block {self._first_block + self.blocks}",
            f"{reached}{total} frames",
            f"{clock(reached / self.fps)} of video",
            f"{self.rate:.1f} fps",
            f"{clock(self.elapsed)} elapsed",
        ]
        if self.total_frames is not None and self.rate > 0:
            parts.append(f"{clock((self.total_frames - reached) / self.rate)} left")
        return printable(" · ".join([*parts, prompt]))

    def close(self) -> None:
        """End the live line; may be called twice."""
        self._display.close()


def _bar(line: str, reached: int, total: int | None) -> RenderableType:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    row = Table.grid(padding=(0, 1))
    row.add_column()
    row.add_column(no_wrap=True, overflow="ellipsis")
    row.add_row(ProgressBar(total, reached, width=_BAR_WIDTH), Text(line))
    return row
