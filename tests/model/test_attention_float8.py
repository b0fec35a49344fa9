"""Attention over a float8 cache: by conversion, and by libraries, played by modules that compute what they are told."""

from __future__ import annotations

import sys
import threading
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from closeness import relative_error
from test_attention_trials import WRONG, spoiled
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from echo_rt.attention import AttentionCheck, AttentionShapes, ByDtype, attention_tuner, exact_attention
from echo_rt.attention.backends import (
    FLOAT8_LIBRARIES,
    Attention,
    AttentionCandidate,
    Converted,
    Library,
    implementations,
)
from echo_rt.autotune.tuner import TOLERANCES
from echo_rt.errors import BackendError
from echo_rt.ops.backends import load_ops
from echo_rt.utils.device import FLOAT8

CPU = torch.device("cpu")
SHAPES = AttentionShapes(queries=5, keys=17, heads=3, head_dim=16)
SDPA = Library("sdpa", scaled_dot_product_attention)
CUDNN, FLASH_3, SAGE = FLOAT8_LIBRARIES


def inputs(keys: int = 17) -> tuple[Tensor, Tensor, Tensor]:
    """q, and k and v as parts of a buffer."""
    generator = torch.Generator().manual_seed(keys)
    q = torch.randn(5, 3, 16, generator=generator).to(FLOAT8)
    kv = torch.randn(2, keys + 9, 3, 16, generator=generator).to(FLOAT8)
    return q, kv[0, 4 : 4 + keys], kv[1, 4 : 4 + keys]


def test_conversion_loses_nothing() -> None:
    q, k, v = inputs()
    out = Converted(SDPA, torch.bfloat16)(q, k, v)
    assert out.dtype == torch.bfloat16 and out.shape == (5, 48)
    assert torch.equal(out, SDPA(q.bfloat16(), k.bfloat16(), v.bfloat16()))
    assert relative_error(out, exact_attention(q, k, v)) < TOLERANCES[torch.bfloat16] / 2


def test_each_dtype_has_its_own() -> None:
    both = ByDtype(SDPA, Converted(SDPA, torch.bfloat16))
    q, k, v = inputs()
    assert both(q, k, v).dtype == torch.bfloat16
    assert both(q.float(), k.float(), v.float()).dtype == torch.float32
    assert both.name == "sdpa, converted in float8"


@pytest.mark.parametrize("wrong", WRONG)
def test_the_trial_tells_right_from_wrong(wrong: str) -> None:
    check = AttentionCheck(AttentionShapes(queries=70, keys=300, heads=3, head_dim=64), CPU, FLOAT8)
    assert check.q.dtype == check.k.dtype == check.v.dtype == FLOAT8
    assert check.error(Converted(SDPA, torch.bfloat16)) < TOLERANCES[FLOAT8] / 2
    assert check.error(Converted(spoiled(WRONG[wrong]), torch.bfloat16)) > 2 * TOLERANCES[FLOAT8]
    assert check.error(Converted(SDPA, torch.float32)) == float("inf"), "of another dtype"


def test_one_of_another_dtype_is_not_taken() -> None:
    tuner = attention_tuner(CPU, FLOAT8, SHAPES, (AttentionCandidate("c", lambda: SDPA, devices=("cpu",)),))
    with pytest.raises(BackendError, match=r"it computes in .*, the model's dtype is float8_e4m3fn"):
        tuner._load(tuner.candidates[0])


# ---- libraries


class FakeCudnn(ModuleType):
    """nvidia-cudnn-frontend: graphs of one attention, on the host."""

    def __init__(self) -> None:
        super().__init__("cudnn")
        self.handles: list[int] = []
        self.built = 0
        self.data_type = SimpleNamespace(FP8_E4M3="e4m3", FLOAT="float", BFLOAT16="bfloat16")
        self.heur_mode = SimpleNamespace(A="A")

    def create_handle(self) -> int:
        self.handles.append(threading.get_ident())
        return len(self.handles)

    def set_stream(self, handle: int, stream: int) -> None:
        assert self.handles[handle - 1] == threading.get_ident() and stream == 7

    def pygraph(self, **_: Any) -> FakeGraph:
        return FakeGraph(self)


class FakeNode:
    def __init__(self, **facts: Any) -> None:
        self.facts = facts

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("set_"):
            raise AttributeError(name)

        def keep(value: Any) -> FakeNode:
            self.facts[{"set_dim": "dim", "set_stride": "stride"}.get(name, name)] = value
            return self

        return keep


class FakeGraph:
    def __init__(self, library: FakeCudnn) -> None:
        self._library = library

    def tensor(self, **facts: Any) -> FakeNode:
        return FakeNode(**facts)

    def sdpa_fp8(self, attn_scale: float, generate_stats: bool, **nodes: FakeNode) -> tuple[FakeNode | None, ...]:
        assert not generate_stats
        self._scale, self._nodes, self._made = attn_scale, nodes, [FakeNode() for _ in range(3)]
        return self._made[0], None, *self._made[1:]

    def build(self, modes: list[str]) -> None:
        self._library.built += 1

    def get_workspace_size(self) -> int:
        return 0

    def execute(self, given: dict[FakeNode, Tensor], workspace: Tensor, handle: int) -> None:
        assert len(workspace) > 0 and set(given) == {*self._nodes.values(), *self._made}
        for node, tensor in given.items():
            assert (node.facts["dim"], node.facts["stride"]) == (list(tensor.shape), list(tensor.stride()))
        values = {name: given[node] for name, node in self._nodes.items()}
        q, k, v = (values[name].float() * values[f"descale_{name}"] for name in "qkv")
        weights = (q @ k.mT * self._scale).softmax(-1) * values["scale_s"]
        given[self._made[0]].copy_(weights.to(FLOAT8).float() * values["descale_s"] @ v * values["scale_o"])


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> FakeCudnn:
    library = FakeCudnn()
    monkeypatch.setitem(sys.modules, "cudnn", library)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    return library


def test_cudnn(cudnn: FakeCudnn) -> None:
    attention = CUDNN.load()
    for keys in (17, 33, 17):
        given = inputs(keys)
        out = attention(*given)
        assert out.dtype == torch.bfloat16 and out.is_contiguous() and out.shape == (5, 48)
        assert relative_error(out, exact_attention(*given)) < TOLERANCES[FLOAT8]
    assert cudnn.built == 2 and len(cudnn.handles) == 1, "one plan for each size"
    assert attention(*inputs()).data_ptr() != out.data_ptr(), "a later call overwrites nothing"
    AttentionCheck(SHAPES, CPU, FLOAT8).error(attention)
    thread = threading.Thread(target=lambda: attention(*inputs()))
    thread.start()
    thread.join()
    assert len(set(cudnn.handles)) == len(cudnn.handles) == 2, "and one handle for each thread"


def test_flash_attn_3(monkeypatch: pytest.MonkeyPatch) -> None:
    library = ModuleType("flash_attn_interface")

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert q.dtype == k.dtype == v.dtype == FLOAT8
        return exact_attention(q[0], k[0], v[0]).unflatten(-1, q.shape[-2:])[None].bfloat16()

    library.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, library.__name__, library)
    given = inputs()
    assert relative_error(FLASH_3.load()(*given), exact_attention(*given)) < TOLERANCES[torch.bfloat16]


def sage_attention(monkeypatch: pytest.MonkeyPatch, noise: float, *, smooth: bool = True) -> Attention:
    """SageAttention 2 in its own steps, on the host: int8 queries and smoothed keys, values in float8 by channel."""
    library = ModuleType("sageattention")

    def int8(x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 127
        return (x / scale).round() * scale

    def sageattn(q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", is_causal: bool = False) -> Tensor:
        assert tensor_layout == "NHD" and not is_causal
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16 and all(t.stride(-1) == 1 for t in (q, k, v))
        q, k, v = (t[0].float() for t in (q, k, v))
        scale = v.abs().amax(0) / 448
        out = exact_attention(int8(q), int8(k - smooth * k.mean(0)), (v / scale).to(FLOAT8).float() * scale)
        return (out + noise * torch.randn(out.shape)).unflatten(-1, q.shape[-2:])[None].bfloat16()

    library.sageattn = sageattn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, library.__name__, library)
    return SAGE.load()


def test_sage_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    check = AttentionCheck(AttentionShapes(queries=70, keys=300, heads=3, head_dim=64), CPU, FLOAT8)
    attention = sage_attention(monkeypatch, noise=0.0)
    assert attention.name == SAGE.name and attention(check.q, check.k, check.v).is_contiguous()
    assert TOLERANCES[torch.bfloat16] < check.error(attention) < TOLERANCES[FLOAT8]
    assert check.error(sage_attention(monkeypatch, noise=1.0)) > TOLERANCES[FLOAT8], "as release 2.2.0 on Hopper"


def test_keys_that_are_not_smoothed_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which keys of zero mean would not show."""
    check = AttentionCheck(AttentionShapes(queries=64, keys=2000, heads=2, head_dim=128), CPU, FLOAT8)
    assert check.k.float().mean(0).abs().max() > 5
    errors = [check.error(sage_attention(monkeypatch, noise=0.0, smooth=smooth)) for smooth in (True, False)]
    assert errors[0] < TOLERANCES[FLOAT8] < errors[1]


def test_sage_attention_is_for_float8_alone() -> None:
    assert "the model's dtype is bfloat16" in SAGE.mismatch(torch.device("cuda"), torch.bfloat16)
    assert SAGE not in implementations(load_ops("torch"))


@pytest.mark.parametrize("candidate", FLOAT8_LIBRARIES, ids=lambda candidate: candidate.name)
def test_what_is_missing_is_said(candidate: AttentionCandidate, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cudnn", "flash_attn_interface", "sageattention"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BackendError, match="pip install"):
        candidate.load()
    assert candidate.obstacle(CPU, FLOAT8, SHAPES) == "it runs on cuda, the device is cpu; choose converted"
    assert candidate.version() is None
