"""Captures: which stages are warm, whose error is told, and one at a time in a process."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from echo_rt import SteadyStateError
from echo_rt.engine.executor import CudaExecutor, Executor, SteadyCheck, _ranges

FEW_STEPS = {"denoising_steps": (1000, 500)}
LONG = 20.0


class _Thing:
    """Stands for a CUDA stream, event, graph or context manager."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.args = args

    def __enter__(self) -> _Thing:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **options: None


@pytest.fixture
def executor(monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaExecutor]:
    for name in ("Stream", "Event", "CUDAGraph", "stream", "graph", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, _Thing)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *args: None)
    yield CudaExecutor(torch.device("cuda", 0), graphs=True)


def test_a_stage_that_failed_is_not_warm(executor: CudaExecutor) -> None:
    """What libraries make in a stage's first run they have not made if it did not come to its end."""
    tries: list[int] = []

    def stage() -> None:
        tries.append(1)
        if len(tries) == 1:
            raise torch.OutOfMemoryError("short")

    with contextlib.suppress(torch.OutOfMemoryError):
        executor.run(stage)
    executor.run(stage)
    assert not executor._graphs, "captured in its first whole run"
    executor.run(stage)
    assert executor._graphs


def test_another_thread_with_an_old_threads_number_is_not_warm(
    executor: CudaExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers of threads that have ended are used again; what their libraries had planned is gone with them."""
    monkeypatch.setattr(threading, "get_ident", lambda: 7)

    def stage() -> None:
        return

    for _ in range(2):
        thread = threading.Thread(target=executor.run, args=(stage,))
        thread.start()
        thread.join()
    assert not executor._graphs


def test_an_executor_does_not_keep_what_it_runs(executor: CudaExecutor) -> None:
    """Or a runtime that is dropped waits, with all its device memory, for the garbage collector."""
    import weakref

    class Owner:
        def __init__(self, executor: CudaExecutor) -> None:
            self.executor = executor

        def stage(self) -> None:
            return

    owner = Owner(executor)
    for _ in range(3):
        executor.run(owner.stage)
    gone = weakref.ref(owner)
    gc.disable()
    try:
        del owner
        assert gone() is None
    finally:
        gc.enable()


def test_an_error_amid_a_capture_is_not_hidden_by_its_end(
    executor: CudaExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(_Thing):
        def __exit__(self, *error: object) -> None:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def stage() -> None:
        if warm:
            raise torch.OutOfMemoryError("the reason")

    warm: list[int] = []
    executor.run(stage)
    warm.append(1)
    monkeypatch.setattr(torch.cuda, "graph", Broken)
    with pytest.raises(torch.OutOfMemoryError, match="the reason"):
        executor.run(stage)


def test_one_capture_at_a_time_in_a_process(executor: CudaExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch allows no more, and what a capture begins with, waiting for the device, ends any other one."""
    inside, most = [0], [0]

    class Graph(_Thing):
        def __enter__(self) -> Graph:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.05)
            return self

        def __exit__(self, *error: object) -> None:
            inside[0] -= 1

    monkeypatch.setattr(torch.cuda, "graph", Graph)

    def film() -> None:
        mine = CudaExecutor(torch.device("cuda", 0), graphs=True)
        for _ in range(2):
            mine.run(_nothing)

    threads = [threading.Thread(target=film) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1


def _nothing() -> None:
    return


def test_settling_waits_for_lanes_and_not_for_the_device(
    executor: CudaExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting for the device, while another runtime's thread captures on it, fails and ends that capture."""
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: calls.append("device"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *device: _Thing())
    executor.synchronize()
    assert not calls


def test_errors_of_a_steady_block_keep_their_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {})
    check = SteadyCheck(Executor(), torch.device("cuda", 0), dict)
    check._steady = True
    with pytest.raises(SteadyStateError), check.block(1):
        raise RuntimeError("called a synchronizing CUDA operation")
    for error in (torch.OutOfMemoryError("short"), RuntimeError("CUDA error: an illegal memory access")):
        with pytest.raises(type(error)) as found, check.block(1):
            raise error
        assert not isinstance(found.value, SteadyStateError), "an error of the device, told as one of ours"


@pytest.mark.parametrize("profiled", [False, True])
def test_missing_names_of_stages_are_a_warning_under_a_profiler_alone(
    profiled: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "nvtx", None)
    monkeypatch.delenv("NVTX_INJECTION64_PATH", raising=False)
    if profiled:
        monkeypatch.setenv("NVTX_INJECTION64_PATH", "libToolsInjection64.so")
    made = _ranges.__wrapped__()
    with made("a stage"):
        pass
    assert ("pip install 'echo-rt[profile]'" in caplog.text) == profiled
