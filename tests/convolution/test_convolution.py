"""Which way a convolution is computed: by name, by measuring, from the file of earlier measurements."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from echo_rt.convolution import (
    ConvolutionCandidate,
    ConvolutionShape,
    convolution_tuner,
    implementations,
    probes,
    select_convolutions,
)
from echo_rt.errors import BackendError
from echo_rt.ops.backends import load_ops

CAUSAL = ConvolutionShape(4, 5, 6, 8, 8, (3, 3, 3))
WIDER = ConvolutionShape(4, 5, 60, 8, 8, (3, 3, 3))
GROWING = ConvolutionShape(2, 5, 6, 8, 4, (1, 3, 3), enlarge=True)
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


def kind(name: str, **facts) -> ConvolutionCandidate:
    return ConvolutionCandidate(name, lambda weight: lambda frames: frames, **facts)


def narrow(name: str) -> ConvolutionCandidate:
    return kind(name, limit=lambda shape: "it takes narrow pictures" if shape.width > 6 else "")


STAND_INS = (kind("a"), kind("b"), kind("grow-a", enlarges=True), kind("grow-b", enlarges=True))


@dataclass
class FakeJudge:
    """Errors and milliseconds by the kind's name, or by name and shape. Counts what it is asked."""

    times: dict[object, float] = field(default_factory=dict)
    errors: dict[object, float | Exception] = field(default_factory=dict)
    asked: list[tuple[object, ...]] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    timed: list[str] = field(default_factory=list)

    def __call__(self, shape, device, dtype) -> OneShape:
        self.asked.append((shape, device, dtype))
        return OneShape(self, shape)


@dataclass
class OneShape:
    judge: FakeJudge
    shape: ConvolutionShape

    def error(self, kind: ConvolutionCandidate) -> float:
        self.judge.checked.append(kind.name)
        error = self.judge.errors.get((kind.name, self.shape), self.judge.errors.get(kind.name, 0.0))
        if isinstance(error, Exception):
            raise error
        return error

    def stopwatch(self, kind: ConvolutionCandidate) -> Callable[[], float]:
        time = self.judge.times.get((kind.name, self.shape), self.judge.times.get(kind.name))
        if time is None:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

        def watch() -> float:
            self.judge.timed.append(kind.name)
            return time

        return watch


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """What is asked of a GPU, apart from the work itself; counts how often memory is given back."""
    found = SimpleNamespace(name="Imaginary 9000", major=9, minor=0, emptied=0)

    def empty() -> None:
        found.emptied += 1

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty)
    return found


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "deep" / "convolution"


def choose(judge, shapes, kinds=STAND_INS, requested=None, cache=None, dtype=torch.bfloat16, device=GPU):
    with mock.patch("echo_rt.convolution.ConvolutionCheck", judge):
        return select_convolutions(requested, shapes, device=device, dtype=dtype, cache=cache, candidates=kinds)


def names(choices) -> list[str]:
    return [choice.name for choice in choices.values()]


def test_each_shape_gets_the_fastest_of_its_family(caplog, gpu):
    judge = FakeJudge({("a", CAUSAL): 2.0, ("b", CAUSAL): 0.5, "a": 1.0, "b": 3.0, "grow-a": 0.25, "grow-b": 0.125})
    with caplog.at_level(logging.DEBUG, "echo_rt.convolution"):
        choices = choose(judge, [CAUSAL, WIDER, GROWING, CAUSAL])
    assert list(choices) == [CAUSAL, WIDER, GROWING] and names(choices) == ["b", "a", "grow-b"]
    assert choices[CAUSAL].reason == "fastest on Imaginary 9000: b 0.500 ms, a 2.000 ms"
    assert choices[GROWING].timings == {"grow-a": 0.25, "grow-b": 0.125} and choices[GROWING].rejected == {}
    assert judge.asked == [(shape, GPU, torch.bfloat16) for shape in (CAUSAL, WIDER, GROWING)], "once for each"
    assert all(str(shape) in caplog.text and choices[shape].reason in caplog.text for shape in choices)
    assert gpu.emptied == 3, "one shape's memory is not held while the next is tried"


@pytest.mark.parametrize("error", [0.5, math.inf, 0.021])
def test_a_wrong_one_is_never_chosen(caplog, error):
    judge = FakeJudge({"a": 0.1, "b": 9.0}, errors={"a": error})
    choice = choose(judge, [CAUSAL])[CAUSAL]
    assert choice.name == "b" and "its result is wrong" in choice.rejected["a"] and "a" not in judge.timed
    assert "a is not used: its result is wrong for 4 frames of 6x5" in caplog.text
    with pytest.raises(BackendError, match="convolution 'a' is not available: its result is wrong") as caught:
        choose(judge, [CAUSAL], requested="a")
    assert "\n" not in str(caught.value)


def test_where_all_are_wrong_none_is_chosen():
    judge = FakeJudge({"a": 0.1, "b": 0.1}, errors={"a": 1.0, "b": RuntimeError("no kernel image\nmore")})
    with pytest.raises(BackendError, match=r"no convolution works on cuda:0 for 4 .* a: .*wrong.* b: .*no kernel"):
        choose(judge, [CAUSAL])


def test_what_cannot_be_captured_is_left_out():
    choice = choose(FakeJudge({"b": 1.0}), [CAUSAL])[CAUSAL]
    assert choice.name == "b" and "cannot be captured in a CUDA graph" in choice.rejected["a"]


def test_what_runs_out_of_memory_is_left_out_for_the_shape_where_it_does(cache, caplog):
    """And only there is the outcome not remembered."""
    judge = FakeJudge({"a": 1.0, "b": 2.0}, errors={("a", WIDER): torch.OutOfMemoryError("full")})
    choices = choose(judge, [CAUSAL, WIDER], cache=cache)
    assert names(choices) == ["a", "b"]
    assert choices[WIDER].rejected["a"].startswith(f"it runs out of memory for {WIDER} in bfloat16: full")
    assert "a is not used: it runs out of memory" in caplog.text
    again = FakeJudge({"a": 1.0, "b": 2.0})
    assert names(choose(again, [CAUSAL, WIDER], cache=cache)) == ["a", "a"]
    assert [shape for shape, *_ in again.asked] == [WIDER]


def test_a_way_asked_for_by_name_that_runs_out_of_memory():
    judge = FakeJudge({"b": 1.0}, errors={"a": torch.OutOfMemoryError("full")})
    with pytest.raises(torch.OutOfMemoryError, match=r"convolution 'a': it runs out of memory for .*: full"):
        choose(judge, [CAUSAL], requested="a")


# -- by name -----------------------------------------------------------------------------------------------------


def test_a_name_forces_its_family_and_is_checked_but_not_timed(cache):
    judge = FakeJudge({"a": 1.0, "b": 2.0, "grow-a": 2.0, "grow-b": 1.0})
    choices = choose(judge, [CAUSAL, WIDER, GROWING], requested="b", cache=cache)
    assert names(choices) == ["b", "b", "grow-b"]
    assert [choice.reason for choice in choices.values()][:2] == ["asked for by name"] * 2
    assert judge.checked[:2] == ["b", "b"] and set(judge.timed) == {"grow-a", "grow-b"}


def test_names_for_both_families():
    judge = FakeJudge()
    assert names(choose(judge, [CAUSAL, GROWING], requested="a, grow-b")) == ["a", "grow-b"]
    assert judge.timed == []


def test_one_name_may_stand_for_both_families():
    both = (*STAND_INS, kind("own"), kind("own", enlarges=True))
    assert names(choose(FakeJudge(), [CAUSAL, GROWING], both, requested="own")) == ["own", "own"]


def test_a_name_is_taken_where_it_works_and_said_where_not():
    judge = FakeJudge({"a": 1.0, "n": 2.0})
    choices = choose(judge, [CAUSAL, WIDER], (kind("a"), narrow("n")), requested="n")
    assert names(choices) == ["n", "a"]
    assert choices[WIDER].reason.endswith(f"; not n: it takes narrow pictures, and this is {WIDER}")


@pytest.mark.parametrize(
    ("requested", "dtype", "said"),
    [
        ("c", torch.bfloat16, r"convolution must be one of a, b, grow-a, grow-b, half, n; got 'c'"),
        ("a,c", torch.bfloat16, r"convolution must be one of .*; got 'c'"),
        ("", torch.bfloat16, r"convolution must be one of .*; got ''"),
        ("a,b", torch.bfloat16, r"convolution 'a,b': expected one of a and b, got both"),
        ("half", torch.float32, r"convolution 'half' is not available: it computes in bfloat16, .* choose conv3d or "),
        (
            "n",
            torch.bfloat16,
            r"convolution 'n' is not available: it takes narrow pictures, .*; choose conv3d or ",
        ),
    ],
)
def test_a_name_that_cannot_be_had(requested, dtype, said):
    every = (*STAND_INS, kind("half", dtypes=(torch.bfloat16,)), narrow("n"))
    with pytest.raises(BackendError, match=said) as caught:
        choose(FakeJudge({"a": 1.0}), [WIDER], every, requested, dtype=dtype)
    assert "\n" not in str(caught.value)


def test_on_a_cpu(cache):
    judge = FakeJudge()

    def on_cpu(requested):
        return names(choose(judge, [CAUSAL, GROWING], implementations(), requested, cache, torch.float32, CPU))

    assert on_cpu(None) == ["three-products", "enlarged"]
    assert on_cpu("phases") == ["three-products", "phases"]
    assert on_cpu("three-products,enlarged") == ["three-products", "enlarged"]
    with pytest.raises(
        BackendError, match=r"convolution 'kernel' is not available: .*; choose conv3d or three-products"
    ):
        on_cpu("kernel")
    assert judge.asked == [] and not cache.parent.exists(), "nothing is measured or written"


def test_a_snapshots_that_there_is_no_more_says_what_to_choose():
    said = r"convolution must be one of conv3d, three-products, .*; got 'conv3d-searched'.*"
    with pytest.raises(BackendError, match=rf"{said}\. The snapshot's video was made with it") as caught:
        select_convolutions(
            None,
            [CAUSAL],
            device=CPU,
            dtype=torch.float32,
            cache=None,
            candidates=implementations(),
            prescribed={CAUSAL: "conv3d-searched"},
        )
    assert "\n" not in str(caught.value)


# -- the file ----------------------------------------------------------------------------------------------------


def test_what_was_measured_is_not_measured_again(cache):
    shapes = [CAUSAL, WIDER, GROWING]
    first = choose(FakeJudge({"a": 2.0, "b": 0.5, "grow-a": 1.0, "grow-b": 2.0}), shapes, cache=cache)
    judge = FakeJudge()
    again = choose(judge, shapes, cache=cache)
    assert judge.asked == [], "not even tensors are made"
    assert names(again) == names(first) == ["b", "b", "grow-a"]
    for shape in shapes:
        assert again[shape].timings == first[shape].timings
        assert again[shape].reason == f"{first[shape].reason} (remembered in {cache})"
    known = list(convolution_tuner(GPU, torch.bfloat16, CAUSAL, STAND_INS).known(cache))
    known += convolution_tuner(GPU, torch.bfloat16, GROWING, STAND_INS).known(cache)
    assert known[0] == ("b", f"for {CAUSAL} in bfloat16, {first[CAUSAL].reason}")
    assert [name for name, _ in known] == ["b", "b", "grow-a"]


def changed_gpu(monkeypatch, gpu):
    gpu.name = "Imaginary 9001"
    return STAND_INS


def changed_cudnn(monkeypatch, gpu):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 99_000)
    return STAND_INS


def changed_build(monkeypatch, gpu):
    return (kind("a", build="cuda"), *STAND_INS[1:])


@pytest.mark.parametrize("change", [changed_gpu, changed_cudnn, changed_build])
def test_another_machine_is_measured_anew_and_the_first_is_kept(cache, monkeypatch, gpu, change):
    choose(FakeJudge({"a": 2.0, "b": 0.5}), [CAUSAL], cache=cache)
    with monkeypatch.context() as patch:
        others = change(patch, gpu)
        assert list(convolution_tuner(GPU, torch.bfloat16, CAUSAL, others).known(cache)) == []
        assert names(choose(FakeJudge({"a": 0.1, "b": 9.0}), [CAUSAL], others, cache=cache)) == ["a"]
    gpu.name = "Imaginary 9000"
    assert names(choose(FakeJudge(), [CAUSAL], cache=cache)) == ["b"]


def test_a_winner_that_is_gone_is_not_missed(cache, caplog):
    choose(FakeJudge({"a": 2.0, "b": 0.5}), [WIDER], cache=cache)
    choice = choose(FakeJudge({"a": 2.0}), [WIDER], (kind("a"), narrow("b")), cache=cache)[WIDER]
    assert choice.name == "a" and choice.rejected["b"].startswith("it takes narrow pictures")
    assert "b was the fastest and is no longer there (it takes narrow pictures" in caplog.text


def test_a_winner_of_an_earlier_version_is_measured_anew_and_said(cache, caplog):
    choose(FakeJudge({"a": 2.0, "b": 0.5}), [CAUSAL], cache=cache)
    (file,) = cache.iterdir()
    file.write_text(file.read_text().replace('"convolution": "b"', '"convolution": "conv3d-searched"'))
    assert names(choose(FakeJudge({"a": 2.0, "b": 0.5}), [CAUSAL], cache=cache)) == ["b"]
    assert "conv3d-searched was the fastest and is no longer there (convolution must be one of a, b" in caplog.text
    assert names(choose(FakeJudge(), [CAUSAL], cache=cache)) == ["b"], "and remembered"


def test_other_dtypes_are_their_own(cache):
    choose(FakeJudge({"a": 1.0, "b": 2.0}), [CAUSAL], cache=cache)
    assert names(choose(FakeJudge({"a": 2.0, "b": 1.0}), [CAUSAL], cache=cache, dtype=torch.float16)) == ["b"]
    assert names(choose(FakeJudge(), [CAUSAL], cache=cache)) == ["a"]


# -- what there is -----------------------------------------------------------------------------------------------


def test_what_is_available():
    every = (kind("a"), kind("b"), kind("c", devices=("cpu",)), kind("grow", enlarges=True))
    judge = FakeJudge(errors={"b": math.inf, "grow": RuntimeError("no kernel image")})
    with mock.patch("echo_rt.convolution.ConvolutionCheck", judge):
        states = {
            name: state
            for shape in (CAUSAL, GROWING)
            for name, state in convolution_tuner(GPU, torch.bfloat16, shape, every).available().items()
        }
    assert states["a"] == "available" and "its result is wrong" in states["b"]
    assert states["c"].startswith("it runs on cpu, the device is cuda:0; choose conv3d")
    assert "no kernel image; choose another" in states["grow"]
    on_gpu = probes(GPU, load_ops("torch"))
    assert {tuner.dtype for tuner in on_gpu} == {torch.bfloat16}, "the dtype that models have on a GPU"
    assert [tuner.shapes.enlarge for tuner in on_gpu] == [False, True]
    on_cpu = [one for tuner in probes(CPU, load_ops("torch")) for one in tuner.available().items()]
    assert [name for name, state in on_cpu if state == "available"] == [
        "conv3d",
        "three-products",
        "enlarged",
        "phases",
    ]


def test_what_is_known_on_a_cpu():
    assert [one for tuner in probes(CPU, load_ops("torch")) for one in tuner.known(None)] == [
        ("three-products", "torch's own on a CPU"),
        ("enlarged", "torch's own on a CPU"),
    ]
