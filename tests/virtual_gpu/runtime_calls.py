"""CUDA's runtime called directly, for what torch cannot be brought to do wrong."""

from __future__ import annotations

import ctypes
from enum import IntEnum
from functools import cache
from typing import Any

SUCCESS = 0


class Error(IntEnum):
    """CUDA's numbers of the errors that a capture can end in."""

    ILLEGAL_STATE = 401
    UNSUPPORTED = 900
    INVALIDATED = 901
    MERGE = 902
    UNMATCHED = 903
    UNJOINED = 904
    ISOLATION = 905
    CAPTURED_EVENT = 907
    WRONG_THREAD = 908


class Mode(IntEnum):
    """Whom a capture forbids unsafe calls: all threads, the one that captures, nobody."""

    GLOBAL = 0
    THREAD_LOCAL = 1
    RELAXED = 2


@cache
def _library() -> ctypes.CDLL:
    import torch  # noqa: F401 - it loads the runtime

    return ctypes.CDLL(None)  # what torch itself calls


def call(name: str, *arguments: Any) -> int:
    """The error of a call, which is taken: the next one of torch does not find it."""
    error = int(getattr(_library(), name)(*arguments))
    _library().cudaGetLastError()
    return error


def new_stream() -> ctypes.c_void_p:
    stream = ctypes.c_void_p()
    non_blocking = 1
    assert call("cudaStreamCreateWithPriority", ctypes.byref(stream), non_blocking, 0) == SUCCESS
    return stream


def new_event(*, recorded_on: ctypes.c_void_p | None = None) -> ctypes.c_void_p:
    event = ctypes.c_void_p()
    without_timing = 2
    assert call("cudaEventCreateWithFlags", ctypes.byref(event), without_timing) == SUCCESS
    if recorded_on is not None:
        assert call("cudaEventRecord", event, recorded_on) == SUCCESS
    return event


def begin(stream: ctypes.c_void_p | None, mode: Mode = Mode.GLOBAL) -> int:
    return call("cudaStreamBeginCapture", stream, int(mode))


def end(stream: ctypes.c_void_p) -> int:
    """A graph that comes of it is thrown away."""
    graph = ctypes.c_void_p()
    error = call("cudaStreamEndCapture", stream, ctypes.byref(graph))
    if graph:
        assert call("cudaGraphDestroy", graph) == SUCCESS
    return error


def wait(stream: ctypes.c_void_p, event: ctypes.c_void_p) -> int:
    return call("cudaStreamWaitEvent", stream, event, 0)


def fill(stream: ctypes.c_void_p, address: int) -> int:
    """Some work for a stream: one byte of the device."""
    return call("cudaMemsetAsync", ctypes.c_void_p(address), 0, ctypes.c_size_t(1), stream)
