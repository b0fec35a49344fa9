"""Forked processes: what they inherit of a runtime cannot be used; where torch would hang or fail there, we say so.

A fork copies memory and no threads. Torch's pool of CPU threads is gone in it, and an operation that asks the pool
waits for ever; CUDA refuses to work at all; and a lock that another thread held stays locked.
"""

from __future__ import annotations

import os

import torch

from echo_rt.errors import BackendError, StreamError

_SPAWN = "start the process with multiprocessing's 'spawn'"

# The process that first loaded a runtime: a fork inherits the number, and so learns that it is one.
_first_loaded_in: int | None = None


class Home:
    """The process in which something was made."""

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
