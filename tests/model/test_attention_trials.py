"""What a trial makes of an attention: right or wrong, and how long it takes."""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace

import pytest
import stand_in_cuda
import torch
from torch.utils._python_dispatch import _disable_current_modes

from echo_rt.attention import AttentionCheck, AttentionShapes
from echo_rt.attention.backends import IMPLEMENTATIONS, Library
from echo_rt.autotune.tuner import ANY_DTYPE, TOLERANCES

CPU = torch.device("cpu")


def spoiled(change) -> Library:
    return Library("spoiled", lambda q, k, v: change(*(t.float() for t in (q, k, v))).to(q.dtype))


def right(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def last_query_garbage(q, k, v):
    out = right(q, k, v)
    out[:, :, -1] = 7.0
    return out


WRONG = {
    "unscaled": lambda q, k, v: right(q * math.sqrt(q.shape[-1]), k, v),
    "without the last keys": lambda q, k, v: right(q, k[:, :, :-16], v[:, :, :-16]),
    "causal": lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True),
    "heads mixed up": lambda q, k, v: right(q, k.flip(1), v),
    "not a number": lambda q, k, v: right(q, k, v) * math.nan,
    "zero": lambda q, k, v: right(q, k, v) * 0,
    "the last query": last_query_garbage,
    "another shape": lambda q, k, v: right(q, k, v)[:, :, :-1],
}


@pytest.mark.parametrize("dtype", ANY_DTYPE, ids=str)
def test_the_trial_tells_right_from_wrong(dtype):
    trials = AttentionCheck(AttentionShapes(queries=70, keys=300, heads=3, head_dim=64), CPU, dtype)
    for kind in (kind for kind in IMPLEMENTATIONS if "cpu" in kind.devices):
        assert trials.error(kind.load()) < TOLERANCES[dtype] / 2
    for what, change in WRONG.items():
        assert trials.error(spoiled(change)) > 2 * TOLERANCES[dtype], what


def test_another_dtype_is_wrong():
    trials = AttentionCheck(AttentionShapes(queries=7, keys=9, heads=1, head_dim=8), CPU, torch.bfloat16)
    assert trials.error(Library("wide", lambda q, k, v: right(q, k, v).float())) == math.inf


def test_the_trial_does_not_disturb_the_callers_random_numbers():
    state = torch.random.get_rng_state()
    AttentionCheck(AttentionShapes(queries=7, keys=9, heads=1, head_dim=8), CPU, torch.float32)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_callers_default_device_is_left_out_of_it():
    trials = AttentionCheck(AttentionShapes(queries=7, keys=9, heads=1, head_dim=8), CPU, torch.float32)
    torch.set_default_device("meta")
    try:
        assert trials.error(Library("right", right)) < TOLERANCES[torch.float32]
    finally:
        torch.set_default_device(None)


class FakeCuda:
    """Streams, events and graphs that only say in which order they were used; a replay takes 6 ms."""

    def __init__(self, monkeypatch) -> None:
        self.log: list[str] = []
        self.clock = 0.0
        fake = self

        class Graph:
            def replay(self) -> None:
                fake.log.append("replay")
                fake.clock += 6.0

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.time = fake.clock

            def synchronize(self) -> None:
                fake.log.append("wait")

            def elapsed_time(self, end: Event) -> float:
                return end.time - self.time

        @contextlib.contextmanager
        def graph(graph, *, pool, stream, capture_error_mode):
            assert capture_error_mode == "thread_local"
            fake.log.append("begin")
            yield
            fake.log.append("end")

        stream = SimpleNamespace(wait_stream=lambda other: fake.log.append(f"after {other}"))
        for name, value in {
            "CUDAGraph": Graph,
            "graph_pool_handle": object,
            "Event": Event,
            "Stream": lambda device: stream,
            "current_stream": lambda device: "caller",
            "stream": lambda stream: contextlib.nullcontext(),
            "graph": graph,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_a_call_is_warmed_up_captured_and_timed_in_replay(monkeypatch):
    trials = AttentionCheck(AttentionShapes(queries=7, keys=9, heads=1, head_dim=8), CPU, torch.float32)
    cuda = FakeCuda(monkeypatch)
    watch = trials.stopwatch(Library("a", lambda q, k, v: cuda.log.append("call") or q))
    begin, end = cuda.log.index("begin"), cuda.log.index("end")
    assert cuda.log[0] == "after caller" and set(cuda.log[1:begin]) == {"call"}
    captured = end - begin - 1
    assert cuda.log[begin + 1 : end] == ["call"] * captured and captured >= 1
    cuda.log.clear()
    assert watch() == 6.0 / captured and watch() == 6.0 / captured
    assert cuda.log == ["replay", "wait"] * 2, "nothing but replays"


def launched_elsewhere(q, k, v):
    """Its kernels are no part of a graph, as those of a library that launches on the default stream."""
    out = torch.zeros_like(q)
    with _disable_current_modes():
        out.copy_(right(q, k, v))
    return out


def quantized_elsewhere():
    """One kernel of several is no part of a graph: a replay reads what it wrote when the graph was captured."""
    quantized = {}

    def attend(q, k, v):
        with _disable_current_modes():
            quantized.setdefault("k", torch.empty_like(k)).copy_(k)
        return right(q, quantized["k"], v)

    return attend


def test_a_replay_is_checked_too(monkeypatch):
    """Over other inputs than the graph was captured from: over the same ones some mistakes are not seen."""
    stand_in_cuda.install(monkeypatch)
    monkeypatch.setattr("echo_rt.autotune.tuner.current", lambda device: contextlib.nullcontext())
    trials = AttentionCheck(AttentionShapes(queries=7, keys=9, heads=2, head_dim=8), CPU, torch.float32)
    kept = [tensor.clone() for tensor in trials.inputs]
    for attend in (right, launched_elsewhere, quantized_elsewhere()):
        kind = Library("a", attend)
        trials.device = CPU
        assert trials.error(kind) < TOLERANCES[torch.float32]
        trials.device = torch.device("cuda", 0)
        assert (trials.error(kind) < TOLERANCES[torch.float32]) == (attend is right)
        assert all(map(torch.equal, trials.inputs, kept)), "the next one has the same inputs"


def test_shapes_in_words():
    assert str(AttentionShapes(6240, 6240, 1, 384)) == "6240 queries, 6240 keys, 1 head of 384"
    assert str(AttentionShapes(5, 7, 2, 8)) == "5 queries, 7 keys, 2 heads of 8"
