"""Who may look on while a soak runs, and who may stop it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from echo_rt.soak.journal import Line
from echo_rt.soak.outcome import Verdict


class Watcher(Protocol):
    """Is told of every block and of every line; must not raise for want of a reader."""

    def block_done(self, block: int, frames: int, seconds: float) -> None:
        """``block`` took ``seconds``; the video has ``frames`` now."""

    def line_done(self, line: Line, verdicts: Sequence[Verdict]) -> None:
        """A line was written; how the promises stand after it."""


class StopSignal(Protocol):
    """Why to stop: what the command line's ``StopNow`` says."""

    @property
    def exit_code(self) -> int:
        """Of the process."""

    @property
    def reason(self) -> str:
        """In one word."""


class Stop(Protocol):
    """What the command line's ``StopRequest`` does."""

    @property
    def request(self) -> StopSignal | None:
        """None as long as nobody asked."""

    def interruptible(self) -> AbstractContextManager[None]:
        """Around what may be torn apart."""

    def after_block(self) -> AbstractContextManager[None]:
        """Around what a first request lets come to its end, and a second does not."""


class NeverStop:
    """For callers without signals."""

    request: StopSignal | None = None

    def interruptible(self) -> AbstractContextManager[None]:
        return nullcontext()

    def after_block(self) -> AbstractContextManager[None]:
        return nullcontext()
