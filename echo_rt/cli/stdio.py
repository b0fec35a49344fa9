"""Standard output and standard error as they may be: closed, on a full disk, read by someone who has left.

Errors and warnings are one line each.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, TextIO

from echo_rt.errors import EchoError, OutputError
from echo_rt.utils.wording import one_line

DEBUG_VARIABLE = "ECHO_RT_DEBUG"

# What torch and the libraries below it say, in errors of no type of their own, when memory is not there.
_NO_MEMORY = (
    "DefaultCPUAllocator",
    "alloc_cpu",
    "out of memory",
    "ALLOC_FAILED",
    "Storage size calculation overflowed",
)


def prepare() -> None:
    """Give the process the standard streams that it was started without (``2>&-``); they lead nowhere.

    Without this the next file to be opened, a video say, gets descriptor 2, and in it whatever a library has to say.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest free number is the one that is missing; children get it as they would have the real one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for the rest of the process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a prompt may hold what the terminal's encoding cannot


def say(text: str, end: str = "\n") -> None:
    """Print on standard output and see it through.

    Raises ``OutputError`` where that cannot be, ``BrokenPipeError`` where there is no reader any more.
    """
    try:
        print(text, end=end, flush=True)
    except OSError as error:
        _abandon(sys.stdout)
        if isinstance(error, BrokenPipeError):
            raise
        raise OutputError(f"standard output: cannot write: {error.strerror or error}") from None


def complain(text: str) -> None:
    """Print on standard error, if that is possible: a line that nobody gets to read is no reason to end."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        return  # there is no one to tell; release() sees to what is left in the buffer


def can_draw() -> bool:
    """Whether standard error can show what is drawn anew: it is a terminal, and rich is installed.

    Where not, the same is told in plain lines.
    """
    return sys.stderr.isatty() and find_spec("rich") is not None


def release() -> None:
    """Before the end of the process: drop what standard error does not take, which would be its exit code."""
    try:
        sys.stderr.flush()
    except OSError:
        _abandon(sys.stderr)


def _abandon(stream: TextIO) -> None:
    """Lead ``stream`` nowhere: the interpreter flushes it once more at exit, and would complain."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):
        return  # a stand-in without a file
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def _is_no_memory(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's: not imported here
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_MEMORY)


def describe(error: Exception) -> tuple[str, int]:
    """The line and the exit code for ``error``; what is not ours is named with its type and a way to see more."""
    if isinstance(error, EchoError):
        return one_line(error), error.exit_code
    if _is_no_memory(error):
        # torch may append the C++ stack, in lines of its own.
        detail = next((line.strip() for line in str(error).splitlines() if line.strip()), "nothing is left")
        return one_line(f"out of memory: {detail}; use a smaller --size"), 1
    return one_line(f"unexpected {type(error).__name__}: {error} ({DEBUG_VARIABLE}=1 shows where)"), 1


def warn(report: dict[str, Any], text: object) -> None:
    """A warning, for the reader of standard error and for the reader of the report."""
    line = one_line(text)
    report.setdefault("warnings", []).append(line)
    complain(f"echo-rt: warning: {line}")


class _RecipeHandler(logging.Handler):
    def __init__(self, report: dict[str, Any], quiet: bool) -> None:
        super().__init__()
        self._report, self._quiet = report, quiet

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            warn(self._report, record.getMessage())
        elif not self._quiet:
            complain(f"echo-rt: {one_line(record.getMessage())}")


@contextmanager
def tell_recipe(report: dict[str, Any], *, quiet: bool) -> Iterator[None]:
    """Show by which recipe a model that is loaded meanwhile runs; in what its files are not as published, as warnings.

    ``quiet``: those alone.
    """
    logger, handler = logging.getLogger("echo_rt.recipe"), _RecipeHandler(report, quiet)
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # or a warning would be told twice
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before
