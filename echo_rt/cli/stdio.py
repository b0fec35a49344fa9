"""Standard output and standard error, even if they are closed, on a full disk or without a reader.

All text for the terminal goes through here: errors and warnings are one line each, and nothing that a file or a user
says reaches the terminal as an escape sequence or as a line of its own.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
from typing import Any, TextIO

import click

from echo_rt.errors import EchoError, OutputError
from echo_rt.utils.wording import first_line, one_line, printable

DEBUG_VARIABLE = "ECHO_RT_DEBUG"

# Signs of missing memory in errors of torch and its libraries that have no type of their own.
_NO_MEMORY = (
    "DefaultCPUAllocator",
    "alloc_cpu",
    "out of memory",
    "ALLOC_FAILED",
    "Storage size calculation overflowed",
)


def prepare() -> None:
    """Replace the standard streams that the process was started without (``2>&-``) by ones that lead nowhere.

    Otherwise the next opened file, such as a video, gets descriptor 2, and the messages of libraries are written to it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest free number is the missing one; children inherit it like a real one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - until the process ends
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a prompt may hold characters that the terminal cannot show


def say(*lines: str) -> None:
    """Print lines and flush; ``OutputError`` where that fails, ``BrokenPipeError`` where the reader has left."""
    try:
        print(*map(printable, lines), sep="\n", flush=True)
    except OSError as error:
        _abandon(sys.stdout)
        if isinstance(error, BrokenPipeError):
            raise
        raise OutputError(f"standard output: cannot write: {error.strerror or error}") from None


def complain(*lines: str) -> None:
    """Print lines on standard error, if possible: a line without a reader is no reason to end."""
    try:
        print(*map(printable, lines), sep="\n", file=sys.stderr, flush=True)
    except OSError:
        return  # release() drops what is left in the buffer


def release() -> None:
    """Drop what standard error does not take: at the end of the process it would change the exit code."""
    try:
        sys.stderr.flush()
    except OSError:
        _abandon(sys.stderr)


def _abandon(stream: TextIO) -> None:
    """Let ``stream`` lead nowhere: the interpreter flushes it once more at exit, and would complain."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):
        return  # a stand-in without a file
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


_EXTRA = "Got unexpected extra argument"


def _is_no_memory(error: Exception) -> bool:
    if isinstance(error, RuntimeError):
        return type(error).__name__ == "OutOfMemoryError" or any(sign in str(error) for sign in _NO_MEMORY)
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)


def describe(error: Exception) -> tuple[str, int]:
    """Return the line and the exit code for ``error``; an unexpected one with its type and a way to see more."""
    if isinstance(error, EchoError):
        return one_line(error), error.exit_code
    if isinstance(error, click.UsageError):  # what is wrong with the arguments, which option it is, where to read on
        message = error.format_message()
        if isinstance(error, click.NoSuchOption) and error.possibilities:  # click sorts them by the alphabet
            message = f"{error.message} Did you mean {' or '.join(map(repr, error.possibilities))}?"
        if isinstance(error, click.BadParameter) and error.param is not None and error.message:
            message = f"{'/'.join(error.param.opts)}: {error.message}"
        if message.startswith(_EXTRA) and error.ctx and any("--prompt" in one.opts for one in error.ctx.command.params):
            message += "; a text is given as --prompt TEXT"
        page = "echo-rt" if error.ctx is None else error.ctx.command_path
        return one_line(f"{message} (see {page} --help)"), error.exit_code
    if _is_no_memory(error):  # only the first line: torch may append the C++ stack
        return one_line(f"out of memory: {first_line(error)}; use a smaller --size"), 1
    if isinstance(error, ImportError):  # torch, for example
        return one_line(f"{first_line(error)}; echo-rt doctor shows what is missing ({DEBUG_VARIABLE}=1: where)"), 1
    return one_line(f"unexpected {type(error).__name__}: {error} ({DEBUG_VARIABLE}=1 shows where)"), 1


def warn(report: dict[str, Any], text: object) -> None:
    """Print a warning on standard error, and add it to the report."""
    line = one_line(text)
    report.setdefault("warnings", []).append(line)
    complain(f"echo-rt: warning: {line}")


def say_loading(arguments: Any) -> None:
    """Say on standard error, before torch is imported, that the model is loaded; not with ``--quiet`` or ``--json``."""
    if not (arguments.json or getattr(arguments, "quiet", False)):
        complain(f"echo-rt: loading {arguments.model} ...")


class ShownLog(logging.Handler):
    """While entered, shows what echo_rt logs: warnings, and unless ``quiet`` what it runs, at level INFO."""

    def __init__(self, report: dict[str, Any], *, quiet: bool) -> None:
        super().__init__(logging.WARNING if quiet else logging.INFO)
        self._report, self._logger = report, logging.getLogger("echo_rt")

    def emit(self, record: logging.LogRecord) -> None:
        """Show one line; a warning is one of the report too."""
        if record.levelno >= logging.WARNING:
            warn(self._report, record.getMessage())
        else:
            complain(f"echo-rt: {one_line(record.getMessage())}")

    def __enter__(self) -> None:
        self._before = self._logger.level
        self._logger.setLevel(min(self.level, self._logger.getEffectiveLevel()))
        self._logger.addHandler(self)

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self)
        self._logger.setLevel(self._before)
