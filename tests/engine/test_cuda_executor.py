"""The executor of a GPU over stand-ins: what it captures, replays and waits for. Real graphs: test_steady.py."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_in_cuda import Log, install, refuse_capture
from streaming import embeds, load, same, take, video

import echo_rt
from echo_rt import BackendError, CaptureError, NumericalError
from echo_rt.engine.executor import CudaExecutor, Queue

FEW_STEPS = {"denoising_steps": (1000, 500)}
CPU = torch.device("cpu")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[Log]:
    yield install(monkeypatch)


class Counter:
    """A stage whose work can be counted."""

    def __init__(self) -> None:
        self.total = torch.zeros(1)
        self.calls = 0

    def add(self, amount: int) -> None:
        self.calls += 1
        self.total.add_(amount)


def test_once_as_it_is_then_captured_then_replayed(log: Log) -> None:
    counter, executor = Counter(), CudaExecutor(CPU, graphs=True)
    log.buffers = lambda: {"total": counter.total}
    for run in range(1, 6):
        executor.run(counter.add, 3)
        assert float(counter.total) == 3 * run, "each run counts once, the captured one too"
    assert (log.count("capture"), log.count("replay"), counter.calls) == (1, 4, 2)
    assert (executor.runs, executor.replays) == (5, 3), "the run that captured was no mere replay"
    executor.run(counter.add, 4)
    assert log.count("capture") == 1, "other facts are another stage"
    executor.close()
    executor.run(counter.add, 3)
    assert (log.count("capture"), counter.calls) == (1, 4), "closed, it has forgotten"


def test_without_graphs_nothing_is_captured(log: Log) -> None:
    counter, executor = Counter(), CudaExecutor(CPU, graphs=False)
    for _ in range(4):
        executor.run(counter.add, 1)
    assert (log.count("capture"), executor.replays, counter.calls) == (0, 0, 4)


def test_a_thread_captures_only_what_it_has_run(log: Log) -> None:
    """Libraries keep plans by thread; making one during a capture would end it."""
    counter, executor = Counter(), CudaExecutor(CPU, graphs=True)
    for _ in range(2):
        thread = threading.Thread(target=executor.run, args=(counter.add, 1))
        thread.start()
        thread.join()
        assert log.count("capture") == 0
    executor.run(counter.add, 1)
    assert log.count("capture") == 0
    executor.run(counter.add, 1)
    assert log.count("capture") == 1


def test_a_capture_that_fails_leaves_no_graph(log: Log) -> None:
    executor = CudaExecutor(CPU, graphs=True)
    outcomes = iter([None, RuntimeError("operation not permitted\n(capture.cpp:7)"), None, None])

    def stage() -> None:
        if (outcome := next(outcomes)) is not None:
            raise outcome

    executor.run(stage)
    with pytest.raises(BackendError) as failure:
        executor.run(stage)
    assert isinstance(failure.value, CaptureError) and isinstance(failure.value.__cause__, RuntimeError)
    assert (failure.value.stage, failure.value.cause) == (stage.__qualname__, "operation not permitted")
    for words in (stage.__qualname__, "operation not permitted;", "graphs=False", "--no-graphs"):
        assert words in str(failure.value) and "\n" not in str(failure.value)
    assert str(pickle.loads(pickle.dumps(failure.value))) == str(failure.value)
    assert log.count("replay") == 0
    executor.run(stage)
    assert log.count("replay") == 1
    failed, good = (call[3] for call in log.calls if call[0] == "capture")
    assert failed is not good, "torch may believe for ever that the first pool is being captured into"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("short"), NumericalError("NaN"), KeyboardInterrupt()], ids=repr
)
def test_what_has_nothing_to_do_with_graphs_is_raised_as_it_is(log: Log, error: BaseException) -> None:
    executor = CudaExecutor(CPU, graphs=True)
    outcomes = iter([None, error])

    def stage() -> None:
        if (outcome := next(outcomes)) is not None:
            raise outcome

    executor.run(stage)
    with pytest.raises(type(error)) as failure:
        executor.run(stage)
    assert failure.value is error and not executor._graphs


@pytest.mark.parametrize("stage", ["Rollout._denoise", "Rollout._update_memory", "Pipeline._decode"])
def test_a_video_whose_stage_cannot_be_captured(
    stage: str, small_model: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its stream ends with the stage's name; without graphs the same video is made, in the same process."""
    monkeypatch.setattr(
        "echo_rt.engine.engine.make_executor", lambda device, graphs: CudaExecutor(device, graphs=graphs is not False)
    )
    refuse_capture(monkeypatch, stage)
    with load(small_model, overrides=FEW_STEPS) as runtime:
        log.buffers = runtime._engine.pipeline.buffers  # type: ignore[union-attr]
        with (
            pytest.raises(CaptureError, match=f"{stage} cannot be captured as a CUDA graph: not now; graphs=False"),
            runtime.stream(prompt_embeds=embeds(runtime)) as stream,
        ):
            take(stream, 20)
        assert stream.failure is not None and stage in stream.failure
    captured = log.count("capture")
    with load(small_model, overrides=FEW_STEPS, graphs=False) as runtime:
        without = video(runtime, 8)
    assert captured and log.count("capture") == captured
    monkeypatch.undo()
    with load(small_model, overrides=FEW_STEPS) as runtime:
        assert same(without, video(runtime, 8))


def test_lanes_wait_for_marks_and_have_pools_of_their_own(log: Log) -> None:
    counter, executor = Counter(), CudaExecutor(CPU, graphs=True)
    for _ in range(2):
        begun = executor.run(counter.add, 1)
        executor.run(counter.add, 2, queue=Queue.MEMORY, after=[None, begun])
    streams = {queue: executor._streams[queue] for queue in Queue}
    waits = [call[1:] for call in log.calls if call[0] == "wait_event"]
    assert waits == [(streams[Queue.MEMORY], begun.cuda)] * 2  # type: ignore[attr-defined]
    captures = [call for call in log.calls if call[0] == "capture"]
    assert [call[1] for call in captures] == [streams[Queue.MAIN], streams[Queue.MEMORY]]
    assert captures[0][3] is not captures[1][3], "two queues run side by side, so their graphs may not share memory"
    assert {call[4] for call in captures} == {"thread_local"}
    # Less is more urgent: the decoder takes what the others leave.
    assert streams[Queue.MAIN].priority == streams[Queue.MEMORY].priority < streams[Queue.DECODE].priority


def test_work_apart_sees_what_the_caller_did(log: Log) -> None:
    executor = CudaExecutor(CPU, graphs=True)
    caller = log.stream
    with executor.eager(Queue.DECODE):
        assert log.stream is executor._streams[Queue.DECODE]
    assert ("wait_stream", executor._streams[Queue.DECODE], caller) in log.calls and log.stream is caller


def test_a_mark_that_is_not_reached_in_time(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    event = CudaExecutor(CPU, graphs=True).record(Queue.MAIN)
    assert event.wait() and event.wait(10)
    monkeypatch.setattr(event.cuda, "query", lambda: False)  # type: ignore[attr-defined]
    assert not event.wait(0.01)


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_video_through_it(small_model: Path, log: Log, lookahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same video, all replays in the steady state, also after a prompt switch and in a second video."""

    def film(runtime: echo_rt.Runtime) -> list[echo_rt.Chunk]:
        with runtime.stream(prompt_embeds=embeds(runtime), seed=5) as stream:
            stream.set_prompt(prompt_embeds=embeds(runtime, 1), block=8)
            return take(stream, 14)

    with load(small_model, overrides=FEW_STEPS) as runtime:
        expected = film(runtime)
    executors: list[CudaExecutor] = []

    def make(device: Any, graphs: Any) -> CudaExecutor:
        executors.append(CudaExecutor(device, graphs=True))
        return executors[0]

    monkeypatch.setattr("echo_rt.engine.engine.make_executor", make)
    with load(small_model, overrides=FEW_STEPS, lookahead=lookahead, check=True) as runtime:
        log.buffers = runtime._engine.pipeline.buffers  # type: ignore[union-attr]
        assert same(film(runtime), expected)
        captured = log.count("capture")
        assert captured and executors[0].replays > executors[0].runs / 3
        assert same(film(runtime), expected)
        assert log.count("capture") > captured, "what fills the window came a second time"
        captured = log.count("capture")
        runs, replays = executors[0].runs, executors[0].replays
        assert same(film(runtime), expected)
        assert log.count("capture") == captured
        assert executors[0].runs - runs == executors[0].replays - replays, "a third video is replayed from its start"
    assert not executors[0]._graphs


def test_the_stand_ins_are_gone_afterwards(small_model: Path) -> None:
    assert torch.cuda.Stream.__module__.startswith("torch")
    with load(small_model, overrides=FEW_STEPS) as runtime:
        assert len(video(runtime, 1)) == 1


def test_spans_begin_behind_the_waits_and_end_behind_the_work(log: Log) -> None:
    counter, executor = Counter(), CudaExecutor(CPU, graphs=True)
    executor.spans = spans = []
    for turn in range(3):  # as it is, captured, replayed
        handed = executor.run(counter.add, 1)
        log.calls.clear()
        executor.run(counter.add, 2, queue=Queue.DECODE, after=[handed, None])
        own = next(stream for name, stream, *_ in log.calls if name == "wait_event")
        names = [name for name, stream, *_ in log.calls if stream is own]
        assert names[:2] == ["wait_event", "record"] and names[-1] == "record"
        if turn:
            assert names.index("record") < names.index("replay") < len(names) - 2, "the executor's own event, then ours"
    with executor.eager(Queue.MEMORY):
        counter.add(3)
    assert [(span.stage.rpartition(".")[2], span.queue) for span in spans[-3:]] == [
        ("add", Queue.MAIN),
        ("add", Queue.DECODE),
        ("", Queue.MEMORY),
    ]
    assert len(spans) == 7 and all(span.end.seconds_since(span.begin) >= 0 for span in spans)
    events = [event.cuda for span in spans for event in (span.begin, span.end)]
    assert len(set(map(id, events))) == len(events), "events of their own: the executor's move when a stage runs again"
