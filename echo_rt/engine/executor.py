"""How work reaches the device: lanes that run beside one another, ordered by marks, and graphs that replay.

A *stage* is a function and the facts it is called with. Facts are whatever the host decides; all else that a stage
reads or writes lies in tensors whose addresses never change. So a stage that comes again with the same facts does the
same work on the same addresses, and on a GPU a captured graph does it without the host: the first time a stage runs
as it is (libraries make their workspaces and choices then), the second time it is captured, from then on replayed.
What comes once in a video, like the filling of the window, is therefore never worth a graph, and gets none.
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
_POLL_SECONDS = 0.0005  # between two looks at a mark that is waited for with a bound


class Lane(Enum):
    """What runs in order; two lanes run beside one another."""

    MAIN = "main"
    MEMORY = "memory"
    DECODE = "decode"


class Mark(Protocol):
    """A point in a lane."""

    def wait(self, seconds: float | None = None) -> bool:
        """Hold the host until the lane has passed the mark; False if it has not after ``seconds``."""

    def seconds_since(self, earlier: Mark) -> float:
        """Time between two marks that have been passed."""


class Span(NamedTuple):
    """A stage's time in its lane: from when it could begin, what it waits for being done, to its end."""

    stage: str
    lane: Lane
    begin: Mark
    end: Mark


class Executor(Protocol):
    """Runs stages on lanes. One thread at a time.

    ``spans``: where a benchmark has put a list, each stage and each stay in :meth:`apart` (``stage`` empty) adds its
    span, which costs two marks.
    """

    spans: list[Span] | None

    @property
    def replays(self) -> int:
        """How many stages were replayed so far."""

    @property
    def runs(self) -> int:
        """How many stages were run so far, replayed or not."""

    def run(
        self,
        stage: Callable[..., None],
        *facts: Hashable,
        lane: Lane = Lane.MAIN,
        after: Sequence[Mark | None] = (),
    ) -> Mark:
        """``stage(*facts)`` on ``lane``, once the lane has passed ``after`` (None: nothing to wait for).

        The mark is the stage's end; running the same stage again moves it. :class:`CaptureError` where a graph is
        wanted of it and there can be none.
        """

    @contextmanager
    def apart(self, lane: Lane = Lane.MAIN) -> Iterator[None]:
        """Work on ``lane`` that is not a stage: never captured. It sees what the caller's CUDA stream has done."""

    def mark(self, lane: Lane, again: Mark | None = None) -> Mark:
        """A mark where ``lane`` is now; ``again`` is one that is no longer needed."""

    def settle(self) -> None:
        """Hold the host until every lane is idle. :class:`StallError` where one is not, after :meth:`give_up`."""

    def give_up(self, seconds: float) -> None:
        """A lane may never be idle again: from now on :meth:`settle` waits for it no longer than that."""

    def close(self) -> None:
        """Settle, then forget all stages and their graphs: of a lost device too, but not of one that is busy."""


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


@contextmanager
def _noting(executor: Executor, stage: str, lane: Lane) -> Iterator[None]:
    """Add the span of what is done in it, where spans are wanted."""
    begin = None if executor.spans is None else executor.mark(lane)
    yield
    if executor.spans is not None and begin is not None:
        executor.spans.append(Span(stage, lane, begin, executor.mark(lane)))


class _Instant:
    """A mark of a lane that is never behind the host."""

    def __init__(self) -> None:
        self.time = time.perf_counter()

    def wait(self, seconds: float | None = None) -> bool:
        return True

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, _Instant)
        return self.time - earlier.time


class Immediate:
    """Runs every stage at once, on the CPU: the lanes are one."""

    def __init__(self) -> None:
        self.spans: list[Span] | None = None
        self.replays = 0
        self.runs = 0

    def run(
        self,
        stage: Callable[..., None],
        *facts: Hashable,
        lane: Lane = Lane.MAIN,
        after: Sequence[Mark | None] = (),
    ) -> Mark:
        self.runs += 1
        with _noting(self, stage_name(stage), lane), _ranges()(stage_name(stage)):
            stage(*facts)
        return _Instant()

    @contextmanager
    def apart(self, lane: Lane = Lane.MAIN) -> Iterator[None]:
        with _noting(self, "", lane):
            yield

    def mark(self, lane: Lane, again: Mark | None = None) -> Mark:
        return _Instant()

    def settle(self) -> None:
        return

    def give_up(self, seconds: float) -> None:
        return

    def close(self) -> None:
        return


class CudaMark:
    """A mark of a CUDA stream."""

    def __init__(self) -> None:
        # Blocking: the host sleeps while it waits for a block, instead of spinning a core for a quarter of a second.
        self.event = torch.cuda.Event(enable_timing=True, blocking=True)

    def wait(self, seconds: float | None = None) -> bool:
        if seconds is None:
            self.event.synchronize()
            return True
        deadline = time.monotonic() + seconds
        while not self.event.query():
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, CudaMark)
        milliseconds: float = earlier.event.elapsed_time(self.event)
        return milliseconds / 1000


class _Seen(threading.local):
    """The stages that the calling thread has run.

    By thread, since libraries keep what they make for a shape (cuDNN its plans) by thread, and must not make it in a
    capture. Not by the thread's number, which the next thread may be given.
    """

    def __init__(self) -> None:
        self.stages: set[Hashable] = set()


class CudaExecutor:
    """Lanes are CUDA streams; stages that come again are replayed as graphs, if ``graphs``."""

    def __init__(self, device: torch.device, *, graphs: bool) -> None:
        self._device, self._graphs_wanted = device, graphs
        # The decoder's many small launches go first: what it makes is waited for, the next block is not.
        self._streams = {lane: torch.cuda.Stream(device, priority=-1 if lane is Lane.DECODE else 0) for lane in Lane}
        # Graphs of one pool may share memory, which is safe for those that never run at the same time.
        self._pools = {lane: torch.cuda.graph_pool_handle() for lane in Lane}
        self._seen = _Seen()
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._marks: dict[Hashable, Mark] = {}
        self._patience: float | None = None  # seconds to settle in, once a lane was given up
        self.spans: list[Span] | None = None
        self.replays = 0
        self.runs = 0

    def run(
        self,
        stage: Callable[..., None],
        *facts: Hashable,
        lane: Lane = Lane.MAIN,
        after: Sequence[Mark | None] = (),
    ) -> Mark:
        # Not the bound method, which would hold its owner, all buffers with it, in a circle.
        key = (getattr(stage, "__func__", stage), facts)
        self.runs += 1
        stream = self._streams[lane]
        for mark in after:
            if mark is not None:
                assert isinstance(mark, CudaMark)
                stream.wait_event(mark.event)
        # Behind the waits, which are not the stage's.
        with _noting(self, stage_name(stage), lane), torch.cuda.stream(stream), _ranges()(stage_name(stage)):
            graph = self._graphs.get(key)
            if graph is None and self._graphs_wanted and key in self._seen.stages:
                graph = self._graphs[key] = self._capture(stage, facts, lane)
            elif graph is not None:
                self.replays += 1
            if graph is None:
                stage(*facts)
                self._seen.stages.add(key)
            else:
                graph.replay()
        self._marks[key] = self.mark(lane, self._marks.get(key))
        return self._marks[key]

    def _capture(self, stage: Callable[..., None], facts: tuple[Hashable, ...], lane: Lane) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            capture(graph, partial(stage, *facts), stream=self._streams[lane], pool=self._pools[lane])
        except BaseException as error:
            self._pools[lane] = torch.cuda.graph_pool_handle()
            if not isinstance(error, Exception) or isinstance(error, (EchoError, torch.OutOfMemoryError)):
                raise  # which say what is the matter, with graphs or without
            raise CaptureError(stage_name(stage), first_line(error)) from error
        return graph

    @contextmanager
    def apart(self, lane: Lane = Lane.MAIN) -> Iterator[None]:
        stream = self._streams[lane]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream), _noting(self, "", lane):
            yield

    def mark(self, lane: Lane, again: Mark | None = None) -> Mark:
        mark = CudaMark() if again is None else again
        assert isinstance(mark, CudaMark)
        mark.event.record(self._streams[lane])
        return mark

    def settle(self) -> None:
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
            self.settle()
        except StallError:
            raise  # graphs that may be running are kept with the buffers they write to
        except BaseException:
            self._forget()  # a device that is lost runs nothing
            raise
        self._forget()

    def _forget(self) -> None:
        self._graphs.clear()
        self._marks.clear()
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
    return Immediate()
