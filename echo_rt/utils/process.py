"""Forked processes, where a runtime cannot be used, and failures, which must not keep its memory.

A fork copies memory and no threads. Torch's pool of CPU threads is gone in it, and an operation that asks the pool
waits for ever; CUDA refuses to work at all; and a lock that another thread held stays locked.
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

# The process that first loaded a runtime: a fork inherits the number, and so learns that it is one.
_first_loaded_in: int | None = None


class ProcessGuard:
    """Knows the process that it was made in, and refuses its forks."""

    def __init__(self) -> None:
        self._process = os.getpid()

    @property
    def left(self) -> bool:
        """Whether this is another process, a fork of it."""
        return os.getpid() != self._process

    def require(self, what: str) -> None:
        """:class:`StreamError` in a fork."""
        if self.left:
            raise StreamError(
                f"the {what} belongs to process {self._process}, and this is {os.getpid()}, a fork of it: "
                "load a runtime in the process that uses it"
            )


def require_cuda_usable() -> None:
    """:class:`BackendError` in a fork of a process that uses CUDA."""
    if torch.cuda._is_in_bad_fork():
        raise BackendError(f"this process was forked from one that uses CUDA, which works in no fork: {_SPAWN}")


def note_loading(device: torch.device) -> None:
    """A runtime is about to load on ``device``; :class:`BackendError` where it would hang."""
    global _first_loaded_in
    if _first_loaded_in is None:
        _first_loaded_in = os.getpid()
    if _first_loaded_in != os.getpid() and device.type == "cpu" and torch.get_num_threads() > 1:
        raise BackendError(
            "this process was forked from one that has loaded a runtime, and torch's CPU threads hang in a fork: "
            f"{_SPAWN}, or call torch.set_num_threads(1) in it before anything else"
        )


def release_on_error(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap ``function`` so that its failures hold no memory: the traceback's lines are kept, not the frames' tensors.

    A caller loads a smaller model where it is told that memory is short, or another one where it is told that this one
    cannot be: in its ``except`` clause. There the exception is alive, with every frame it came through, and each of
    them would keep its tensors. Torch says ``RuntimeError`` for want of memory, in several ways and subclasses.
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
    """What the frames behind ``error`` hold, as far as they are over."""
    behind: list[BaseException | None] = [error]
    seen: list[BaseException] = []
    while behind:
        one = behind.pop()
        if one is None or any(one is other for other in seen):  # which libraries can chain into a ring
            continue
        seen.append(one)
        traceback.clear_frames(one.__traceback__)
        behind += [one.__cause__, one.__context__]
