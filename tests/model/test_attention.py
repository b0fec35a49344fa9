"""Which attention is chosen: by name, by measuring, from the file of earlier measurements."""

from __future__ import annotations

import gc
import logging
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from echo_rt.attention import (
    AttentionShapes,
    _of_float8,
    attention_tuner,
    implementations,
    probes,
)
from echo_rt.attention.backends import IMPLEMENTATIONS, AttentionCandidate, Library
from echo_rt.errors import BackendError
from echo_rt.ops.backends import load_ops
from echo_rt.utils.device import FLOAT8

EVERY = implementations(load_ops("torch"))
SHAPES = AttentionShapes(queries=6, keys=10, heads=2, head_dim=8)
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


def kind(name: str, **facts) -> AttentionCandidate:
    return AttentionCandidate(name, lambda: Library(name, lambda q, k, v: q), **facts)


def known_selections(cache, kinds) -> list[tuple[str, str]]:
    return list(attention_tuner(GPU, torch.bfloat16, SHAPES, kinds).known(cache))


def absent(name: str, why: str) -> AttentionCandidate:
    def load():
        raise BackendError(why)

    return AttentionCandidate(name, load)


@dataclass
class FakeJudge:
    """Errors and milliseconds by name; a name without a time cannot be captured. Counts what it is asked."""

    times: dict[str, float | list[float]]
    errors: dict[str, float | Exception] = field(default_factory=dict)
    asked: list[tuple[AttentionShapes, torch.device, torch.dtype]] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    timed: list[str] = field(default_factory=list)

    def __call__(self, *case) -> FakeJudge:
        self.asked.append(case)
        return self

    def error(self, attention) -> float:
        self.checked.append(attention.name)
        error = self.errors.get(attention.name, 0.0)
        if isinstance(error, Exception):
            raise error
        return error

    def stopwatch(self, attention) -> Callable[[], float]:
        if attention.name not in self.times:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        time = self.times[attention.name]

        def watch() -> float:
            self.timed.append(attention.name)
            return time if isinstance(time, float) else time[self.timed.count(attention.name) % len(time)]

        return watch


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """What this module asks of a GPU, apart from the work itself."""
    properties = SimpleNamespace(name="Imaginary 9000", major=9, minor=0, emptied=0)

    def empty() -> None:
        properties.emptied += 1

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty)
    return properties


def choose(
    judge,
    kinds,
    cache=None,
    requested=None,
    dtype=torch.bfloat16,
    shapes=SHAPES,
    device=GPU,
    prescribed=None,
    forgive=(),
):
    with mock.patch("echo_rt.attention.AttentionCheck", judge):
        return attention_tuner(device, dtype, shapes, kinds).select(requested, prescribed, cache=cache, forgive=forgive)


def test_the_fastest_is_chosen_and_the_reason_says_so(caplog):
    judge = FakeJudge({"a": 2.0, "b": 0.5, "c": 1.0})
    with caplog.at_level(logging.DEBUG, "echo_rt.attention"):
        choice = choose(judge, [kind("a"), kind("b"), kind("c")])
    assert choice.name == "b"
    assert choice.timings == {"a": 2.0, "b": 0.5, "c": 1.0} and choice.rejected == {}
    assert choice.reason == "fastest on Imaginary 9000: b 0.500 ms, c 1.000 ms, a 2.000 ms"
    assert judge.asked == [(SHAPES, GPU, torch.bfloat16)], "the real shapes, device and dtype"
    assert choice.reason in caplog.text and str(SHAPES) in caplog.text


def test_the_memory_of_a_trial_is_given_back(gpu):
    """That of its graphs is nobody else's to use until then, and a decoder without convolutions gives none back."""
    choose(FakeJudge({"a": 1.0}), [kind("a")])
    assert gpu.emptied == 1


def test_medians_count_and_all_are_timed_in_turns():
    judge = FakeJudge({"steady": 1.0, "erratic": [0.1, 3.0, 3.0]})
    assert choose(judge, [kind("steady"), kind("erratic")]).name == "steady"
    assert judge.timed[:4] == ["steady", "erratic", "steady", "erratic"]
    assert len(judge.timed) >= 10


@pytest.mark.parametrize("error", [0.5, math.inf])
def test_a_wrong_one_is_rejected_and_named(caplog, error):
    judge = FakeJudge({"wrong": 0.1, "right": 1.0}, errors={"wrong": error, "right": 0.001})
    choice = choose(judge, [kind("wrong"), kind("right")])
    assert choice.name == "right"
    assert "wrong" in choice.rejected["wrong"] and "wrong" not in choice.timings and "wrong" not in judge.timed
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert record.getMessage().startswith("wrong is not used: its result is wrong")


def test_the_bound_is_that_of_the_dtype():
    judge = FakeJudge({"a": 1.0}, errors={"a": 0.01})
    every = (torch.bfloat16, torch.float16)
    assert choose(judge, [kind("a", dtypes=every)]).name == "a"
    with pytest.raises(BackendError, match="its result is wrong"):
        choose(judge, [kind("a", dtypes=every)], dtype=torch.float16)


def test_what_fails_is_left_out_with_its_own_words():
    judge = FakeJudge({"works": 1.0}, errors={"fails": RuntimeError("head size 20 is not supported\ntraceback")})
    kinds = [absent("gone", "it is not installed; pip install it"), kind("fails"), kind("rigid"), kind("works")]
    choice = choose(judge, kinds)
    assert choice.name == "works" and choice.reason.startswith("the only one that works on")
    assert choice.rejected["gone"] == "it is not installed; pip install it"
    assert "it does not compute 6 queries, 10 keys, 2 heads of 8 in bfloat16" in choice.rejected["fails"]
    assert "head size 20 is not supported" in choice.rejected["fails"]
    assert "cannot be captured in a CUDA graph: operation not permitted" in choice.rejected["rigid"]
    assert not any("\n" in why for why in choice.rejected.values())


def test_where_nothing_works_everything_is_said():
    judge = FakeJudge({}, errors={"b": RuntimeError("too old")})
    with pytest.raises(BackendError, match=r"no attention works on cuda:0 for 6 queries.*a: it is gone.*b: .*too old"):
        choose(judge, [absent("a", "it is gone"), kind("b")])


class Hungry(FakeJudge):
    """Some kinds run out of memory, when they are checked or when they are captured; whether what they took is gone."""

    def __init__(self, times, *, checked=(), captured=()):
        super().__init__(times)
        self.hungry = {"error": checked, "stopwatch": captured}
        self.taken: list[weakref.ref] = []
        self.held: list[bool] = []

    def _take(self, where: str, name: str) -> None:
        self.held.append(any(taken() is not None for taken in self.taken))
        if name in self.hungry[where]:
            memory = torch.empty(1)
            self.taken.append(weakref.ref(memory))
            shortage = torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate 2.00 GiB by {name}\nmore")
            raise shortage  # by its name it is held by its own frame, as a library's may be

    def error(self, attention) -> float:
        self._take("error", attention.name)
        return super().error(attention)

    def stopwatch(self, attention) -> Callable[[], float]:
        self._take("stopwatch", attention.name)
        return super().stopwatch(attention)


def test_what_runs_out_of_memory_is_left_out_and_its_memory_is_there_for_the_next(cache, caplog, gpu):
    judge = Hungry({"c": 1.0, "b": 0.1}, checked=["a"], captured=["b"])
    gc.disable()
    try:
        choice = choose(judge, [kind("a"), kind("b"), kind("c")], cache)
    finally:
        gc.enable()
    assert choice.name == "c" and list(choice.timings) == ["c"]
    for name in "ab":
        assert choice.rejected[name].startswith(
            "it runs out of memory for 6 queries, 10 keys, 2 heads of 8 in bfloat16"
        )
        assert f"2.00 GiB by {name}; free some, or choose another" in choice.rejected[name]
        assert f"{name} is not used: {choice.rejected[name]}" in caplog.text
    assert len(judge.taken) == 2 and not any(judge.held) and gpu.emptied == 3
    assert not cache.exists(), "another time there may be more memory"
    assert choose(FakeJudge({"a": 2.0, "b": 0.1, "c": 1.0}), [kind("a"), kind("b"), kind("c")], cache).name == "b"


@pytest.mark.parametrize("words", ["CUDA error: out of memory", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"])
def test_libraries_have_words_of_their_own_for_it(cache, words):
    judge = FakeJudge({"a": 2.0}, errors={"b": RuntimeError(words)})
    choice = choose(judge, [kind("a"), kind("b")], cache)
    assert choice.rejected["b"].startswith("it runs out of memory") and not cache.exists()


def test_no_memory_for_any_is_an_error_that_says_so():
    """Of the kind at which a caller loads something smaller."""
    judge, shortage = Hungry({}, checked=["a"], captured=["b"]), torch.OutOfMemoryError
    with pytest.raises(shortage, match=r"no attention works on cuda:0.* a: it runs out of memory.* b: it runs out"):
        choose(judge, [kind("a"), kind("b")])
    with pytest.raises(shortage, match=r"attention 'a': it runs out of memory .*2\.00 GiB by a"):
        choose(judge, [kind("a"), kind("b")], requested="a")
    with mock.patch("echo_rt.attention.AttentionCheck", judge):
        states = attention_tuner(GPU, torch.bfloat16, SHAPES, [kind("a"), kind("b")]).available()
    assert states["a"].startswith("it runs out of memory")


def test_one_that_holds_all_scores_is_for_where_nothing_else_works():
    large, small = kind("large", fused=False), kind("small")
    judge = FakeJudge({"large": 0.1, "small": 1.0})
    choice = choose(judge, [large, small])
    assert choice.name == "small" and "large" not in judge.checked and "large" in choice.rejected
    assert choose(judge, [large, absent("small", "gone")]).name == "large"


# -- by name -----------------------------------------------------------------------------------------------------


def test_a_name_forces_and_is_checked_but_not_timed(tmp_path):
    judge = FakeJudge({"a": 2.0, "b": 0.5})
    choice = choose(judge, [kind("a"), kind("b")], requested="a", cache=tmp_path / "attention")
    assert (choice.name, choice.reason) == ("a", "asked for by name")
    assert (judge.checked, judge.timed, list(tmp_path.iterdir())) == (["a"], [], [])


@pytest.mark.parametrize(
    ("requested", "dtype", "said"),
    [
        ("c", torch.bfloat16, r"attention must be one of a, gone, b; got 'c'"),
        ("gone", torch.bfloat16, r"attention 'gone' is not available: it is not installed; pip install it"),
        ("a", torch.float32, r"attention 'a' is not available: it computes in bfloat16 or float16, .* is float32; "),
        ("b", torch.bfloat16, r"attention 'b' is not available: its result is wrong"),
    ],
)
def test_a_name_that_cannot_be_had(requested, dtype, said):
    judge = FakeJudge({}, errors={"b": 1.0})
    with pytest.raises(BackendError, match=said) as caught:
        choose(
            judge, [kind("a"), absent("gone", "it is not installed; pip install it"), kind("b")], None, requested, dtype
        )
    assert "\n" not in str(caught.value)


def able(judge, requested, prescribed=None, kinds=("a", "b", "c")):
    kinds = [kind(name) if isinstance(name, str) else name for name in kinds]
    return choose(judge, kinds, requested=requested, prescribed=prescribed, forgive=(BackendError,))


def test_a_name_that_need_not_be_had_is_taken_where_it_can_be():
    judge = FakeJudge({"a": 2.0, "b": 0.5, "c": 1.0}, errors={"a": RuntimeError("head dimension at most 4; got 8")})
    choice = able(judge, "c")
    assert (choice.name, choice.reason, choice.by_name) == ("c", "asked for by name", True)
    choice = able(judge, "a")
    assert (choice.name, choice.by_name) == ("b", False)
    assert choice.reason.startswith("fastest on Imaginary 9000: b 0.500 ms, ")
    assert choice.reason.endswith(
        "; not a: it does not compute 6 queries, 10 keys, 2 heads of 8 in bfloat16: head dimension at most 4"
    )
    choice = able(judge, "a", prescribed="c")
    assert choice.name == "c" and choice.reason.startswith("as in the snapshot; not a: ")
    choice = able(judge, "gone", kinds=["b", absent("gone", "it is not installed; pip install it")])
    assert choice.name == "b" and choice.reason.endswith("; not gone: it is not installed")


def test_a_name_that_need_not_be_had_has_to_be_one():
    with pytest.raises(BackendError, match="attention must be one of a, b, c; got 'd'"):
        able(FakeJudge({"a": 1.0}), "d")
    judge = FakeJudge({"b": 1.0}, errors={"a": torch.OutOfMemoryError("2.00 GiB")})
    with pytest.raises(torch.OutOfMemoryError, match="attention 'a': it runs out of memory"):
        able(judge, "a")  # with more it might: that is for its user to say


def test_heads_that_no_library_has():
    """As those of the VAE: what is left is tried, the products among it, and all scores at once are not."""
    too_large = RuntimeError("only supports head dimension at most 256")
    judge = FakeJudge({"sdpa-efficient": 3.0, "products": 0.7, "sdpa-math": 0.1}, errors={"sdpa-flash": too_large})
    judge.errors["sdpa-cudnn"] = too_large
    choice = choose(judge, IMPLEMENTATIONS, shapes=AttentionShapes(queries=60, keys=60, heads=1, head_dim=384))
    assert choice.name == "products" and set(choice.timings) == {"sdpa-efficient", "products"}
    assert "at most 256" in choice.rejected["sdpa-flash"] and "all scores" in choice.rejected["sdpa-math"]


def on_cpu(requested, kinds=IMPLEMENTATIONS, cache=None):
    judge = FakeJudge({})
    choice = choose(judge, kinds, cache, requested, torch.float32, device=CPU)
    assert judge.asked == []
    return choice


def test_on_a_cpu():
    assert on_cpu(None).name == "sdpa" and on_cpu("sdpa-math").name == "sdpa-math"
    for name in {kind.name for kind in EVERY} - {"sdpa", "products", "sdpa-math"}:
        with pytest.raises(
            BackendError, match=f"attention '{name}' is not available: it runs on cuda, the device is cpu"
        ):
            on_cpu(name, EVERY)


def test_on_a_gpu_torchs_cpu_kind_names_the_others():
    with pytest.raises(BackendError, match=r"'sdpa' .* it runs on cpu, the device is cuda:0; choose sdpa-cudnn or "):
        choose(FakeJudge({}), IMPLEMENTATIONS, requested="sdpa")


def test_on_a_cpu_nothing_is_written(tmp_path):
    on_cpu(None, cache=tmp_path / "attention")
    assert list(tmp_path.iterdir()) == []


# -- the file ----------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "deep" / "attention"


def test_what_was_measured_is_not_measured_again(cache):
    kinds = [kind("a"), kind("b"), absent("c", "gone")]
    first = choose(FakeJudge({"a": 2.0, "b": 0.5}), kinds, cache)
    judge = FakeJudge({"a": 0.1, "b": 9.0})
    again = choose(judge, kinds, cache)
    assert judge.asked == [], "not even tensors are made"
    assert again.name == "b" and again.timings == first.timings and again.rejected == {"c": "gone"}
    assert again.reason == f"{first.reason} (remembered in {cache})"
    assert known_selections(cache, kinds) == [("b", f"for {SHAPES} in bfloat16, {first.reason}")]


def changed_gpu(monkeypatch, gpu):
    gpu.name = "Imaginary 9001"


def changed_torch(monkeypatch, gpu):
    monkeypatch.setattr(torch, "__version__", "99.0")


def changed_cudnn(monkeypatch, gpu):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 99_000)


def changed_library(monkeypatch, gpu):
    monkeypatch.setattr(AttentionCandidate, "version", lambda self: "99")


def changed_driver(monkeypatch, gpu):
    monkeypatch.setattr("echo_rt.autotune.cache._driver", lambda: "999.9")


@pytest.mark.parametrize("change", [changed_gpu, changed_torch, changed_cudnn, changed_library, changed_driver])
def test_another_machine_is_measured_anew_and_the_first_is_kept(cache, monkeypatch, gpu, change):
    kinds = [kind("a"), kind("b")]
    choose(FakeJudge({"a": 2.0, "b": 0.5}), kinds, cache)
    with monkeypatch.context() as patch:
        change(patch, gpu)
        assert known_selections(cache, kinds) == []
        assert choose(FakeJudge({"a": 0.1, "b": 9.0}), kinds, cache).name == "a"
    gpu.name = "Imaginary 9000"
    judge = FakeJudge({})
    assert choose(judge, kinds, cache).name == "b" and judge.asked == []


def test_other_shapes_and_dtypes_are_their_own(cache):
    kinds = [kind("a"), kind("b")]
    other = AttentionShapes(queries=6, keys=3, heads=2, head_dim=8)
    assert choose(FakeJudge({"a": 1.0, "b": 2.0}), kinds, cache).name == "a"
    assert choose(FakeJudge({"a": 2.0, "b": 1.0}), kinds, cache, shapes=other).name == "b"
    assert choose(FakeJudge({"a": 2.0, "b": 1.0}), kinds, cache, dtype=torch.float16).name == "b"
    judge = FakeJudge({})
    names = [
        choose(judge, kinds, cache, shapes=s, dtype=d).name
        for s, d in ((SHAPES, torch.bfloat16), (other, torch.bfloat16), (SHAPES, torch.float16))
    ]
    assert names == ["a", "b", "b"] and judge.asked == []


def test_a_winner_that_is_gone_is_not_missed(cache, caplog):
    kinds = [kind("a"), kind("b")]
    choose(FakeJudge({"a": 2.0, "b": 0.5}), kinds, cache)
    choice = choose(FakeJudge({"a": 2.0}), [kind("a"), absent("b", "it does not load")], cache)
    assert choice.name == "a" and choice.rejected == {"b": "it does not load"}
    assert "b was the fastest and is no longer there (it does not load)" in caplog.text


def test_what_is_available():
    judge = FakeJudge({}, errors={"b": RuntimeError("no kernel image"), "c": math.inf})
    with mock.patch("echo_rt.attention.AttentionCheck", judge):
        tuner = attention_tuner(
            GPU, torch.bfloat16, SHAPES, [kind("a"), kind("b"), kind("c"), absent("d", "gone; get it")]
        )
        states = tuner.available()
        in_float8 = probes(GPU, load_ops("torch"))[1].available()
    assert states["a"] == "available" and states["d"] == "gone; get it"
    assert "no kernel image; choose another" in states["b"] and "its result is wrong" in states["c"]
    assert [case[2] for case in judge.asked] == [torch.bfloat16, FLOAT8]
    assert in_float8["converted"] == "available" and "pip install" in in_float8["cudnn-float8"]
    dtypes = [tuner.dtype for tuner in probes(GPU, load_ops("torch"))]
    assert dtypes == [torch.bfloat16, FLOAT8], "the dtypes that models have on a GPU"
    on_cpu = {name: state for tuner in probes(CPU, load_ops("torch")) for name, state in tuner.available().items()}
    able = [name for name, state in on_cpu.items() if state == "available"]
    assert able == ["sdpa", "products", "sdpa-math", "converted"]
    assert list(on_cpu) == [kind.name for kind in (*EVERY, *_of_float8(Library("sdpa", max), torch.bfloat16))]


def test_what_was_measured_in_float8_is_known(cache):
    candidates = _of_float8(Library("sdpa", max), torch.bfloat16)
    judge = FakeJudge({"converted": 1.0, "sage": 0.5})
    assert choose(judge, candidates, cache, dtype=FLOAT8).name == "converted"
    ((name, reason),) = probes(GPU, load_ops("torch"))[1].known(cache)
    assert name == "converted" and reason.startswith(f"for {SHAPES} in float8_e4m3fn, the only one that works")
