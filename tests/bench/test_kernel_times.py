"""The kernel table on the CPU: right results are timed, wrong ones are found, and libraries do what we do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kernel_times
import pytest
import torch
from kernel_times import (
    BOUNDS,
    LIBRARY_BOUNDS,
    QUERY_NORM,
    SEARCHED,
    Row,
    Run,
    compare,
    copies,
    difference,
    time_library,
    time_variant,
)
from library_calls import library_calls, result_of
from op_inputs import IN8, OPS, linear_layers, variants
from roofline import Work, measure_ceilings
from timing import HostTimer

from echo_rt.autotune.tuner import Selection
from echo_rt.bench.runner import median_p99
from echo_rt.bench.settings import TINY
from echo_rt.model.linear_products import TORCH, LinearSelection, LinearShape, TorchLinear, linear_shapes
from echo_rt.ops import reference
from echo_rt.ops.backends import available_backends

CPU = torch.device("cpu")
BACKEND = "emulated" if available_backends()["emulated"] == "available" else "torch"


def run_of(ops: object, **changes: object) -> Run:
    ceilings = {unit: {"value": 1.0} for unit in ("GB/s", "TFLOP/s")}
    facts = {"judged": False, "compiled": False} | changes
    run = Run(CPU, torch.bfloat16, ops, TINY, HostTimer(), 2, 0, **facts)
    vars(run)["ceilings"] = ceilings
    return run


def agree(actual: Sequence[Any], expected: Sequence[Any], bounds: dict[torch.dtype, float] = BOUNDS) -> bool:
    error, bound = compare(actual, expected, bounds)
    return error <= bound


def test_a_run_writes_valid_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--out", str(tmp_path), "--device", "cpu", "--quick", "--backend", BACKEND]
    code = kernel_times.main([*arguments, "--op", "gated_residual_norm", "--op", "memory_update"])
    assert code == 0
    content = json.loads((tmp_path / "kernel_times.json").read_text(), parse_constant=pytest.fail)
    norm, update = content["tables"]["Kernels"]
    assert (norm["op"], update["op"]) == ("gated_residual_norm", "memory_update")
    assert content["passed"] and content["clock"] == HostTimer.clock and "sizes: tiny" in content["notes"][0]
    for row in (norm, update):
        assert 0 < row["median_us"] <= row["p99_us"] and row["error"] <= row["error_bound"]
        assert row["verdict"] == "right" and not row["problems"]
    assert norm["rate"] == pytest.approx(norm["bytes"] / norm["median_us"] / 1e3)
    copy, _ = content["tables"]["Ceilings"]
    assert norm["share"] == pytest.approx(norm["rate"] / copy["value"])
    if BACKEND != "torch":
        assert norm["torch_ratio"] == pytest.approx(norm["torch_us"] / norm["median_us"])
    assert norm["library"] == "addcmul, layer_norm"
    assert norm["library_ratio"] == pytest.approx(norm["library_us"] / norm["median_us"])
    assert norm["copy_share"] == pytest.approx(norm["copy_us"] / norm["median_us"])
    assert update["rate"] == pytest.approx(update["flops"] / update["median_us"] / 1e6)
    assert "gated_residual_norm" in capsys.readouterr().out


def test_what_a_library_computes_is_timed_too() -> None:
    rows = list(time_library(run_of(None)))
    names = [f"product {layer.name}" for layer in linear_layers(TINY)]
    in8 = [f"product {layer.name}, {IN8}" for layer in linear_layers(TINY) if layer.float8]
    assert {row["variant"] for row in rows} == {*names, *in8, QUERY_NORM} and len(in8) == 4
    assert all(row.ok and 0 <= row["error"] <= row["error_bound"] and row["median_us"] > 0 for row in rows)
    first = rows[0]  # q, k and v
    tokens, dim = TINY.config.tokens_per_block, TINY.config.transformer.dim
    assert (first["flops"], first["calls"]) == (6 * tokens * dim**2, 10)
    assert first["bytes"] == 2 * (tokens * dim + 3 * dim**2 + 3 * tokens * dim)


def test_what_the_autotuner_selects_is_timed_beside_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Third(TorchLinear):
        name = "cublaslt-3"

    asked: list[LinearShape] = []

    def select(shape: LinearShape, *_: object) -> LinearSelection:
        asked.append(shape)
        if not shape.gelu:
            return Selection(TORCH, "the only one here")  # where nothing is measured
        return Selection(Third(), "fastest", {"torch": 2.0, "cublaslt-3": 1.0})

    monkeypatch.setattr(kernel_times, "select_linear", select)
    rows = {row["variant"]: row for row in time_library(run_of(None))}
    (searched,) = (name for name in rows if SEARCHED in name)
    assert searched == f"product ffn_in, {SEARCHED}: cublaslt-3" and rows[searched].ok
    assert rows[searched]["flops"] == rows["product ffn_in"]["flops"]
    assert {*asked} == {*linear_shapes(TINY.config, torch.bfloat16)}, "those of the model"


def test_a_wrong_library_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: TorchLinear, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, gelu: bool) -> torch.Tensor:
        return 1.1 * torch.nn.functional.linear(x, weight, bias)

    monkeypatch.setattr(TorchLinear, "__call__", wrong)
    rows = {row["variant"]: row.ok for row in time_library(run_of(None))}
    assert not any(ok for name, ok in rows.items() if name.startswith("product") and IN8 not in name)
    assert rows[QUERY_NORM] and rows[f"product ffn_out, {IN8}"]


def test_what_cannot_be_had(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kernel_times.main(["--out", str(tmp_path), "--size", "tiny", "--device", "tpu"]) == 2
    assert "got 'tpu'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_wrong_kernel_is_no_result() -> None:
    def nearly(x: torch.Tensor, *rest: object) -> torch.Tensor:
        return reference.modulated_layer_norm(x, *rest) * 1.01

    def forgetful(x: torch.Tensor, *rest: object) -> torch.Tensor:
        return reference.gated_residual_norm(x.clone(), *rest)  # returns the norm, leaves x as it was

    def broken(*arguments: object) -> None:
        raise RuntimeError("no such thing\nat all")

    ops = SimpleNamespace(name="emulated", modulated_layer_norm=nearly, gated_residual_norm=forgetful, flow_step=broken)
    rows = {op: time_variant(run_of(ops), variants(op, TINY)[0]) for op in vars(ops) if op != "name"}
    assert not any(row.ok for row in rows.values())
    for op in ("modulated_layer_norm", "gated_residual_norm"):
        assert "differs from the torch backend by" in rows[op]["problems"][0] and rows[op]["verdict"] == "failed"
    assert rows["flow_step"]["problems"] == ["RuntimeError: no such thing"]


def test_what_memory_limits_is_held_against_the_copy_rate() -> None:
    row = Row("memory_attention", "", 1, "cuda")
    row.take((100.0, 110.0), Work(10**6, 10**9, "arithmetic"), run_of(None).ceilings)
    assert (row["rate"], row["unit"], row["share"], row["p99_us"]) == (10.0, "TFLOP/s", 10.0, 110.0)
    row.judge(judged=True)
    assert row["verdict"] == "right"
    for share, judged, verdict in (
        (0.84, True, "unmet: 85% of the copy rate"),
        (0.85, True, "met: 85% of the copy rate"),
    ):
        memory = Row("flow_step", "", 1, "cuda", limit="memory", share=share, median_us=1.0)
        memory.judge(judged)
        assert memory["verdict"] == verdict
    memory.judge(judged=False)
    assert memory["verdict"] == "right"


def test_ceilings_are_of_what_was_measured() -> None:
    ticks = iter(range(0, 10**9, 10**6))  # every call takes a millisecond
    timer = HostTimer(now=lambda: next(ticks))
    found = measure_ceilings(lambda call: median_p99(timer.measure(call, 3, 0)), CPU, torch.bfloat16)
    copied, side = 2**24, 256
    assert found["GB/s"]["value"] == pytest.approx(2 * copied / 1e-3 / 1e9)
    assert found["TFLOP/s"]["value"] == pytest.approx(2 * side**3 / 1e-3 / 1e12)


@pytest.mark.parametrize("op", OPS)
def test_libraries_compute_what_the_operation_does(op: str) -> None:
    for variant in variants(op, TINY):
        args = variant.arguments(torch.bfloat16, CPU)
        theirs = copies(args)
        wanted = result_of(op, getattr(reference, op)(*theirs), theirs)
        for name, library in library_calls(op, args, CPU, compiled=False).items():
            own = copies(args)
            result = result_of(op, library(own), own)
            assert agree([result], [wanted], LIBRARY_BOUNDS), name


def test_agreement() -> None:
    a = torch.ones(10, dtype=torch.bfloat16)
    assert difference(a, a) == 0.0
    assert difference(a * 1.5, a) == pytest.approx(0.5)
    assert difference(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5])) == 0.25
    assert not agree([torch.tensor([1, 2])], [torch.tensor([1, 3])])
    assert not agree([a[:5]], [a]) and not agree([a * float("nan")], [a]) and not agree((None, a), (a, a))
    near, far, nothing = a.clone(), a.float() * 1.1, a * float("nan")
    assert compare((near, far), (a, a.float()), BOUNDS)[0] == pytest.approx(0.1)
    for given in ((near, nothing), (nothing, near)):
        error, _ = compare(given, (a, a), BOUNDS)
        assert not agree(given, (a, a)) and error != error


def test_inputs_are_drawn_on_the_device_and_are_the_same_each_time() -> None:
    variant = variants("gated_residual_norm", TINY)[0]
    first, second = (variant.arguments(torch.float32, CPU) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if isinstance(a, torch.Tensor))
    assert float(first[0].std()) == pytest.approx(1.0, abs=0.05)
