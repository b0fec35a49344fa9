"""Stopping in an orderly way: what Ctrl-C and SIGTERM do depends on what is going on.

SIGINT is taken also where it was ignored when the process began, on purpose. A shell without job control, which is
every script, starts its background jobs that way; and ``kill -INT`` is how a script ends a video that has no end. The
price: Ctrl-C at the terminal of such a script ends the video too, in the same orderly way. An ignored SIGHUP stays
ignored: that is ``nohup``, which somebody asked for.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

_HANG_UP = getattr(signal, "SIGHUP", None)


class StopNow(BaseException):
    """A signal asked to stop and there is nothing to finish first. Not an ``Exception``: only ``main`` handles it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum

    @classmethod
    def of_keyboard(cls) -> StopNow:
        """What a ``KeyboardInterrupt`` stands for."""
        return cls(signal.SIGINT)

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that a signal ended."""
        return 128 + self.signum

    @property
    def reason(self) -> str:
        """``interrupted`` for Ctrl-C, ``terminated`` for the others."""
        return "interrupted" if self.signum == signal.SIGINT else "terminated"


class StopRequest:
    """While entered, SIGINT, SIGTERM and SIGHUP are noted in :attr:`request` instead of ending the process.

    So code that writes files is never torn apart. What may be: :meth:`interruptible` code raises :class:`StopNow`
    at the first signal, code in :meth:`after_block` at the second. The handlers of before come back on exit. Only a
    main thread gets signals; in another one this changes nothing.
    """

    def __init__(self) -> None:
        self.request: StopNow | None = None
        self._raise_from: int | None = None
        self._signals = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for signum in filter(None, (signal.SIGINT, signal.SIGTERM, _HANG_UP)):
                # A hang-up that is ignored is nohup's doing.
                if signum != _HANG_UP or signal.getsignal(signum) != signal.SIG_IGN:
                    self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._previous.items():
            # None: set by something other than Python, which cannot be put back from here.
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Any signal, also one that was noted before, raises ``StopNow``."""
        with self._raising_from(1):
            if self.request is not None:
                raise self.request
            yield

    @contextlib.contextmanager
    def after_block(self) -> Iterator[None]:
        """The first signal is noted, so that the block comes to its end; the next raises ``StopNow``."""
        with self._raising_from(2):
            yield

    @contextlib.contextmanager
    def _raising_from(self, count: int) -> Iterator[None]:
        self._raise_from = count
        try:
            yield
        finally:
            self._raise_from = None

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self._signals += 1
        self.request = StopNow(signum)
        if self._raise_from is None:
            return
        if self._signals >= self._raise_from:
            self._raise_from = None  # once is enough: from here on files are being closed
            raise self.request
        # Not print: the signal may have come in the middle of one, and buffered streams refuse to be re-entered.
        with contextlib.suppress(OSError):  # a message that cannot be shown must not become an error of the block
            os.write(2, b"\necho-rt: stopping after this block (once more: at once)\n")
