"""Stand-ins for the parts of ``torch.cuda`` that :class:`echo_rt.engine.executor.CudaExecutor` uses, on a CPU.

Everything runs when it is asked for, so nothing is shown about ordering (``recorder.py`` does that). What is shown is
the executor itself: that it captures what it says and replays it, on the streams and behind the events it should, with
calls that torch has. A capture leaves no trace, as on a GPU: what it wrote is put back.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from tape import Tape
from torch import Tensor

from echo_rt.engine import executor


class Log:
    """What was asked of the device, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.stream: Any = None  # the current one
        self.buffers: Callable[[], dict[str, Tensor]] = dict

    def note(self, *call: Any) -> None:
        self.calls.append(call)

    def count(self, name: str) -> int:
        return sum(call[0] == name for call in self.calls)


def install(patch: pytest.MonkeyPatch) -> Log:
    """Put the stand-ins in the place of torch's own, until ``patch`` is undone."""
    log = Log()

    class Stream:
        def __init__(self, device: Any = None, priority: int = 0) -> None:
            self.priority = priority

        def synchronize(self) -> None:
            log.note("synchronize", self)

        def wait_event(self, event: Event) -> None:
            assert event.recorded, "waited for an event that was never recorded"
            log.note("wait_event", self, event)

        def wait_stream(self, other: Stream) -> None:
            log.note("wait_stream", self, other)

    class Event:
        def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
            self.timed, self.recorded, self.time = enable_timing, False, 0.0

        def record(self, stream: Stream) -> None:
            assert isinstance(stream, Stream)
            self.recorded, self.time = True, time.perf_counter()
            log.note("record", stream, self)

        def synchronize(self) -> None:
            assert self.recorded
            log.note("synchronize_event", self)

        def query(self) -> bool:
            return self.recorded

        def elapsed_time(self, later: Event) -> float:
            assert self.timed and later.timed and self.recorded and later.recorded
            return 1000 * (later.time - self.time)

    class CUDAGraph:
        def __init__(self) -> None:
            self.tape: Tape | None = None

        def replay(self) -> None:
            assert self.tape is not None, "replayed before it was captured"
            log.note("replay", log.stream, self)
            self.tape.replay()

    @contextmanager
    def graph(
        cuda_graph: CUDAGraph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"
    ) -> Iterator:
        assert pool is not None and isinstance(stream, Stream)
        log.note("capture", stream, cuda_graph, pool, capture_error_mode)
        before = {name: buffer.clone() for name, buffer in log.buffers().items()}
        cuda_graph.tape = Tape()
        with on(stream), cuda_graph.tape:
            yield
        for name, buffer in log.buffers().items():
            buffer.copy_(before[name])

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        outer, log.stream = log.stream, stream
        try:
            yield
        finally:
            log.stream = outer

    log.stream = caller = Stream()
    stand_ins = {
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": CUDAGraph,
        "graph": graph,
        "stream": on,
        "current_stream": lambda device=None: log.stream,
        "graph_pool_handle": lambda: object(),
    }
    for name, stand_in in stand_ins.items():
        _takes_what_torch_takes(name, stand_in, getattr(torch.cuda, name))
        patch.setattr(torch.cuda, name, stand_in)
    patch.setattr(torch.cuda.nvtx, "range", nullcontext)
    assert log.stream is caller
    return log


def refuse_capture(
    patch: pytest.MonkeyPatch, stage: str, amid: Callable[[], object] | None = None, cause: str = "not now"
) -> None:
    """From now on a capture of ``stage``, here or on a GPU, fails: by what ``amid`` does in it, or with ``cause``."""
    capture = executor.capture

    def refused() -> None:
        if amid is not None:
            amid()
        raise RuntimeError(cause)

    def capture_most(graph: Any, work: Any, **how: Any) -> None:
        capture(graph, refused if work.func.__qualname__ == stage else work, **how)

    patch.setattr(executor, "capture", capture_most)


def _takes_what_torch_takes(name: str, stand_in: Any, real: Any) -> None:
    """Every argument that a stand-in knows is one of torch's own, by name."""
    own = real.__new__ if name in ("Stream", "Event") else real
    known = set(inspect.signature(own).parameters)
    for argument in inspect.signature(stand_in).parameters:
        assert argument in known, f"torch.cuda.{name} knows no {argument}, only {', '.join(sorted(known))}"
