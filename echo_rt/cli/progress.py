"""Progress of a video: a live line on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from typing import TYPE_CHECKING

from echo_rt.cli.stdio import can_draw, complain
from echo_rt.utils.wording import clock

if TYPE_CHECKING:
    from rich.progress import Progress

_RATE_BLOCKS = 16  # the rate shown is that of the last so many blocks
_PLAIN_SECONDS = 5.0  # between two plain lines


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
        self._bar: Progress | None = None
        if not quiet and can_draw():
            self._bar = _open_bar(self.total_frames)

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
        """Count one more block of ``frames`` frames; ``prompt`` is the one it shows."""
        self.blocks += 1
        self.frames += frames
        now = time.monotonic()
        self._marks.append((now, self.frames))
        reached, line = self._first_frame + self.frames, self._line(prompt)
        if self._bar is not None:
            with contextlib.suppress(OSError):  # a lost terminal does not end the video
                self._bar.update(self._bar.task_ids[0], completed=reached, description=line, refresh=True)
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
        return " · ".join([*parts, prompt])

    def close(self) -> None:
        """Take the live line off; may be called twice."""
        bar, self._bar, self._quiet = self._bar, None, True
        if bar is not None:
            with contextlib.suppress(OSError):
                bar.stop()


def _open_bar(total: int | None) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    text = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
    # Without a thread: one that fails to draw would end with a traceback, and only blocks change the line.
    bar = Progress(BarColumn(bar_width=20), text, console=Console(stderr=True), auto_refresh=False)
    bar.add_task("first block", total=total)
    with contextlib.suppress(OSError):
        bar.start()
    return bar
