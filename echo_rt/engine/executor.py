"""Submits work to the device: queues that run beside one another, ordered by events, and CUDA graphs.

A *stage* is a function and its static arguments: all that the host decides. All else that it reads or writes lies in
tensors whose addresses never change. So a stage that comes again with the same arguments is the same work on the same
addresses. On a GPU it runs eagerly the first time (libraries make their workspaces and plans then), is captured as a
graph the second time, and is replayed from then on.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from echo_rt.errors import BackendError, CaptureError, EchoError, StallError, SteadyStateError
from echo_rt.utils.device import capture
from echo_rt.utils.stopped_time import stopped_seconds
from echo_rt.utils.wording import first_line

_logger = logging.getLogger("echo_rt.engine.executor")
_DOMAIN = "echo_rt"  # of the NVTX ranges
_SYNCHRONIZING = "synchronizing"  # in torch's message about a forbidden wait, in every release
_POLL_SECONDS = 0.0005  # between two queries while the host waits with a timeout


class Queue(Enum):
    """Runs work in order; two queues run beside one another. On a GPU a CUDA stream."""

    MAIN = "main"
    MEMORY = "memory"
    DECODE = "decode"


class Event:
    """A point in a queue. This one is of a CPU's queue, which is never behind the host."""

    def __init__(self) -> None:
        self.time = time.perf_counter()

    def wait(self, seconds: float | None = None) -> bool:
        """Hold the host until the queue has passed the event; False if it has not after ``seconds``."""
        return True

    def seconds_since(self, earlier: Event) -> float:
        """Seconds between two events that have been passed."""
        return self.time - earlier.time


class Span(NamedTuple):
    """A stage's time in its queue, from when it could begin, after what it waits for, to its end."""

    stage: str
    queue: Queue
    begin: Event
    end: Event


def stage_name(stage: Callable[..., None]) -> str:
    """Name of a stage in a profiler: the function's own."""
    return stage.__qualname__


@cache
def _ranges() -> Callable[[str], AbstractContextManager[None]]:
    """Return the function that makes a stage's NVTX range; without the package, one that makes none.

    Only a profiler's user misses them. Nsight sets ``NVTX_INJECTION64_PATH``; under it, their absence is a warning.
    """
    try:
        import nvtx
    except ImportError as error:
        if "NVTX_INJECTION64_PATH" in os.environ:
            _logger.warning("the profiler sees no names of stages: %s (pip install 'echo-rt[profile]')", error)
        return lambda name: nullcontext()
    return lambda name: nvtx.annotate(name, domain=_DOMAIN)


class Executor:
    """Runs stages on queues, for one thread at a time. This one, for the CPU, runs each stage at once.

    ``runs`` counts stages, ``replays`` those that were replayed. ``spans``: a benchmark may set a list, to which each
    stage and each block of :meth:`eager` (``stage`` empty) adds its span, at the cost of two events.
    """

    def __init__(self) -> None:
        self.spans: list[Span] | None = None
        self.replays = 0
        self.runs = 0

    def run(
        self,
        stage: Callable[..., None],
        *static_args: Hashable,
        queue: Queue = Queue.MAIN,
        after: Sequence[Event | None] = (),
    ) -> Event:
        """Run ``stage(*static_args)`` on ``queue`` after the events ``after`` (None: nothing to wait for).

        Returns the event of its end; running the same stage again moves it. Raises :class:`CaptureError` for a stage
        that cannot be captured as a graph.
        """
        self.runs += 1
        with self._noting(stage_name(stage), queue), _ranges()(stage_name(stage)):
            stage(*static_args)
        return Event()

    @contextmanager
    def eager(self, queue: Queue = Queue.MAIN) -> Iterator[None]:
        """Run work on ``queue`` that is not a stage, never captured, after the work of the caller's CUDA stream."""
        with self._noting("", queue):
            yield

    def record(self, queue: Queue, reuse: Event | None = None) -> Event:
        """Record an event in ``queue``; ``reuse``: one that is no longer needed."""
        return Event()

    def synchronize(self) -> None:
        """Hold the host until every queue is idle; after :meth:`give_up`, :class:`StallError` where one is not."""

    def give_up(self, seconds: float) -> None:
        """Bound the wait of :meth:`synchronize`: a queue may never be idle again."""

    def close(self) -> None:
        """Synchronize, then release all graphs, also of a lost device, but not of one that is still busy."""

    @contextmanager
    def _noting(self, stage: str, queue: Queue) -> Iterator[None]:
        """Add the span of the work inside, where spans are wanted."""
        begin = None if self.spans is None else self.record(queue)
        yield
        if self.spans is not None and begin is not None:
            self.spans.append(Span(stage, queue, begin, self.record(queue)))


class CudaEvent(Event):
    """An event of a CUDA stream."""

    def __init__(self) -> None:
        # Blocking: the host sleeps while it waits for a block, instead of keeping a core busy meanwhile.
        self.cuda = torch.cuda.Event(enable_timing=True, blocking=True)

    def wait(self, seconds: float | None = None) -> bool:
        if seconds is None:
            self.cuda.synchronize()
            return True
        return _wait_for(self.cuda.query, seconds)

    def seconds_since(self, earlier: Event) -> float:
        assert isinstance(earlier, CudaEvent)
        milliseconds: float = earlier.cuda.elapsed_time(self.cuda)
        return milliseconds / 1000


def _wait_for(done: Callable[[], bool], seconds: float) -> bool:
    """Poll ``done`` for ``seconds`` at most in which this process could run; returns whether it was true."""
    deadline = time.monotonic() + seconds - stopped_seconds()
    while not done():
        if time.monotonic() - stopped_seconds() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


class CudaExecutor(Executor):
    """Queues are CUDA streams; stages that come again are replayed as graphs, if ``graphs``."""

    def __init__(self, device: torch.device, *, graphs: bool) -> None:
        super().__init__()
        self._device, self._graphs_wanted = device, graphs
        # The decoder takes what the transformer's last waves leave free (docs/speed.md).
        self._streams = {
            queue: torch.cuda.Stream(device, priority=0 if queue is Queue.DECODE else -1) for queue in Queue
        }
        # Graphs of a pool may share memory, which is safe only if they never run at the same time.
        self._pools = {queue: torch.cuda.graph_pool_handle() for queue in Queue}
        # The stages that a thread has run: libraries keep what they make for a shape (such as cuDNN's plans) by thread,
        # and must not make it during a capture. Not by thread id, which the next thread may get.
        self._seen_by_thread = threading.local()
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._events: dict[Hashable, Event] = {}
        self._patience: float | None = None  # bound of synchronize() in seconds, after give_up()

    def run(
        self,
        stage: Callable[..., None],
        *static_args: Hashable,
        queue: Queue = Queue.MAIN,
        after: Sequence[Event | None] = (),
    ) -> Event:
        # Not the bound method, which would hold its owner and all buffers in a reference cycle.
        key = (getattr(stage, "__func__", stage), static_args)
        self.runs += 1
        stream = self._streams[queue]
        for event in after:
            if event is not None:
                assert isinstance(event, CudaEvent)
                stream.wait_event(event.cuda)
        # After the waits, which do not count as the stage's time.
        with self._noting(stage_name(stage), queue), torch.cuda.stream(stream), _ranges()(stage_name(stage)):
            graph, seen = self._graphs.get(key), self._seen_by_thread.__dict__.setdefault("stages", set())
            if graph is None and self._graphs_wanted and key in seen:
                graph = self._graphs[key] = self._capture(stage, static_args, queue)
            elif graph is not None:
                self.replays += 1
            if graph is None:
                stage(*static_args)
                seen.add(key)
            else:
                graph.replay()
        self._events[key] = self.record(queue, self._events.get(key))
        return self._events[key]

    def _capture(
        self, stage: Callable[..., None], static_args: tuple[Hashable, ...], queue: Queue
    ) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            capture(graph, partial(stage, *static_args), stream=self._streams[queue], pool=self._pools[queue])
        except BaseException as error:
            self._pools[queue] = torch.cuda.graph_pool_handle()
            if not isinstance(error, Exception) or isinstance(error, (EchoError, torch.OutOfMemoryError)):
                raise  # no fault of the capture
            raise CaptureError(stage_name(stage), first_line(error)) from error
        return graph

    @contextmanager
    def eager(self, queue: Queue = Queue.MAIN) -> Iterator[None]:
        stream = self._streams[queue]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream), self._noting("", queue):
            yield

    def record(self, queue: Queue, reuse: Event | None = None) -> Event:
        event = CudaEvent() if reuse is None else reuse
        assert isinstance(event, CudaEvent)
        event.cuda.record(self._streams[queue])
        return event

    def synchronize(self) -> None:
        bound = self._patience
        if bound is not None and not _wait_for(lambda: all(s.query() for s in self._streams.values()), bound):
            raise StallError(f"{self._device} is still busy after {bound:g} s more")
        # Not the device: another runtime's thread may be capturing on it.
        for stream in (torch.cuda.current_stream(self._device), *self._streams.values()):
            stream.synchronize()
        self._patience = None

    def give_up(self, seconds: float) -> None:
        self._patience = seconds

    def close(self) -> None:
        try:
            self.synchronize()
        except StallError:
            raise  # graphs that may be running must keep the buffers they write to
        except BaseException:
            self._forget()  # a device that is lost runs nothing
            raise
        self._forget()

    def _forget(self) -> None:
        self._graphs.clear()
        self._events.clear()
        self._seen_by_thread = threading.local()


def make_executor(device: torch.device, graphs: bool | None = None) -> Executor:
    """Make the executor for ``device``; ``graphs`` None means on a GPU.

    Raises :class:`BackendError` where graphs are asked for on a CPU.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return CudaExecutor(device, graphs=graphs is not False)
    if graphs:
        raise BackendError(f"graphs=True needs a CUDA device, and this model is on {str(device)!r}; leave graphs out")
    return Executor()


class SteadyCheck:
    """Asserts the promises of the steady state on every block that begins, for debugging.

    A block whose stages are all replayed allocates nothing, never waits for the device, and moves no buffer. The first
    two are checked on a GPU, the third anywhere. ``buffers`` returns the tensors whose addresses must never change.
    """

    def __init__(self, executor: Executor, device: torch.device, buffers: Callable[[], Mapping[str, Tensor]]) -> None:
        self._executor, self._device, self._buffers = executor, device, buffers
        self._addresses = self._now()
        self._steady = False  # whether all stages of the block before were replayed, on a GPU

    @contextmanager
    def block(self, index: int, disturbed: bool = False) -> Iterator[None]:
        """Check the work inside, which begins block ``index``; raises :class:`SteadyStateError` after it.

        ``disturbed``: it may wait for the device.
        """
        runs, replays = self._executor.runs, self._executor.replays
        allocations = self._allocations()
        with nullcontext() if disturbed or not self._steady else self._no_waiting(index):
            yield
        replayed = self._executor.runs - runs == self._executor.replays - replays
        made = self._allocations() - allocations
        if replayed and made:
            raise SteadyStateError(f"block {index}: expected no allocation on {self._device}, got {made}")
        now = self._now()
        moved = sorted(name for name in {*now, *self._addresses} if now.get(name) != self._addresses.get(name))
        if moved:
            raise SteadyStateError(f"block {index}: buffers have moved: {', '.join(moved)}")
        self._steady = replayed and self._device.type == "cuda"

    @contextmanager
    def _no_waiting(self, index: int) -> Iterator[None]:
        """Have torch raise where the host waits for the device, in a block that should be all replays."""
        found = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        except RuntimeError as error:
            if _SYNCHRONIZING not in str(error):
                raise
            raise SteadyStateError(f"block {index}: expected no wait for {self._device}, got: {error}") from error
        finally:
            torch.cuda.set_sync_debug_mode(found)

    def _allocations(self) -> int:
        if self._device.type != "cuda":
            return 0
        return int(torch.cuda.memory_stats(self._device).get("allocation.all.allocated", 0))

    def _now(self) -> dict[str, int]:
        return {name: tensor.data_ptr() for name, tensor in self._buffers().items()}
