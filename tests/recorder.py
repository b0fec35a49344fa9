"""Graphs and queues without a GPU: stages are recorded as lists of operations and replayed, and every access is kept.

What a CUDA graph does to the code it was captured from, this does: the addresses and the host's values of the second
run are what all later ones use. And what runs on queues that no event orders is found, though here everything runs in
the order in which it was asked for.
"""

from __future__ import annotations

import functools
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from tape import Call, replay, tensors_in
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from echo_rt.engine.executor import Event, Executor, Queue, stage_name

HOST = "host"
Clock = dict[str, int]
_Accesses = list[tuple[str, tuple[int, int], bool]]
"""Of one operation: the buffer, the part of it, and whether it is written."""


def _merged(*clocks: Mapping[str, int]) -> Clock:
    out: Clock = defaultdict(int)
    for clock in clocks:
        for queue, at in clock.items():
            out[queue] = max(out[queue], at)
    return out


@dataclass
class RecordedEvent(Event):
    """A point in a queue: all that is known to have happened by then."""

    recorder: Recorder
    clock: Clock
    stage: str = ""
    time: float = field(default_factory=time.perf_counter)

    def wait(self, seconds: float | None = None) -> bool:
        self.recorder.clocks[HOST] = _merged(self.recorder.clocks[HOST], self.clock)
        return True

    def seconds_since(self, earlier: Event) -> float:
        assert isinstance(earlier, RecordedEvent)
        return self.time - earlier.time


@dataclass
class Access:
    """What one run of a stage does with a part of a buffer; ``at``: when it last does so, as the queue counts."""

    queue: str
    at: int
    clock: Mapping[str, int]
    stage: str
    buffer: str
    begin: int
    end: int
    writes: bool

    def conflicts(self, later: Access) -> bool:
        """Whether it matters which of the two comes first."""
        return self.begin < later.end and later.begin < self.end and (self.writes or later.writes)


class Recorder(TorchDispatchMode):
    """An executor (:class:`echo_rt.engine.executor.Executor`), and, entered as a context, what sees every operation.

    Accesses are kept of the buffers that it is told to :meth:`watch`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._buffers: dict[int, str] = {}  # by the address of what they lie in
        self.replays = self.runs = 0
        self.clocks: dict[str, Clock] = {queue: defaultdict(int) for queue in (HOST, *(queue.value for queue in Queue))}
        self.accesses: list[Access] = []
        self.outside: Counter[str] = Counter()  # operations that are part of no stage
        self.ignored: set[tuple[str, str]] = set()  # (stage, stage it would wait for): events to be overlooked
        self._queue, self._stage = HOST, ""
        self._noted: dict[Hashable, Access] = {}  # by this run of this stage
        self._seen: set[Hashable] = set()
        self._graphs: dict[Hashable, list[Call]] = {}
        self._accesses: dict[Hashable, list[_Accesses | None]] = {}  # of each call of a graph
        self._capturing: list[Call] | None = None

    def watch(self, buffers: Mapping[str, Tensor]) -> None:
        self._buffers = {tensor.untyped_storage().data_ptr(): name for name, tensor in buffers.items()}

    # ---------------------------------------------------------------- executor

    def run(
        self,
        stage: Callable[..., None],
        *static_args: Hashable,
        queue: Queue = Queue.MAIN,
        after: Sequence[Event | None] = (),
    ) -> Event:
        key, name = (stage, static_args), stage_name(stage)
        self.runs += 1
        waited = [event for event in after if isinstance(event, RecordedEvent)]
        waited = [event for event in waited if (name, event.stage) not in self.ignored]
        with self._on(queue, name, *(event.clock for event in waited)):
            if key in self._graphs:
                self.replays += 1
                replay(self._graphs[key])
                for accesses in self._accesses[key]:
                    self._note(accesses)
            elif key in self._seen:
                self._graphs[key] = self._capturing = []
                try:
                    stage(*static_args)
                finally:
                    self._capturing = None
                self._accesses[key] = [self._accesses_of(call) for call in self._graphs[key]]
            else:
                self._seen.add(key)
                stage(*static_args)
        return RecordedEvent(self, dict(self.clocks[queue.value]), name)

    @contextmanager
    def _on(self, queue: Queue, stage: str, *clocks: Clock) -> Iterator[None]:
        outer = self._queue, self._stage
        self._queue, self._stage, self._noted = queue.value, stage, {}
        # Whatever is asked for comes after what the host has done and seen.
        self.clocks[queue.value] = _merged(self.clocks[queue.value], self.clocks[HOST], *clocks)
        try:
            yield
        finally:
            self._queue, self._stage = outer
            self._noted = {}

    @contextmanager
    def eager(self, queue: Queue = Queue.MAIN) -> Iterator[None]:
        with self._on(queue, ""):
            yield

    def record(self, queue: Queue, reuse: Event | None = None) -> Event:
        return RecordedEvent(self, dict(self.clocks[queue.value]))

    def synchronize(self) -> None:
        self.clocks[HOST] = _merged(*self.clocks.values())

    def close(self) -> None:
        self.synchronize()
        self._graphs.clear()
        self._accesses.clear()
        self._seen.clear()

    # ---------------------------------------------------------------- operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call, result = Call.run(func, args, kwargs or {})
        if self._capturing is not None:
            self._capturing.append(call)
        if not self._stage:
            self.outside[func.overloadpacket.__name__] += 1
        self._note(self._accesses_of(call))
        return result

    def _accesses_of(self, call: Call) -> _Accesses | None:
        """What an operation does with the buffers; None of one that only makes a view, which accesses nothing."""
        is_view, arguments = _schema_of(call.function)
        if is_view:
            return None
        written: list[Tensor] = [out for _, out in call.fresh]
        read: list[Tensor] = []
        for position, (name, writes) in enumerate(arguments):
            value = call.args[position] if position < len(call.args) else call.kwargs.get(name)
            (written if writes else read).extend(tensors_in(value))
        return [
            (buffer, _extent(tensor), writes)
            for tensors, writes in ((read, False), (written, True))
            for tensor in tensors
            if (buffer := self._buffers.get(tensor.untyped_storage().data_ptr())) is not None
        ]

    def _note(self, accesses: _Accesses | None) -> None:
        """Keep the accesses of one operation to the buffers."""
        if accesses is None:
            return
        clock = self.clocks[self._queue]
        clock[self._queue] = clock.get(self._queue, 0) + 1
        for key in accesses:
            if key not in self._noted or self._queue == HOST:
                name, extent, writes = key
                access = Access(self._queue, 0, dict(clock), self._stage, name, *extent, writes)
                self._noted[key] = access
                self.accesses.append(access)
            self._noted[key].at = clock[self._queue]

    def races(self) -> list[str]:
        """Every pair of conflicting accesses to one buffer that nothing orders, in words."""
        found: dict[str, None] = {}
        by_buffer: dict[str, dict[str, list[Access]]] = defaultdict(lambda: defaultdict(list))
        for access in self.accesses:
            queues = by_buffer[access.buffer]
            for queue, accesses in queues.items():
                seen = access.clock.get(queue, 0)
                for earlier in accesses if queue != access.queue else ():
                    if earlier.at > seen and earlier.conflicts(access):
                        words = f"{access.buffer}: {earlier.stage or earlier.queue} and {access.stage or access.queue}"
                        found[words] = None
            queues[access.queue].append(access)
        return list(found)


@functools.cache
def _schema_of(function: Any) -> tuple[bool, list[tuple[str, bool]]]:
    """Whether an operation only makes a view; its arguments, and whether each is written."""
    schema = function._schema
    is_view = any(out.alias_info is not None and not out.alias_info.is_write for out in schema.returns)
    return is_view, [(a.name, a.alias_info is not None and a.alias_info.is_write) for a in schema.arguments]


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First and last-but-one byte of what a tensor can reach; of a strided one, all that lies between."""
    if tensor.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


@contextmanager
def executed_by(executor: Executor) -> Iterator[None]:
    """Runtimes that are loaded meanwhile are given ``executor``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("echo_rt.engine.engine.make_executor", lambda device, graphs: executor)
        yield
