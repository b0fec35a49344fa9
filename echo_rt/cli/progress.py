"""How far a video is: a live line on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from typing import TYPE_CHECKING

from echo_rt.cli.stdio import can_draw, complain

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_RATE_BLOCKS = 16  # the rate shown is that of the last so many blocks
_PLAIN_SECONDS = 5.0  # between two plain lines


def clock(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class ProgressReport:
    """Counts blocks and frames and keeps the reader informed on standard error, for as long as there is one.

    Args:
        total_frames: frames of the whole video, None for one without an end.
        fps: frames of one second of video.
        quiet: count only.
        begun_at: block and frame that this run goes on from; what is counted is made by this run.
    """

    def __init__(
        self, total_frames: int | None, fps: float, *, quiet: bool = False, begun_at: tuple[int, int] = (0, 0)
    ) -> None:
        self.total_frames = total_frames
        self.fps = fps
        self._first_block, self._first_frame = begun_at
        self.frames = 0
        self.blocks = 0
        self._started = time.monotonic()
        self._marks: deque[tuple[float, int]] = deque([(self._started, 0)], maxlen=_RATE_BLOCKS + 1)
        self._quiet = quiet
        self._next_line = self._started
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if not quiet and can_draw():
            self._open_bar()

    def _open_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        self._bar = Progress(
            BarColumn(bar_width=20),
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=Console(stderr=True),
            # No thread: one that fails to draw would end with a traceback; and only blocks change what is to be seen.
            auto_refresh=False,
        )
        self._task = self._bar.add_task("first block", total=self.total_frames)
        try:
            self._bar.start()
        except OSError:
            self.close()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    @property
    def rate(self) -> float:
        """Frames made in a second of late; 0 before the first."""
        (start, first), (end, last) = self._marks[0], self._marks[-1]
        return (last - first) / (end - start) if end > start else 0.0

    def block_done(self, frames: int, prompt: str) -> None:
        """One more block, ``frames`` more frames; ``prompt`` is the one it shows."""
        self.blocks += 1
        self.frames += frames
        now = time.monotonic()
        self._marks.append((now, self.frames))
        if self._quiet:
            return
        line = self._line(prompt)
        if self._bar is not None and self._task is not None:
            try:
                reached = self._first_frame + self.frames
                self._bar.update(self._task, completed=reached, description=line, refresh=True)
            except OSError:  # the terminal is gone, the video goes on
                self._quiet = True
                self.close()
        elif now >= self._next_line:
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
        bar, self._bar = self._bar, None
        if bar is not None:
            with contextlib.suppress(OSError):  # a line that cannot be drawn needs no taking off
                bar.stop()
