"""Forked processes, which cannot use a runtime, and errors, which must not hold its memory.

A fork copies memory and no threads. Torch's pool of CPU threads is gone in it, and an operation that needs the pool
waits forever; CUDA refuses to work at all; and a lock that another thread held stays locked.
"""

from __future__ import annotations

import functools
import os
import traceback
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from echo_rt.errors import BackendError, EchoError, StreamError

P = ParamSpec("P")
R = TypeVar("R")

_SPAWN = "start the process with multiprocessing's 'spawn'"

# The process that first loaded a runtime: a fork inherits the number, which is not its own.
_first_loaded_in: int | None = None


class ProcessGuard:
    """Remembers the process that it was made in, and refuses forks of it."""

    def __init__(self) -> None:
        self._process = os.getpid()

    @property
    def left(self) -> bool:
        """Whether this process is a fork."""
        return os.getpid() != self._process

    def require(self, what: str) -> None:
        """Raise :class:`StreamError` in a fork."""
        if self.left:
            raise StreamError(
                f"the {what} belongs to process {self._process}, and this is {os.getpid()}, a fork of it: "
                "load a runtime in the process that uses it"
            )


def require_cuda_usable() -> None:
    """Raise :class:`BackendError` in a fork of a process that uses CUDA."""
    if torch.cuda._is_in_bad_fork():
        raise BackendError(f"this process was forked from one that uses CUDA, which works in no fork: {_SPAWN}")


def note_loading(device: torch.device) -> None:
    """Note that a runtime loads on ``device``; :class:`BackendError` in a process where it would hang."""
    global _first_loaded_in
    if _first_loaded_in is None:
        _first_loaded_in = os.getpid()
    if _first_loaded_in != os.getpid() and device.type == "cpu" and torch.get_num_threads() > 1:
        raise BackendError(
            "this process was forked from one that has loaded a runtime, and torch's CPU threads hang in a fork: "
            f"{_SPAWN}, or call torch.set_num_threads(1) in it before anything else"
        )


def release_on_error(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap ``function`` so that its errors hold no memory: tracebacks keep their lines, and frames drop their tensors.

    A caller may load a smaller model in the ``except`` clause of an error about memory. There the exception is alive,
    and so is every frame in its traceback, with its tensors. Torch's errors about memory are of several subclasses of
    ``RuntimeError``.
    """

    @functools.wraps(function)
    def freeing(*arguments: P.args, **options: P.kwargs) -> R:
        try:
            return function(*arguments, **options)
        except (EchoError, RuntimeError, MemoryError) as error:
            free(error)
            del arguments, options  # this frame is one of them
            raise

    return freeing


def free(error: BaseException) -> None:
    """Release the local variables of all finished frames behind ``error``."""
    behind: list[BaseException | None] = [error]
    seen: list[BaseException] = []
    while behind:
        one = behind.pop()
        if one is None or any(one is other for other in seen):  # libraries can chain errors into a ring
            continue
        seen.append(one)
        traceback.clear_frames(one.__traceback__)
        behind += [one.__cause__, one.__context__]
