"""How work reaches the device: queues that run beside one another, ordered by events, and graphs that replay.

A *stage* is a function and its static arguments: all that the host decides. What else a stage reads or writes lies in
tensors whose addresses never change. So a stage that comes again with the same arguments does the same work on the same
addresses, and on a GPU a captured graph does it without the host: the first time a stage runs as it is (libraries make
their workspaces and choices then), the second time it is captured, from then on replayed. What comes once in a video,
like the filling of the window, is therefore never worth a graph, and gets none.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum
from functools import cache, partial
from typing import NamedTuple, Protocol

import torch

from echo_rt.errors import BackendError, CaptureError, EchoError, StallError
from echo_rt.utils.device import capture
from echo_rt.utils.wording import first_line

_logger = logging.getLogger("echo_rt.engine.executor")
_DOMAIN = "echo_rt"  # of the NVTX ranges
_POLL_SECONDS = 0.0005  # between two looks at an event that is waited for with a bound


class Queue(Enum):
    """Runs work in order; two queues run beside one another. On a GPU a CUDA stream."""

    MAIN = "main"
    MEMORY = "memory"
    DECODE = "decode"


class Event(Protocol):
    """A point in a queue."""

    def wait(self, seconds: float | None = None) -> bool:
        """Hold the host until the queue has passed the event; False if it has not after ``seconds``."""

    def seconds_since(self, earlier: Event) -> float:
        """Time between two events that have been passed."""


class Span(NamedTuple):
    """A stage's time in its queue: from when it could begin, what it waits for being done, to its end."""

    stage: str
    queue: Queue
    begin: Event
    end: Event


def stage_name(stage: Callable[..., None]) -> str:
    """What a profiler shows for a stage: the function's own name."""
    return stage.__qualname__


@cache
def _ranges() -> Callable[[str], AbstractContextManager[None]]:
    """What makes the NVTX range of a stage; without the package there are none, which the log says once."""
    try:
        import nvtx
    except ImportError as error:
        _logger.warning("a profiler will see no names of stages: NVTX ranges need the package nvtx (%s)", error)
        return lambda name: nullcontext()
    return lambda name: nvtx.annotate(name, domain=_DOMAIN)


class _Instant:
    """An event of a queue that is never behind the host."""

    def __init__(self) -> None:
        self.time = time.perf_counter()

    def wait(self, seconds: float | None = None) -> bool:
        return True

    def seconds_since(self, earlier: Event) -> float:
        assert isinstance(earlier, _Instant)
        return self.time - earlier.time


class Executor:
    """Runs stages on queues, for one thread at a time. This one runs each at once, on the CPU: its queues are one.

    ``runs`` counts the stages, ``replays`` those of them that were replayed. ``spans``: where a benchmark has put a
    list, each stage and each stay in :meth:`eager` (``stage`` empty) adds its span, which costs two events.
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
        """``stage(*static_args)`` on ``queue``, once the queue has passed ``after`` (None: nothing to wait for).

        The event is the stage's end; running the same stage again moves it. :class:`CaptureError` where a graph is
        wanted of it and there can be none.
        """
        self.runs += 1
        with self._noting(stage_name(stage), queue), _ranges()(stage_name(stage)):
            stage(*static_args)
        return _Instant()

    @contextmanager
    def eager(self, queue: Queue = Queue.MAIN) -> Iterator[None]:
        """Work on ``queue`` that is not a stage: never captured. It sees what the caller's CUDA stream has done."""
        with self._noting("", queue):
            yield

    def record(self, queue: Queue, reuse: Event | None = None) -> Event:
        """An event where ``queue`` is now; ``reuse`` is one that is no longer needed."""
        return _Instant()

    def synchronize(self) -> None:
        """Hold the host until every queue is idle. :class:`StallError` where one is not, after :meth:`give_up`."""

    def give_up(self, seconds: float) -> None:
        """A queue may never be idle again: from now on :meth:`synchronize` waits for it no longer than that."""

    def close(self) -> None:
        """Synchronize, then forget all stages and their graphs: of a lost device too, but not of one that is busy."""

    @contextmanager
    def _noting(self, stage: str, queue: Queue) -> Iterator[None]:
        """Add the span of what is done in it, where spans are wanted."""
        begin = None if self.spans is None else self.record(queue)
        yield
        if self.spans is not None and begin is not None:
            self.spans.append(Span(stage, queue, begin, self.record(queue)))


class CudaEvent:
    """An event of a CUDA stream."""

    def __init__(self) -> None:
        # Blocking: the host sleeps while it waits for a block, instead of spinning a core for a quarter of a second.
        self.cuda = torch.cuda.Event(enable_timing=True, blocking=True)

    def wait(self, seconds: float | None = None) -> bool:
        if seconds is None:
            self.cuda.synchronize()
            return True
        deadline = time.monotonic() + seconds
        while not self.cuda.query():
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def seconds_since(self, earlier: Event) -> float:
        assert isinstance(earlier, CudaEvent)
        milliseconds: float = earlier.cuda.elapsed_time(self.cuda)
        return milliseconds / 1000


class _Seen(threading.local):
    """The stages that the calling thread has run.

    By thread, since libraries keep what they make for a shape (cuDNN its plans) by thread, and must not make it in a
    capture. Not by the thread's number, which the next thread may be given.
    """

    def __init__(self) -> None:
        self.stages: set[Hashable] = set()


class CudaExecutor(Executor):
    """Queues are CUDA streams; stages that come again are replayed as graphs, if ``graphs``."""

    def __init__(self, device: torch.device, *, graphs: bool) -> None:
        super().__init__()
        self._device, self._graphs_wanted = device, graphs
        # The decoder's many small launches go first: what it makes is waited for, the next block is not.
        self._streams = {
            queue: torch.cuda.Stream(device, priority=-1 if queue is Queue.DECODE else 0) for queue in Queue
        }
        # Graphs of one pool may share memory, which is safe for those that never run at the same time.
        self._pools = {queue: torch.cuda.graph_pool_handle() for queue in Queue}
        self._seen = _Seen()
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._events: dict[Hashable, Event] = {}
        self._patience: float | None = None  # seconds to synchronize in, once a queue was given up

    def run(
        self,
        stage: Callable[..., None],
        *static_args: Hashable,
        queue: Queue = Queue.MAIN,
        after: Sequence[Event | None] = (),
    ) -> Event:
        # Not the bound method, which would hold its owner, all buffers with it, in a circle.
        key = (getattr(stage, "__func__", stage), static_args)
        self.runs += 1
        stream = self._streams[queue]
        for event in after:
            if event is not None:
                assert isinstance(event, CudaEvent)
                stream.wait_event(event.cuda)
        # Behind the waits, which are not the stage's.
        with self._noting(stage_name(stage), queue), torch.cuda.stream(stream), _ranges()(stage_name(stage)):
            graph = self._graphs.get(key)
            if graph is None and self._graphs_wanted and key in self._seen.stages:
                graph = self._graphs[key] = self._capture(stage, static_args, queue)
            elif graph is not None:
                self.replays += 1
            if graph is None:
                stage(*static_args)
                self._seen.stages.add(key)
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
                raise  # which say what is the matter, with graphs or without
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
        if self._patience is not None:
            deadline = time.monotonic() + self._patience
            while not all(stream.query() for stream in self._streams.values()):
                if time.monotonic() > deadline:
                    raise StallError(f"{self._device} is still busy after {self._patience:g} s more")
                time.sleep(_POLL_SECONDS)
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
            raise  # graphs that may be running are kept with the buffers they write to
        except BaseException:
            self._forget()  # a device that is lost runs nothing
            raise
        self._forget()

    def _forget(self) -> None:
        self._graphs.clear()
        self._events.clear()
        self._seen = _Seen()


def make_executor(device: torch.device, graphs: bool | None = None) -> Executor:
    """The executor for ``device``; ``graphs`` None means where there can be any.

    Raises :class:`BackendError` where graphs are asked for and cannot be.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return CudaExecutor(device, graphs=graphs is not False)
    if graphs:
        raise BackendError(f"graphs=True needs a CUDA device, and this model is on {str(device)!r}; leave graphs out")
    return Executor()
