"""Errors and warnings in one line each."""

from __future__ import annotations

import errno
from typing import Any

from echo_rt.cli.streams import complain
from echo_rt.errors import EchoError
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
