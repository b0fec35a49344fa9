"""Products of linear layers by cuBLASLt's algorithms; nvmath-python is played by a module that computes as told."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.util
import inspect
import logging
import math
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import stand_in_cuda
import torch
from closeness import relative_error
from streaming import embeds, load, same, take
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from echo_rt.autotune.tuner import TOLERANCES
from echo_rt.config import TransformerConfig
from echo_rt.errors import BackendError, StreamError
from echo_rt.model import linear_products
from echo_rt.model.linear import Linear, Weights
from echo_rt.model.linear_products import (
    IMPLEMENTATIONS,
    TORCH,
    CublasLt,
    LinearCandidate,
    LinearCheck,
    LinearShape,
    gelu_tanh,
    linear_shapes,
    linear_tuner,
    select_linear,
)
from echo_rt.ops.backends import load_ops
from echo_rt.snapshot.fit import IMPLEMENTATIONS as NAMES
from echo_rt.snapshot.fit import LINEAR
from echo_rt.utils.device import FLOAT8, capture

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SHAPE = LinearShape(rows=70, inputs=48, outputs=40)
WITH_GELU = dataclasses.replace(SHAPE, gelu=True)


class MatmulEpilog(IntEnum):
    BIAS = 4
    GELU_BIAS = 36


class Algorithm:
    """It adds ``number`` partial sums, so that each rounds otherwise; ``change`` makes it wrong."""

    def __init__(self, number: int) -> None:
        self.number = number

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        parts = zip(a.float().chunk(self.number, 1), b.float().chunk(self.number, 0), strict=True)
        return sum((x @ y for x, y in parts), torch.zeros(len(a), b.shape[1]))


class FakeNvmath(ModuleType):
    """nvmath.linalg.advanced: what was planned and executed, and by which algorithm."""

    def __init__(self) -> None:
        super().__init__("nvmath.linalg.advanced")
        self.MatmulEpilog = MatmulEpilog
        self.algorithms = 3
        self.made: list[FakeMatmul] = []
        self.executed: list[int] = []
        self.product: Callable[[Algorithm, Tensor, Tensor], Tensor] = Algorithm.product
        library = self

        class Matmul(FakeMatmul):
            _library = library

        self.Matmul = Matmul


class FakeMatmul:
    """As documented: of one thread; operands as they were when it was made; results as the epilog has them."""

    _library: FakeNvmath

    def __init__(self, a: Tensor, b: Tensor, /, *, options: dict[str, Any]) -> None:
        assert len(a.shape) == len(b.shape) == 2 and a.shape[1] == b.shape[0] and a.dtype == b.dtype
        self._operands: dict[str, Tensor | None] = {"a": a, "b": b}
        self.layouts = {name: (t.shape, t.stride()) for name, t in (("a", a), ("b", b))}
        self.options, self._thread = options, threading.get_ident()
        self.preferences: Any = None
        self._algorithm: Algorithm | None = None
        self._library.made.append(self)

    def plan(
        self,
        *,
        preferences: dict[str, int] | None = None,
        algorithms: list[Algorithm] | None = None,
        epilog: MatmulEpilog,
        epilog_inputs: dict[str, Tensor],
    ) -> tuple[Algorithm, ...]:
        assert threading.get_ident() == self._thread
        (bias,) = (epilog_inputs[name] for name in ("bias",))
        assert set(epilog_inputs) == {"bias"} and bias.shape == self.layouts["a"][0][:1], "one for each row"
        self.epilog, self._bias = epilog, bias
        self.preferences = preferences or self.preferences
        found = algorithms or [Algorithm(number + 1) for number in range(self._library.algorithms)]
        self._algorithm = found[0]
        return tuple(found)

    def reset_operands_unchecked(self, *, a: Tensor, b: Tensor, epilog_inputs: dict[str, Tensor]) -> None:
        self._operands, self._bias = {"a": a, "b": b}, epilog_inputs["bias"]

    def execute(self) -> Tensor:
        assert threading.get_ident() == self._thread and self._algorithm is not None
        seen = {}
        for name, tensor in self._operands.items():
            assert tensor is not None, "its operands were released"
            seen[name] = tensor.as_strided(*self.layouts[name])  # unchecked: a pointer is all that is read of it
        self._library.executed.append(self._algorithm.number)
        total = self._library.product(self._algorithm, seen["a"], seen["b"]) + self._bias.float()[:, None]
        total = gelu_tanh(total) if self.epilog == MatmulEpilog.GELU_BIAS else total
        out = torch.empty_strided(total.shape, (1, len(total)), dtype=seen["a"].dtype)  # stored by columns
        return out.copy_(total)

    def release_operands(self) -> None:
        self._operands = dict.fromkeys(self._operands)


@pytest.fixture
def nvmath(monkeypatch: pytest.MonkeyPatch) -> FakeNvmath:
    library = FakeNvmath()
    bindings = ModuleType("nvmath.bindings.cublasLt")
    bindings.get_version = lambda: 130200  # type: ignore[attr-defined]
    root = ModuleType("nvmath")
    root.__spec__ = ModuleSpec("nvmath", None)
    for module in (root, library, bindings):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(linear_products, "_ALIGNMENT", 1)  # torch on a CPU aligns to 64 bytes
    return library


@pytest.fixture
def without_nvmath(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_products, "find_spec", lambda name: None)


def inputs(shape: LinearShape = SHAPE, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> tuple[Tensor, ...]:
    draws = torch.Generator().manual_seed(seed)
    sizes = ((shape.rows, shape.inputs), (shape.outputs, shape.inputs), (shape.outputs,))
    return tuple(torch.randn(size, generator=draws).to(dtype) for size in sizes)


# ---- the product


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gelu", [False, True])
def test_it_is_torchs_product(nvmath: FakeNvmath, gelu: bool, dtype: torch.dtype) -> None:
    x, weight, bias = inputs(dtype=dtype)
    out = CublasLt(2)(x, weight, bias, gelu)
    assert out.dtype == dtype and out.shape == (70, 40) and out.is_contiguous()
    exact = x.double() @ weight.double().t() + bias.double()
    assert relative_error(out, gelu_tanh(exact) if gelu else exact) < 1e-2
    assert relative_error(out, TORCH(x, weight, bias, gelu)) < 1e-2


def test_what_is_asked_of_the_library(nvmath: FakeNvmath) -> None:
    x, weight, bias = inputs()
    product = CublasLt(3)
    for gelu in (False, True):
        product(x, weight, bias, gelu)
    plain, with_gelu = nvmath.made
    assert plain.layouts == {"a": ((40, 48), (48, 1)), "b": ((48, 70), (1, 48))}, "nothing is copied"
    assert (plain.epilog, with_gelu.epilog) == (MatmulEpilog.BIAS, MatmulEpilog.GELU_BIAS)
    assert plain.options["memory_limit"] == 0, "a workspace would be shared by graphs that run at the same time"
    assert plain.preferences == {"limit": len(IMPLEMENTATIONS) - 1}
    assert nvmath.executed == [3, 3]


def test_it_says_nothing_at_the_level_of_the_root_logger(nvmath: FakeNvmath, caplog: pytest.LogCaptureFixture) -> None:
    """At INFO it would time each call."""
    CublasLt(1)(*inputs(), gelu=False)
    with caplog.at_level(logging.DEBUG), caplog.at_level(logging.DEBUG, "echo_rt"):
        logger = nvmath.made[0].options["logger"]
        assert not logger.isEnabledFor(logging.INFO) and logger.isEnabledFor(logging.WARNING)


def test_layers_of_a_shape_share_a_plan_and_keep_no_input(nvmath: FakeNvmath) -> None:
    product = CublasLt(1)
    for seed in range(3):
        x, weight, bias = inputs(seed=seed)
        out = product(x, weight, bias, False)
        assert relative_error(out, TORCH(x, weight, bias, False)) < 1e-2, "of its own weight and bias"
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert len(nvmath.made) == 1 and gone() is None


def test_each_thread_plans_its_own(nvmath: FakeNvmath) -> None:
    product, own = CublasLt(2), inputs()
    here = product(*own, gelu=False)
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(product, *own, gelu=False).result(), here)
    assert torch.equal(product(*own, gelu=False), here) and len(nvmath.made) == 2


def test_tensors_that_lie_otherwise_are_left_to_torch(nvmath: FakeNvmath, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = inputs()
    product = CublasLt(1)
    wide = torch.cat((x, x), dim=1)[:, :48]
    assert torch.equal(product(wide, weight, bias, False), TORCH(x, weight, bias, False)) and not nvmath.executed
    monkeypatch.setattr(linear_products, "_ALIGNMENT", 16)
    shifted = torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape)
    assert shifted.data_ptr() % 16 and shifted.is_contiguous()
    assert torch.equal(product(shifted, weight, bias, True), TORCH(x, weight, bias, True)) and not nvmath.executed


@pytest.mark.skipif(importlib.util.find_spec("nvmath") is None, reason="nvmath-python is not installed")
def test_the_library_takes_what_the_stand_in_takes() -> None:
    from nvmath.linalg import advanced  # type: ignore[import-not-found]

    for name in ("__init__", "plan", "reset_operands_unchecked", "execute", "release_operands"):
        ours, theirs = (inspect.signature(getattr(kind, name)) for kind in (FakeMatmul, advanced.Matmul))
        assert {(p.name, p.kind) for p in ours.parameters.values()} <= {
            (p.name, p.kind) for p in theirs.parameters.values()
        }
    assert {"BIAS", "GELU_BIAS"} <= set(dir(advanced.MatmulEpilog))
    advanced.MatmulOptions(memory_limit=0, logger=linear_products._QUIET)
    advanced.MatmulPlanPreferences(limit=8)


# ---- what stands in its way


def obstacle(candidate: LinearCandidate, device: torch.device = GPU, dtype: torch.dtype = torch.bfloat16) -> str:
    return candidate.obstacle(device, dtype, SHAPE)


def test_what_it_is_for(nvmath: FakeNvmath) -> None:
    first = IMPLEMENTATIONS[1]
    assert (first.name, obstacle(first), obstacle(first, dtype=torch.float16)) == ("cublaslt-1", "", "")
    assert obstacle(first, CPU) == "it runs on cuda, the device is cpu; choose torch"
    assert "the model's dtype is float32; choose torch" in obstacle(first, dtype=torch.float32)
    assert not any(obstacle(IMPLEMENTATIONS[0], device, torch.float32) for device in (CPU, GPU))


def test_without_the_package(without_nvmath: None) -> None:
    assert obstacle(IMPLEMENTATIONS[1]) == "nvmath-python is not installed; pip install 'nvmath-python>=1.0'"
    with pytest.raises(
        BackendError, match=r"linear 'cublaslt-1' is not available: nvmath-python is not installed; pip"
    ):
        select_linear(SHAPE, GPU, torch.bfloat16, "cublaslt-1", None, None)
    with pytest.raises(BackendError, match=r"not installed.* The snapshot's video was made with it; ask for another"):
        select_linear(SHAPE, GPU, torch.bfloat16, None, "cublaslt-1", None)


@pytest.mark.parametrize("method", ["reset_operands_unchecked", "release_operands"])
def test_a_release_without_a_method(nvmath: FakeNvmath, method: str) -> None:
    nvmath.Matmul = type("Matmul", (), {"reset_operands_unchecked": 1, "release_operands": 1})
    delattr(nvmath.Matmul, method)
    with pytest.raises(BackendError, match=f"nvmath-python is too old, its Matmul has no {method}; pip install"):
        IMPLEMENTATIONS[1].load()


def test_one_that_does_not_load(nvmath: FakeNvmath, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> ModuleType:
        raise RuntimeError("libcublasLt.so.14: not found\nmore")

    monkeypatch.setattr(linear_products, "import_module", broken)
    with pytest.raises(BackendError, match=r"nvmath-python does not load: libcublasLt.so.14: not found; pip") as caught:
        IMPLEMENTATIONS[1].load()
    assert "\n" not in str(caught.value)
    assert IMPLEMENTATIONS[1].version() is not None and IMPLEMENTATIONS[0].version() is None, "that is told, not raised"


def test_fewer_algorithms_than_asked_for(nvmath: FakeNvmath) -> None:
    tuner = linear_tuner(CPU, torch.float32, SHAPE)
    with pytest.raises(BackendError, match=r"it does not compute 70 rows, 48 to 40 in float32: the last .* number 3;"):
        tuner._require_right(CublasLt(4), tuner.check())


def test_the_version_is_that_of_both_libraries(nvmath: FakeNvmath, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another cuBLASLt may number its algorithms otherwise."""
    monkeypatch.setattr("importlib.metadata.version", {"nvmath-python": "1.0.0"}.__getitem__)
    assert {kind.version() for kind in IMPLEMENTATIONS[1:]} == {"1.0.0, cuBLASLt 130200"}
    assert IMPLEMENTATIONS[0].version() is None


# ---- the trial


def spoiled(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda algorithm, a, b: change(Algorithm.product(algorithm, a, b))


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": lambda out: out * 0,
    "not a number": lambda out: out * math.nan,
    "a column of outputs": lambda out: torch.cat((out[1:], out[:1])),
    "the last row": lambda out: torch.cat((out[:, :-1], out[:, -1:] + 1), dim=1),
    "rounded like float8": lambda out: out.to(FLOAT8).float(),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [SHAPE, WITH_GELU, LinearShape(3, 5, 7)], ids=str)
def test_the_trial_tells_right_from_wrong(nvmath: FakeNvmath, shape: LinearShape, dtype: torch.dtype) -> None:
    check = LinearCheck(shape, CPU, dtype)
    assert check.error(TORCH) < TOLERANCES[dtype] / 2 and check.error(CublasLt(1)) < TOLERANCES[dtype] / 2
    for what, change in WRONG.items():
        nvmath.product = spoiled(change)
        assert check.error(CublasLt(1)) > 1.2 * TOLERANCES[dtype], what


def test_a_bias_gelu_or_layout_that_is_left_out_is_wrong() -> None:
    check = LinearCheck(WITH_GELU, CPU, torch.bfloat16)

    class Other:
        name = "other"

        def __init__(self, call: Callable[..., Tensor]) -> None:
            self.call = call

        def __call__(self, *args: Any) -> Tensor:
            return self.call(*args)

    wrong = {
        "bias": lambda x, weight, bias, gelu: TORCH(x, weight, bias * 0, gelu),
        "gelu": lambda x, weight, bias, gelu: TORCH(x, weight, bias, False),
        "stored by columns": lambda x, weight, bias, gelu: TORCH(x, weight, bias, gelu).t().contiguous().t(),
        "dtype": lambda x, weight, bias, gelu: TORCH(x, weight, bias, gelu).float(),
    }
    for what, call in wrong.items():
        assert check.error(Other(call)) > TOLERANCES[torch.bfloat16], what  # type: ignore[arg-type]


def test_a_replay_is_checked_too(nvmath: FakeNvmath, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is launched on another stream than the current one is no part of a graph."""
    stand_in_cuda.install(monkeypatch)
    monkeypatch.setattr("echo_rt.autotune.tuner.current", lambda device: contextlib.nullcontext())
    check = LinearCheck(SHAPE, CPU, torch.float32)

    def elsewhere(algorithm: Algorithm, a: Tensor, b: Tensor) -> Tensor:
        out = torch.zeros(len(a), b.shape[1])
        with _disable_current_modes():
            out.copy_(Algorithm.product(algorithm, a, b))
        return out

    for product, right in ((Algorithm.product, True), (elsewhere, False)):
        nvmath.product, check.device = product, CPU
        assert check.error(CublasLt(1)) < TOLERANCES[torch.float32]
        check.device = GPU
        assert (check.error(CublasLt(1)) < TOLERANCES[torch.float32]) == right


def test_it_is_captured_after_its_plan(nvmath: FakeNvmath, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_cuda.install(monkeypatch)
    product, (x, weight, bias) = CublasLt(2), inputs(dtype=torch.float32)
    product(x, weight, bias, True)
    graph, outs = torch.cuda.CUDAGraph(), list[Tensor]()
    capture(graph, lambda: outs.append(product(x, weight, bias, True)), stream=torch.cuda.Stream(), pool=object())
    x.copy_(inputs(dtype=torch.float32, seed=5)[0])
    graph.replay()
    assert relative_error(outs[0], TORCH(x, weight, bias, True)) < 1e-5 and len(nvmath.made) == 1


# ---- the selection


@pytest.fixture
def timed(nvmath: FakeNvmath, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Milliseconds by name; errors and inputs are those of a CPU."""
    times = {"torch": 2.0, "cublaslt-1": 3.0, "cublaslt-2": 1.0, "cublaslt-3": 1.5}
    properties = SimpleNamespace(name="Imaginary 9000", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.0.0")

    class OnCpu(LinearCheck):
        def __init__(self, shape: LinearShape, device: torch.device, dtype: torch.dtype) -> None:
            super().__init__(shape, CPU, dtype)

        def stopwatch(self, implementation: Any, /) -> Callable[[], float]:
            return lambda: times[implementation.name]

    monkeypatch.setattr(linear_products, "LinearCheck", OnCpu)
    return times


def test_the_fastest_is_selected_and_remembered(timed: dict[str, float], tmp_path: Path) -> None:
    cache = tmp_path / "linear"
    choice = select_linear(SHAPE, GPU, torch.bfloat16, None, None, cache)
    assert choice.name == "cublaslt-2" and dict(choice.timings) == timed
    assert "number 3" in choice.rejected["cublaslt-4"]
    timed["torch"] = 0.1
    again = select_linear(SHAPE, GPU, torch.bfloat16, None, None, cache)
    assert again.name == "cublaslt-2" and again.reason.endswith(f"(remembered in {cache})")
    assert select_linear(WITH_GELU, GPU, torch.bfloat16, None, None, cache).name == "torch", "each shape has its own"


def test_another_cublaslt_is_measured_anew(timed: dict[str, float], tmp_path: Path) -> None:
    cache = tmp_path / "linear"
    select_linear(SHAPE, GPU, torch.bfloat16, None, None, cache)
    sys.modules["nvmath.bindings.cublasLt"].get_version = lambda: 130300  # type: ignore[attr-defined]
    timed["cublaslt-3"] = 0.5
    assert select_linear(SHAPE, GPU, torch.bfloat16, None, None, cache).name == "cublaslt-3"


def test_a_wrong_one_is_refused(timed: dict[str, float], nvmath: FakeNvmath, caplog: pytest.LogCaptureFixture) -> None:
    right = Algorithm.product
    nvmath.product = lambda algorithm, a, b: right(algorithm, a, b) * (0 if algorithm.number == 2 else 1)
    choice = select_linear(SHAPE, GPU, torch.bfloat16, None, None, None)
    assert choice.name == "cublaslt-3" and "its result is wrong" in choice.rejected["cublaslt-2"]
    assert "cublaslt-2 is not used" in caplog.text
    with pytest.raises(BackendError, match=r"linear 'cublaslt-2' is not available: its result is wrong"):
        select_linear(SHAPE, GPU, torch.bfloat16, "cublaslt-2", None, None)


def test_who_asks_by_name_and_what_a_snapshot_names(timed: dict[str, float]) -> None:
    asked = select_linear(SHAPE, GPU, torch.bfloat16, "cublaslt-1", "cublaslt-3", None)
    assert (asked.name, asked.by_name) == ("cublaslt-1", True)
    named = select_linear(SHAPE, GPU, torch.bfloat16, None, "cublaslt-3", None)
    assert (named.name, named.reason, named.by_name) == ("cublaslt-3", "as in the snapshot", False)
    assert select_linear(SHAPE, GPU, torch.bfloat16, None, "torch", None).name == "torch"
    with pytest.raises(BackendError, match=r"linear must be one of torch, cublaslt-1, .*; got 'magic'"):
        select_linear(SHAPE, GPU, torch.bfloat16, "magic", None, None)


@pytest.mark.parametrize(("requested", "prescribed"), [(None, None), (None, "torch"), ("torch", None)])
def test_without_the_package_nothing_is_done(
    without_nvmath: None, monkeypatch: pytest.MonkeyPatch, requested: str | None, prescribed: str | None
) -> None:
    """No measurement, no cache, no message."""
    monkeypatch.delattr(linear_products, "linear_tuner")
    choice = select_linear(SHAPE, GPU, torch.bfloat16, requested, prescribed, Path("/no/such/place"))
    assert choice.implementation is TORCH and choice.by_name == (requested is not None)


# ---- the model


def test_a_layer_takes_the_product_of_its_shape() -> None:
    tensors = {"a.weight": torch.randn(40, 48), "a.bias": torch.randn(40)}
    calls: list[tuple[str, int, bool]] = []

    class Noted:
        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self, x: Tensor, weight: Tensor, bias: Tensor, gelu: bool) -> Tensor:
            calls.append((self.name, len(x), gelu))
            return TORCH(x, weight, bias, gelu)

    products: Any = {SHAPE: Noted("plain"), WITH_GELU: Noted("gelu")}
    layer = Weights(tensors, CPU, torch.float32, products=products).linear("a")
    x = torch.randn(70, 48)
    for rows in (x, x[:69]):
        plain = Linear(layer.weight, layer.bias)
        assert torch.equal(layer(rows), plain(rows)) and torch.equal(layer.then_gelu(rows), plain.then_gelu(rows))
    assert calls == [("plain", 70, False), ("gelu", 70, True)], "69 rows are torch's"


def test_the_shapes_are_those_of_a_pass(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All large products of a block, but those over the text and at both ends of the transformer."""
    seen: list[LinearShape] = []
    plain = linear_products.TorchLinear.__call__

    def noted(self: object, x: Tensor, weight: Tensor, bias: Tensor, gelu: bool) -> Tensor:
        seen.append(LinearShape(len(x), weight.shape[1], weight.shape[0], gelu))
        return plain(TORCH, x, weight, bias, gelu)

    monkeypatch.setattr(linear_products.TorchLinear, "__call__", noted)
    with load(small_model) as runtime, runtime.stream(prompt_embeds=embeds(runtime)) as stream:
        seen.clear()
        take(stream, 1)
        config = runtime.config
        transformer: TransformerConfig = config.transformer
        assert tuple(runtime.linear) == linear_shapes(config, torch.float32)
    of_blocks = {shape for shape in seen if shape.rows == config.tokens_per_block}
    patch = transformer.in_channels * math.prod(transformer.patch_size)
    ends = {(patch, transformer.dim), (transformer.dim, patch)}
    assert of_blocks >= set(runtime.linear)
    assert {(shape.inputs, shape.outputs) for shape in of_blocks - set(runtime.linear)} <= ends
    assert linear_shapes(config, FLOAT8) == (LinearShape(config.tokens_per_block, transformer.dim, transformer.dim),)


@pytest.fixture
def on_cpu(nvmath: FakeNvmath, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNvmath]:
    """Candidates that a CPU has too, in float32."""
    able = [
        dataclasses.replace(kind, devices=("cuda", "cpu"), dtypes=(torch.float32, torch.bfloat16))
        for kind in IMPLEMENTATIONS
    ]
    monkeypatch.setattr(linear_products, "IMPLEMENTATIONS", tuple(able))
    return nvmath


def test_a_video_goes_on_by_the_algorithms_that_made_it(small_model: Path, on_cpu: FakeNvmath, tmp_path: Path) -> None:
    with load(small_model) as runtime, runtime.stream(prompt_embeds=embeds(runtime), seed=4) as stream:
        take(stream, 2)
        of_torch = stream.snapshot()
        plain = take(stream, 2)
    assert not on_cpu.executed, "a CPU selects torch's"
    assert not [label for label in of_torch.model[NAMES] if label.startswith(LINEAR)]
    with load(small_model, linear="cublaslt-2") as runtime:
        assert {choice.name for choice in runtime.linear.values()} == {"cublaslt-2"}
        with runtime.stream(prompt_embeds=embeds(runtime), seed=4) as stream:
            take(stream, 2)
            snapshot = stream.snapshot()
            expected = take(stream, 2)
    assert set(on_cpu.executed) == {2} and not same(expected, plain), "rounded otherwise"
    named = {label: name for label, name in snapshot.model[NAMES].items() if label.startswith(LINEAR)}
    assert named == {f"{LINEAR}{shape}": "cublaslt-2" for shape in linear_shapes(runtime.config, torch.float32)}
    with load(small_model, like=snapshot) as runtime:
        assert {choice.reason for choice in runtime.linear.values()} == {"as in the snapshot"}
        with runtime.resume(snapshot) as stream:
            assert same(take(stream, 2), expected)
        with pytest.raises(StreamError, match=r"linear layer of .* was torch for its video and is cublaslt-2 here"):
            runtime.resume(of_torch)
    with load(small_model) as runtime:
        with pytest.raises(StreamError, match=r"linear layer of .* was cublaslt-2 for its video and is torch here"):
            runtime.resume(snapshot)
        with runtime.resume(of_torch) as stream:
            assert same(take(stream, 2), plain)
    with load(small_model, linear="torch", like=snapshot) as runtime:
        runtime.resume(snapshot).close()  # asked for by name


def test_an_old_snapshot_goes_on_by_torch(
    small_model: Path, on_cpu: FakeNvmath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a measurement would select."""
    with load(small_model) as runtime, runtime.stream(prompt_embeds=embeds(runtime)) as stream:
        take(stream, 1)
        old = stream.snapshot()
    asked: list[str | None] = []
    select = linear_products.select_linear

    def noted(shape: LinearShape, device: Any, dtype: Any, requested: Any, prescribed: Any, cache: Any) -> Any:
        asked.append(prescribed)
        return select(shape, device, dtype, requested, prescribed, cache)

    monkeypatch.setattr("echo_rt.engine.build.select_linear", noted)
    with load(small_model, like=old) as runtime:
        runtime.resume(old).close()
    assert asked == ["torch"] * 4
    asked.clear()
    load(small_model).close()
    assert asked == [None] * 4


def test_doctor_tries_a_product_without_a_model(nvmath: FakeNvmath) -> None:
    (tuner,) = linear_products.probes(CPU, load_ops("torch"))
    states = tuner.available()
    assert states["torch"] == "available" and states["cublaslt-1"].startswith("it runs on cuda")
    assert list(tuner.known(None)) == [("torch", "torch's own on a CPU")]
    assert [tuner.dtype for tuner in linear_products.probes(GPU, load_ops("torch"))] == [torch.bfloat16]
