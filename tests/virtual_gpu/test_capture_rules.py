"""Each rule of capture by the error that CUDA has for it, and what is left of the capture then."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from virtual_gpu.conftest import Told
from virtual_gpu.device import Device
from virtual_gpu.runtime_calls import SUCCESS, Error, Mode, begin, call, end, fill, new_event, new_stream, wait

pytestmark = pytest.mark.cuda


@pytest.fixture
def byte(gpu: Device) -> Tensor:
    made = torch.zeros(1, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    return made


@pytest.fixture
def stream(gpu: Device) -> Iterator[ctypes.c_void_p]:
    made = new_stream()
    yield made
    assert call("cudaStreamDestroy", made) == SUCCESS


def elsewhere(function: Callable[[], int]) -> int:
    """The function's result on another thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def allocate() -> int:
    address = ctypes.c_void_p()
    error = call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(16))
    if address:
        assert call("cudaFree", address) == SUCCESS
    return error


def copy_and_wait() -> int:
    source, target = ctypes.create_string_buffer(1), ctypes.create_string_buffer(1)
    return call("cudaMemcpy", target, source, ctypes.c_size_t(1), 4)


def allocate_pinned() -> int:
    address = ctypes.c_void_p()
    error = call("cudaHostAlloc", ctypes.byref(address), ctypes.c_size_t(16), 0)
    if address:
        assert call("cudaFreeHost", address) == SUCCESS
    return error


# Any of these may wait for the device, which does not run what is captured.
UNSAFE: dict[str, Callable[[], int]] = {
    "cudaMalloc": allocate,
    "cudaHostAlloc": allocate_pinned,
    "cudaMemcpy": copy_and_wait,
    "cudaStreamSynchronize": lambda: call("cudaStreamSynchronize", None),
    "cudaStreamQuery": lambda: call("cudaStreamQuery", None),
    "cudaEventSynchronize": lambda: call("cudaEventSynchronize", new_event()),
    "cudaEventQuery": lambda: call("cudaEventQuery", new_event()),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_what_may_wait_is_refused_and_the_capture_is_lost(told: Told, stream: ctypes.c_void_p, name: str) -> None:
    assert begin(stream) == SUCCESS
    assert UNSAFE[name]() == Error.UNSUPPORTED
    assert end(stream) == Error.INVALIDATED
    assert told() == [f"{name} amid a capture"]
    assert UNSAFE[name]() == SUCCESS


@pytest.mark.parametrize("name", ["cudaStreamSynchronize", "cudaStreamQuery"])
@pytest.mark.parametrize("mode", Mode)
def test_no_mode_allows_to_wait_for_what_is_captured(
    told: Told, stream: ctypes.c_void_p, mode: Mode, name: str
) -> None:
    assert begin(stream, mode) == SUCCESS
    assert call(name, stream) == Error.UNSUPPORTED
    assert end(stream) == Error.INVALIDATED
    assert told() == [f"{name} of a capturing stream"]


def test_the_device_is_not_waited_for_amid_a_capture(told: Told, stream: ctypes.c_void_p) -> None:
    assert begin(stream, Mode.RELAXED) == SUCCESS
    assert call("cudaDeviceSynchronize") == Error.UNSUPPORTED
    assert end(stream) == Error.INVALIDATED
    assert told() == ["cudaDeviceSynchronize amid a capture"]


@pytest.mark.parametrize(
    ("mode", "here", "there"),
    [
        (Mode.GLOBAL, Error.UNSUPPORTED, Error.UNSUPPORTED),
        (Mode.THREAD_LOCAL, Error.UNSUPPORTED, SUCCESS),
        (Mode.RELAXED, SUCCESS, SUCCESS),
    ],
)
def test_whom_a_mode_forbids(told: Told, stream: ctypes.c_void_p, mode: Mode, here: int, there: int) -> None:
    for expected, run in ((there, elsewhere), (here, lambda function: function())):
        assert begin(stream, mode) == SUCCESS
        assert run(allocate) == expected
        assert end(stream) == (Error.INVALIDATED if expected else SUCCESS)
        assert len(told()) == (expected != SUCCESS)


def test_a_thread_may_ask_to_be_let(gpu: Device, stream: ctypes.c_void_p) -> None:
    """How torch's allocator goes on amid a capture."""
    mode = ctypes.c_int(Mode.RELAXED)
    assert begin(stream) == SUCCESS
    assert call("cudaThreadExchangeStreamCaptureMode", ctypes.byref(mode)) == SUCCESS and mode.value == Mode.GLOBAL
    assert allocate() == SUCCESS
    assert call("cudaThreadExchangeStreamCaptureMode", ctypes.byref(mode)) == SUCCESS and mode.value == Mode.RELAXED
    assert end(stream) == SUCCESS


def test_an_event_of_a_capture_is_not_for_the_host(told: Told, stream: ctypes.c_void_p) -> None:
    assert begin(stream, Mode.RELAXED) == SUCCESS
    event = new_event(recorded_on=stream)
    assert call("cudaEventQuery", event) == call("cudaEventSynchronize", event) == Error.CAPTURED_EVENT
    assert end(stream) == SUCCESS
    assert len(told()) == 2


def test_a_capture_waits_for_nothing_of_outside(told: Told, stream: ctypes.c_void_p) -> None:
    event = new_event(recorded_on=new_stream())
    assert begin(stream) == SUCCESS
    assert wait(stream, event) == Error.ISOLATION
    assert end(stream) == Error.INVALIDATED
    assert told() == ["a capture waits for an event of outside"]


def test_nothing_of_outside_waits_for_a_capture_that_has_ended(told: Told, stream: ctypes.c_void_p) -> None:
    assert begin(stream) == SUCCESS
    event = new_event(recorded_on=stream)
    assert end(stream) == SUCCESS
    assert wait(new_stream(), event) == Error.ISOLATION
    assert told() == ["wait for an event of a capture that has ended"]


def test_two_captures_do_not_join(told: Told, stream: ctypes.c_void_p) -> None:
    other = new_stream()
    assert begin(stream) == begin(other) == SUCCESS
    assert wait(other, new_event(recorded_on=stream)) == Error.MERGE
    assert end(stream) == end(other) == Error.INVALIDATED
    assert len(told()) == 2


def test_a_capture_takes_in_who_waits_for_it_and_must_wait_for_them(
    told: Told, stream: ctypes.c_void_p, byte: Tensor
) -> None:
    side = new_stream()
    for joined in (True, False):
        assert begin(stream) == SUCCESS
        assert wait(side, new_event(recorded_on=stream)) == SUCCESS
        assert fill(side, byte.data_ptr()) == SUCCESS
        if joined:
            assert wait(stream, new_event(recorded_on=side)) == SUCCESS
        assert end(stream) == (SUCCESS if joined else Error.UNJOINED)
    assert told() == ["capture ended before the origin waited for all that was captured"]


def test_a_capture_ends_where_it_began(told: Told, stream: ctypes.c_void_p) -> None:
    side = new_stream()
    assert begin(stream) == SUCCESS
    assert wait(side, new_event(recorded_on=stream)) == SUCCESS
    assert end(side) == Error.UNMATCHED
    assert end(stream) == Error.INVALIDATED
    assert len(told()) == 1


def test_a_capture_ends_on_the_thread_that_began_it(told: Told, stream: ctypes.c_void_p) -> None:
    assert begin(stream) == SUCCESS
    assert elsewhere(lambda: end(stream)) == Error.WRONG_THREAD
    assert end(stream) == Error.INVALIDATED
    assert begin(stream, Mode.RELAXED) == SUCCESS
    assert elsewhere(lambda: end(stream)) == SUCCESS
    assert len(told()) == 1


def test_begin_and_end_come_in_pairs(told: Told, stream: ctypes.c_void_p) -> None:
    assert end(stream) == Error.ILLEGAL_STATE
    assert begin(stream) == SUCCESS
    assert begin(stream) == Error.ILLEGAL_STATE
    assert end(stream) == SUCCESS
    assert len(told()) == 2


def test_the_default_stream_is_not_captured(told: Told) -> None:
    assert begin(None) == Error.UNSUPPORTED
    assert len(told()) == 1


def test_memory_that_is_not_pinned_is_not_captured(told: Told, stream: ctypes.c_void_p, byte: Tensor) -> None:
    host = ctypes.create_string_buffer(1)
    device = ctypes.c_void_p(byte.data_ptr())
    for target, source in ((device, host), (host, device)):
        assert begin(stream) == SUCCESS
        assert call("cudaMemcpyAsync", target, source, ctypes.c_size_t(1), 4, stream) == Error.UNSUPPORTED
        assert end(stream) == Error.INVALIDATED
    assert told() == ["a copy of memory that is not pinned of a capturing stream"] * 2


def test_what_is_captured_does_not_run(gpu: Device) -> None:
    x = torch.zeros(4, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.add_(1)
    assert x.tolist() == [0] * 4
    for _ in range(3):
        graph.replay()
    assert x.tolist() == [3] * 4


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_value_is_not_read_amid_a_capture(told: Told) -> None:
    x = torch.ones(4, device="cuda")
    graph = torch.cuda.CUDAGraph()
    for read in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: x[x > 0], lambda: torch.equal(x, x)):
        with pytest.raises(torch.AcceleratorError), torch.cuda.graph(graph):
            read()
        assert "cudaStreamSynchronize of a capturing stream" in told()
    with pytest.raises(RuntimeError, match="unless the CPU tensor is pinned"), torch.cuda.graph(graph):
        x.cpu()  # torch refuses it by itself
    told()
