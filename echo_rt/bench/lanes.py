"""Executors that note when each stage of a block ran, on the clock of where it ran."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from echo_rt.engine.executor import CudaExecutor, CudaMark, Executor, Immediate, Lane, Mark, make_executor, stage_name

APART = "apart"  # the stage of what is no stage: the frames' way to the host


@dataclass(frozen=True)
class Span:
    """A stage's time in its lane: from when it could begin, what it waits for being done, to its end."""

    stage: str
    lane: Lane
    begin: Mark
    end: Mark


class WatchedExecutor(Executor, Protocol):
    """An executor that keeps a span of all that it runs; whoever reads ``spans`` takes them out."""

    spans: list[Span]


class WatchedImmediate(Immediate):
    """On the CPU, by the host's clock."""

    def __init__(self) -> None:
        super().__init__()
        self.spans: list[Span] = []

    def run(
        self,
        stage: Callable[..., None],
        *facts: Hashable,
        lane: Lane = Lane.MAIN,
        after: Sequence[Mark | None] = (),
    ) -> Mark:
        begin = self.mark(lane)
        end = super().run(stage, *facts, lane=lane)
        self.spans.append(Span(stage_name(stage), lane, begin, end))
        return end

    @contextmanager
    def apart(self, lane: Lane = Lane.MAIN) -> Iterator[None]:
        begin = self.mark(lane)
        yield
        self.spans.append(Span(APART, lane, begin, self.mark(lane)))


class WatchedCuda(CudaExecutor):
    """On a GPU, by its own events, which stand around every stage: two more in a lane for each, and no wait."""

    def __init__(self, device: torch.device, *, graphs: bool) -> None:
        super().__init__(device, graphs=graphs)
        self.spans: list[Span] = []

    def run(
        self,
        stage: Callable[..., None],
        *facts: Hashable,
        lane: Lane = Lane.MAIN,
        after: Sequence[Mark | None] = (),
    ) -> Mark:
        for mark in after:  # before the span begins: waiting is not work
            if mark is not None:
                assert isinstance(mark, CudaMark)
                self._streams[lane].wait_event(mark.event)
        begin = self.mark(lane)
        end = super().run(stage, *facts, lane=lane)
        # A mark of its own: the executor's moves when the stage runs again.
        self.spans.append(Span(stage_name(stage), lane, begin, self.mark(lane)))
        return end

    @contextmanager
    def apart(self, lane: Lane = Lane.MAIN) -> Iterator[None]:
        with super().apart(lane):
            begin = self.mark(lane)
            yield
            self.spans.append(Span(APART, lane, begin, self.mark(lane)))


def watched_executor(device: torch.device, graphs: bool | None) -> WatchedExecutor:
    """As :func:`echo_rt.engine.executor.make_executor`, and watched; its errors are that one's."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return WatchedCuda(device, graphs=graphs is not False)
    make_executor(device, graphs).close()
    return WatchedImmediate()
