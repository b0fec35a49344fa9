"""Orderly stops by Ctrl-C, SIGTERM and SIGHUP.

SIGINT is handled even if it was ignored when the process began: a shell without job control starts background jobs
with SIGINT ignored, and ``kill -INT`` is how a script ends an endless video. So Ctrl-C at the terminal of such a script
ends the video too, in the same orderly way. An ignored SIGHUP stays ignored: that is ``nohup``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


class StopNow(BaseException):
    """A signal asked to stop and there is nothing to finish first. Not an ``Exception``: only ``main`` handles it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """The shell's code for a process that a signal ended."""
        return 128 + self.signum

    @property
    def reason(self) -> str:
        """``interrupted`` for Ctrl-C, ``terminated`` for the others."""
        return "interrupted" if self.signum == signal.SIGINT else "terminated"


class StopRequest:
    """While entered, SIGINT, SIGTERM and SIGHUP are noted in :attr:`request` instead of ending the process.

    So code that writes files is never interrupted. Three kinds of code may be: :meth:`interruptible` code raises
    :class:`StopNow` at the first signal, code in :meth:`after_block` at the second, and :meth:`importing` ends the
    process, after ``last_words``. Exit restores the handlers. Signals reach only a main thread; in another thread this
    does nothing.
    """

    def __init__(self, last_words: Callable[[StopNow], None] = lambda request: None) -> None:
        self.request: StopNow | None = None
        self._last_words, self._importing = last_words, False
        self._raise_from: int | None = None
        self._signals = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
                    self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._previous.items():
            # None: a handler of C code, which Python cannot restore.
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raise ``StopNow`` at any signal, even an earlier one that was noted.

        Libraries can swallow it or break of it; then it is raised at the end, in place of their error.
        """
        with self._raising_from(1):
            if self.request is None:
                try:
                    yield
                except Exception:
                    if self.request is None:
                        raise
            if self.request is not None:
                raise self.request from None

    @contextlib.contextmanager
    def importing(self) -> Iterator[None]:
        """End the process at any signal, as imports take seconds and do not bear what is raised amid them.

        For code that holds nothing yet: no destructor and no ``finally`` runs.
        """
        self._importing = True
        try:
            with self.interruptible():
                yield
        finally:
            self._importing = False

    def after_block(self) -> contextlib.AbstractContextManager[None]:
        """Note the first signal, so that the block is finished, and raise ``StopNow`` at the next."""
        return self._raising_from(2)

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
        at_once = self._signals >= self._raise_from
        told = b"stopping" if at_once else b"stopping after this block (once more: at once)"
        # Not print: the signal may interrupt one, and buffered streams refuse to be re-entered.
        with contextlib.suppress(OSError):  # a message that cannot be shown must not become an error of the block
            os.write(2, b"\necho-rt: " + told + b"\n")
        if at_once:
            self._raise_from = None  # only once: from here on files are being closed
            if self._importing:
                self._last_words(self.request)
                os._exit(self.request.exit_code)
            raise self.request
