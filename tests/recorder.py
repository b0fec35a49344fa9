"""Graphs and lanes without a GPU: stages are recorded as lists of operations and replayed, and every access is kept.

What a CUDA graph does to the code it was captured from, this does: the addresses and the host's values of the second
run are what all later ones use. And what runs on lanes that no mark orders is found, though here everything runs in
the order in which it was asked for.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from tape import Call, tensors_in
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from echo_rt.engine.executor import Executor, Lane, Mark, stage_name

HOST = "host"
Clock = dict[str, int]


def _merged(*clocks: Mapping[str, int]) -> Clock:
    out: Clock = defaultdict(int)
    for clock in clocks:
        for lane, at in clock.items():
            out[lane] = max(out[lane], at)
    return out


@dataclass
class RecordedMark:
    """A point in a lane: all that is known to have happened by then."""

    recorder: Recorder
    clock: Clock
    stage: str = ""
    time: float = field(default_factory=time.perf_counter)

    def wait(self, seconds: float | None = None) -> bool:
        self.recorder.clocks[HOST] = _merged(self.recorder.clocks[HOST], self.clock)
        return True

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, RecordedMark)
        return self.time - earlier.time


@dataclass
class Access:
    """What one run of a stage does with a part of a buffer; ``at``: when it last does so, as the lane counts."""

    lane: str
    at: int
    clock: Mapping[str, int]
    stage: str
    buffer: str
    begin: int
    end: int
    writes: bool

    def races(self, later: Access) -> bool:
        """Whether nothing orders this access before ``later``, and it matters."""
        overlap = self.begin < later.end and later.begin < self.end
        return (
            overlap
            and (self.writes or later.writes)
            and self.lane != later.lane
            and later.clock.get(self.lane, 0) < self.at
        )


class Recorder(TorchDispatchMode):
    """An executor (:class:`echo_rt.engine.executor.Executor`), and, entered as a context, what sees every operation.

    Accesses are kept of the buffers that it is told to :meth:`watch`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._buffers: dict[int, str] = {}  # by the address of what they lie in
        self.replays = self.runs = 0
        self.clocks: dict[str, Clock] = {lane: defaultdict(int) for lane in (HOST, *(lane.value for lane in Lane))}
        self.accesses: list[Access] = []
        self.outside: Counter[str] = Counter()  # operations that are part of no stage
        self.ignored: set[tuple[str, str]] = set()  # (stage, stage it would wait for): marks to be overlooked
        self._lane, self._stage = HOST, ""
        self._noted: dict[Hashable, Access] = {}  # by this run of this stage
        self._seen: set[Hashable] = set()
        self._graphs: dict[Hashable, list[Call]] = {}
        self._capturing: list[Call] | None = None

    def watch(self, buffers: Mapping[str, Tensor]) -> None:
        self._buffers = {tensor.untyped_storage().data_ptr(): name for name, tensor in buffers.items()}

    # ---------------------------------------------------------------- executor

    def run(
        self,
        stage: Callable[..., None],
        *facts: Hashable,
        lane: Lane = Lane.MAIN,
        after: Sequence[Mark | None] = (),
    ) -> Mark:
        key, name = (stage, facts), stage_name(stage)
        self.runs += 1
        waited = [mark for mark in after if isinstance(mark, RecordedMark)]
        waited = [mark for mark in waited if (name, mark.stage) not in self.ignored]
        with self._on(lane, name, *(mark.clock for mark in waited)):
            if key in self._graphs:
                self.replays += 1
                for call in self._graphs[key]:
                    call.again()
                    self._note(call)
            elif key in self._seen:
                self._graphs[key] = self._capturing = []
                try:
                    stage(*facts)
                finally:
                    self._capturing = None
            else:
                self._seen.add(key)
                stage(*facts)
        return RecordedMark(self, dict(self.clocks[lane.value]), name)

    @contextmanager
    def _on(self, lane: Lane, stage: str, *clocks: Clock) -> Iterator[None]:
        outer = self._lane, self._stage
        self._lane, self._stage, self._noted = lane.value, stage, {}
        # Whatever is asked for comes after what the host has done and seen.
        self.clocks[lane.value] = _merged(self.clocks[lane.value], self.clocks[HOST], *clocks)
        try:
            yield
        finally:
            self._lane, self._stage = outer
            self._noted = {}

    @contextmanager
    def apart(self, lane: Lane = Lane.MAIN) -> Iterator[None]:
        with self._on(lane, ""):
            yield

    def mark(self, lane: Lane, again: Mark | None = None) -> Mark:
        return RecordedMark(self, dict(self.clocks[lane.value]))

    def settle(self) -> None:
        self.clocks[HOST] = _merged(*self.clocks.values())

    def close(self) -> None:
        self.settle()
        self._graphs.clear()
        self._seen.clear()

    # ---------------------------------------------------------------- operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call, result = Call.run(func, args, kwargs or {})
        if self._capturing is not None:
            self._capturing.append(call)
        if not self._stage:
            self.outside[func.overloadpacket.__name__] += 1
        self._note(call)
        return result

    def _note(self, call: Call) -> None:
        """Keep the accesses to the buffers; an operation that only makes a view accesses nothing."""
        schema = call.function._schema
        written: list[Tensor] = [out for _, out in call.fresh]
        read: list[Tensor] = []
        for position, argument in enumerate(schema.arguments):
            value = call.args[position] if position < len(call.args) else call.kwargs.get(argument.name)
            writes = argument.alias_info is not None and argument.alias_info.is_write
            (written if writes else read).extend(tensors_in(value))
        views = any(out.alias_info is not None and not out.alias_info.is_write for out in schema.returns)
        if views:
            return
        clock = self.clocks[self._lane]
        clock[self._lane] = clock.get(self._lane, 0) + 1
        for tensors, writes in ((read, False), (written, True)):
            for tensor in tensors:
                name = self._buffers.get(tensor.untyped_storage().data_ptr())
                if name is None:
                    continue
                key = (name, _extent(tensor), writes)
                if key not in self._noted or self._lane == HOST:
                    access = Access(self._lane, 0, dict(clock), self._stage, name, *key[1], writes)
                    self._noted[key] = access
                    self.accesses.append(access)
                self._noted[key].at = clock[self._lane]

    def races(self) -> list[str]:
        """Every pair of accesses to one buffer that nothing orders, in words."""
        found: dict[str, None] = {}
        by_buffer: dict[str, list[Access]] = defaultdict(list)
        for access in self.accesses:
            for earlier in by_buffer[access.buffer]:
                if earlier.races(access):
                    words = f"{access.buffer}: {earlier.stage or earlier.lane} and {access.stage or access.lane}"
                    found[words] = None
            by_buffer[access.buffer].append(access)
        return list(found)


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
        patch.setattr("echo_rt.engine.build.make_executor", lambda device, graphs: executor)
        yield
