"""Devices and dtypes by name, and the process-wide settings that a model changes while it computes, or lets be."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from streaming import embeds, load
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import echo_rt.utils.device
from echo_rt.errors import BackendError, ConfigError
from echo_rt.utils.device import _FullPrecision, model_context, parse_device, parse_dtype, warn_of_faulty_convolutions

CUDA = torch.device("cuda", 0)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("name", ["cuda", None, torch.device("cuda")])
def test_a_gpu_without_a_number_is_the_current_one_for_good(name: str | torch.device | None) -> None:
    assert parse_device(name) == torch.device("cuda", 1)


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_with_a_number() -> None:
    assert parse_device("cuda:0") == torch.device("cuda", 0)
    assert parse_device("cpu") == torch.device("cpu")
    with pytest.raises(BackendError, match=r"'cuda:2' was asked for, but there are 2 GPUs"):
        parse_device("cuda:2")


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parse_device(None) == torch.device("cpu")
    for name in ("cuda", "cuda:1"):
        with pytest.raises(BackendError, match=f"device '{name}' was asked for"):
            parse_device(name)
    for name in ("mps", "tpu", ""):
        with pytest.raises(ConfigError, match=f"got '{name}'"):
            parse_device(name)


def test_dtypes() -> None:
    cpu = torch.device("cpu")
    assert parse_dtype(None, cpu) is torch.float32 and parse_dtype(None, CUDA) is torch.bfloat16
    assert parse_dtype("float16", cpu) is torch.float16 and parse_dtype(torch.bfloat16, cpu) is torch.bfloat16
    for bad in ("float64", torch.float64, "int8"):
        with pytest.raises(ConfigError, match="dtype must be one of"):
            parse_dtype(bad, cpu)


# ---------------------------------------------------------------- cuDNN


@pytest.mark.parametrize(
    ("version", "device", "dtype", "warned"),
    [
        (90800, CUDA, torch.bfloat16, True),
        (91499, CUDA, torch.float16, True),
        (91002, CUDA, torch.float32, False),
        (91002, torch.device("cpu"), torch.bfloat16, False),
        (90799, CUDA, torch.bfloat16, False),
        (91500, CUDA, torch.bfloat16, False),
        (None, CUDA, torch.bfloat16, False),
    ],
)
def test_faulty_convolutions_are_named(
    monkeypatch: pytest.MonkeyPatch, version: int | None, device: torch.device, dtype: torch.dtype, warned: bool
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_faulty_convolutions(device, dtype)
    assert [f"cuDNN {version} is known for faulty" in str(warning.message) for warning in caught] == [True] * warned
    assert {warning.filename for warning in caught} <= {__file__}, "the caller's line"


# ---------------------------------------------------------------- float32 products

Switches = tuple[str, str]


def switches() -> Switches:
    return torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision


@pytest.fixture(params=[("tf32", "ieee"), ("ieee", "tf32"), ("none", "none")], ids=str)
def found(request: pytest.FixtureRequest) -> Iterator[Switches]:
    """The caller's own choice, whatever it is."""
    before = switches()
    convolution, product = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    convolution.fp32_precision, product.fp32_precision = request.param
    yield switches()
    convolution.fp32_precision, product.fp32_precision = before


INSIDE = ("ieee", "ieee")


def test_precision_is_put_back(found: Switches) -> None:
    full = _FullPrecision()
    for _ in range(2):
        with full:
            assert switches() == INSIDE
            with full:
                assert switches() == INSIDE
            assert switches() == INSIDE, "the inner visit ended the outer one"
        assert switches() == found
    with pytest.raises(ZeroDivisionError), full, full:
        raise ZeroDivisionError
    assert switches() == found


@pytest.mark.parametrize("leaves_first", ["first", "second"])
def test_precision_is_put_back_by_the_last_of_two_threads(found: Switches, leaves_first: str) -> None:
    full = _FullPrecision()
    entered, leave, left = ({name: threading.Event() for name in ("first", "second")} for _ in range(3))

    def visit(name: str) -> None:
        with full:
            entered[name].set()
            leave[name].wait(60)
        left[name].set()

    for name in ("first", "second"):  # one after the other, so they overlap without nesting
        threading.Thread(target=visit, args=(name,), daemon=True).start()
        assert entered[name].wait(60)
        assert switches() == INSIDE
    leaves_last = "second" if leaves_first == "first" else "first"
    leave[leaves_first].set()
    assert left[leaves_first].wait(60)
    assert switches() == INSIDE, "the first to leave took it from the other"
    leave[leaves_last].set()
    assert left[leaves_last].wait(60)
    assert switches() == found


@pytest.mark.parametrize(
    ("device", "dtypes", "exact"),
    [
        (CUDA, [torch.float32], True),
        (CUDA, [torch.bfloat16], False),
        (CUDA, [torch.bfloat16, torch.float32], True),
        (torch.device("cpu"), [torch.float32], False),
    ],
)
@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_only_float32_on_a_gpu_needs_it(
    found: Switches, device: torch.device, dtypes: list[torch.dtype], exact: bool
) -> None:
    with model_context(device, *dtypes):
        assert switches() == (INSIDE if exact else found)
    assert switches() == found


def test_a_model_computes_without_gradients_autocast_or_inference_mode() -> None:
    cpu = torch.device("cpu")
    with torch.enable_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        with model_context(cpu, torch.float32):
            assert not torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
            assert not torch.is_autocast_enabled("cpu")
            x = torch.ones(2, 2)
            assert (x @ x).dtype is torch.float32 and not x.is_inference()
        assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")


class _Float32Products(TorchDispatchMode):
    """Notes every operation that multiplies matrices of float32, or convolves them.

    Not attention: torch's for a GPU makes float32 of three products in TF32, whatever is allowed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        multiplies = func.overloadpacket in flop_registry and "attention" not in str(func)
        if multiplies and any(isinstance(arg, torch.Tensor) and arg.dtype is torch.float32 for arg in args):
            self.seen.append(str(func))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_no_product_of_a_video_in_16_bits_is_left_to_the_process(small_model: Path, dtype: str) -> None:
    """Such a model does not turn TF32 off, which would be for all the process: so nothing in it may heed that."""
    products = _Float32Products()
    with load(small_model, dtype=dtype) as runtime, products, runtime.stream(prompt_embeds=embeds(runtime)) as stream:
        for _ in range(6):
            chunk = next(stream)
        assert chunk.stats.memory_attended
        stream.set_prompt(prompt_embeds=embeds(runtime, 1))
        next(stream)
    assert bool(products.seen) == (dtype == "float32"), set(products.seen)


def test_all_of_a_process_share_the_switches() -> None:
    assert isinstance(echo_rt.utils.device._full_precision, _FullPrecision)
