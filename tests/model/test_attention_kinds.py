"""The kinds of attention: their numbers against float64, their layouts, the libraries that need not be there."""

from __future__ import annotations

import importlib.metadata
import math
import sys
from types import ModuleType

import pytest
import torch
from closeness import relative_error

from echo_rt.attention import AttentionShapes, attention_tuner, backends, exact_attention
from echo_rt.attention.backends import IMPLEMENTATIONS, AttentionCandidate, Matmul
from echo_rt.autotune.tuner import TOLERANCES
from echo_rt.errors import BackendError

BY_NAME = {kind.name: kind for kind in IMPLEMENTATIONS}
OF_TORCH = [kind for kind in IMPLEMENTATIONS if kind.distribution is None]
ON_CPU = [kind for kind in IMPLEMENTATIONS if "cpu" in kind.devices]
GPU = torch.device("cuda", 0)

# Odd counts, one key, more keys than queries and fewer, an odd number of heads.
CASES = [(5, 17, 3, 16), (1, 1, 1, 8), (33, 7, 2, 20), (64, 130, 1, 128), (2, 257, 5, 12), (43, 71, 1, 384)]


def inputs(n: int, m: int, heads: int, d: int, dtype=torch.float32, device="cpu"):
    """q, and k and v as parts of a buffer of layers, keys and values, rows."""
    generator = torch.Generator(device).manual_seed(n * 1000 + m)
    q = torch.randn(n, heads, d, generator=generator, device=device).to(dtype)
    kv = torch.randn(2, 2, m + 9, heads, d, generator=generator, device=device).to(dtype)
    return q, kv[1, 0, 4 : 4 + m], kv[1, 1, 4 : 4 + m]


def formula(q, k, v):
    """Straight from the definition, all heads at once."""
    scores = torch.einsum("nhd,mhd->hnm", q.double(), k.double()) / math.sqrt(q.shape[-1])
    return torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v.double()).flatten(1)


@pytest.mark.parametrize("kind", ON_CPU, ids=lambda kind: kind.name)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_numbers_on_a_cpu(kind, case, dtype):
    q, k, v = inputs(*case, dtype)
    before = [t.clone() for t in (q, k, v)]
    out = kind.load()(q, k, v)
    assert out.shape == (case[0], case[2] * case[3]) and out.dtype == dtype
    assert relative_error(out, formula(q, k, v)) < (1e-6 if dtype == torch.float32 else TOLERANCES[dtype] / 2)
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True)), "inputs stay as they are"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_exact_formula(case):
    q, k, v = inputs(*case)
    assert relative_error(exact_attention(q, k, v), formula(q, k, v)) < 1e-14


@pytest.mark.parametrize("kind", OF_TORCH, ids=lambda kind: kind.name)
def test_torch_knows_the_operators_and_needs_no_copy(kind):
    """On tensors without data: arguments as this torch declares them, and an output that is a view already."""
    q, k, v = (torch.empty(t.shape, dtype=torch.bfloat16, device="meta") for t in inputs(5, 17, 3, 16))
    out = kind.load()(q, k, v)
    assert (out.shape, out.dtype, out.is_contiguous()) == ((5, 48), torch.bfloat16, True)


@pytest.mark.parametrize("kind", OF_TORCH, ids=lambda kind: kind.name)
def test_the_switches_of_the_process_are_left_alone(kind, monkeypatch):
    def touched(*_):
        raise AssertionError("a switch of the whole process")

    for name in [name for name in dir(torch._C) if name.startswith("_set_sdp")]:
        monkeypatch.setattr(torch._C, name, touched)
    q, k, v = (torch.empty(t.shape, dtype=torch.bfloat16, device="meta") for t in inputs(5, 17, 3, 16))
    kind.load()(q, k, v)


# -- the libraries, played by modules that record what they are given --------------------------------------------


class FakeLibrary(ModuleType):
    """A module whose ``flash_attn_func`` computes attention of ``[b, s, h, d]``; ``wrap`` is how it returns it."""

    def __init__(self, name: str, parameters: str, wrap) -> None:
        super().__init__(name)
        self.calls: list[tuple[torch.Size, ...]] = []

        def compute(q, k, v):
            self.calls.append((q.shape, k.shape, v.shape))
            assert all(t.stride(-1) == 1 for t in (q, k, v))
            out = torch.stack([exact_attention(*t).unflatten(-1, t[0].shape[-2:]) for t in zip(q, k, v, strict=True)])
            return wrap(out.to(q.dtype))

        # With the parameters of the real one, so that an argument it does not have would fail.
        namespace: dict[str, object] = {"compute": compute}
        exec(f"def flash_attn_func(q, k, v, {parameters}): return compute(q, k, v)", namespace)
        self.flash_attn_func = namespace["flash_attn_func"]


def lse(out):
    return torch.zeros(out.shape[0], out.shape[2], out.shape[1])


LIBRARIES = [
    pytest.param(
        "flash-attn-2",
        "flash_attn",
        "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
        "deterministic=False, return_attn_probs=False",
        lambda out: out,
        id="2",
    ),
    *(
        pytest.param(
            "flash-attn-3",
            "flash_attn_interface",
            "softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, "
            "window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, "
            "sm_margin=0, return_attn_probs=False",
            wrap,
            id=label,
        )
        for label, wrap in (("3", lambda out: out), ("3 of 2024", lambda out: (out, lse(out))))
    ),
    pytest.param(
        "flash-attn-4",
        "flash_attn.cute",
        "softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, "
        "pack_gqa=None, deterministic=False, return_lse=False",
        lambda out: (out, None),
        id="4",
    ),
]


@pytest.mark.parametrize(("name", "module", "parameters", "wrap"), LIBRARIES)
def test_a_library_gets_its_layout_and_its_output_is_found(monkeypatch, name, module, parameters, wrap):
    library = FakeLibrary(module, parameters, wrap)
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, module, library)
    attention = BY_NAME[name].load()
    q, k, v = inputs(5, 17, 3, 16, torch.bfloat16)
    out = attention(q, k, v)
    assert attention.name == name and library.calls == [((1, 5, 3, 16), (1, 17, 3, 16), (1, 17, 3, 16))]
    assert out.shape == (5, 48) and relative_error(out, formula(q, k, v)) < TOLERANCES[torch.bfloat16]


@pytest.mark.parametrize(("name", "module", "parameters", "wrap"), LIBRARIES)
def test_an_absent_library_says_how_to_get_it(monkeypatch, name, module, parameters, wrap):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BackendError, match=r"^it is not installed; .*pip install") as caught:
        BY_NAME[name].load()
    assert "\n" not in str(caught.value)
    with pytest.raises(BackendError, match=rf"^attention '{name}' is not available: it is not installed; "):
        shapes = AttentionShapes(queries=1, keys=1, heads=1, head_dim=8)
        attention_tuner(GPU, torch.bfloat16, shapes).select(name, cache=None)


def test_version_4_alone_is_not_version_2(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    with pytest.raises(BackendError, match="it is not installed"):
        BY_NAME["flash-attn-2"].load()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise OSError('libc10.so: undefined symbol\\nmore')", "it does not load: libc10.so: undefined symbol; pip"),
        ("import cutlass_that_nobody_has", "it does not load: no module cutlass_that_nobody_has; pip"),
    ],
)
def test_a_broken_library_says_why(monkeypatch, tmp_path, source, said):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    with pytest.raises(BackendError, match=said):
        BY_NAME["flash-attn-2"].load()


def test_versions_are_those_of_the_packages(monkeypatch):
    installed = {"flash-attn": "2.8.3", "flash-attn-4": "4.0.0"}

    def version(distribution: str) -> str:
        if distribution not in installed:
            raise importlib.metadata.PackageNotFoundError(distribution)
        return installed[distribution]

    monkeypatch.setattr(importlib.metadata, "version", version)
    versions = {kind.name: kind.version() for kind in IMPLEMENTATIONS}
    assert versions == {
        **{kind.name: None for kind in IMPLEMENTATIONS},
        "flash-attn-2": "2.8.3",
        "flash-attn-4": "4.0.0",
    }


# -- by products -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 10, 43, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_slices_of_queries_do_not_show(rows, dtype, monkeypatch):
    q, k, v = inputs(43, 71, 2, 20, dtype)
    slices = []
    original = backends._scores
    monkeypatch.setattr(backends, "_scores", lambda q, *rest: (slices.append(len(q)), original(q, *rest)))
    monkeypatch.setattr(backends, "_SCORES_BYTES", rows * 71 * 4)
    assert relative_error(Matmul()(q, k, v), formula(q, k, v)) < (1e-6 if dtype == torch.float32 else 3e-3)
    assert sum(slices) == 2 * 43 and max(slices) <= rows and len(set(slices)) <= 2
    assert len(slices) == 2 * math.ceil(43 / min(rows, 43)), "no more of them than have to be"


def test_a_slice_takes_no_more_than_its_share(monkeypatch):
    """A frame of 1280x720 and the KV buffer at 832x480: slices of one size, but for the rounding."""
    for queries, keys in ((90 * 160, 90 * 160), (4680, 21 * 1560)):
        rows = backends._rows_at_once(queries, keys)
        slices = math.ceil(queries / rows)
        assert 4 * rows * keys <= backends._SCORES_BYTES < 4 * keys * queries / (slices - 1)
        assert queries - (slices - 1) * rows > rows - slices
    assert backends._rows_at_once(17, backends._SCORES_BYTES) == 1, "a row is not taken apart"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_scores_are_no_nan(dtype):
    q, k, v = inputs(9, 30, 2, 16, dtype)
    out = Matmul()(q * 2000, k * 2000, v)
    assert out.isfinite().all() and relative_error(out, formula(q * 2000, k * 2000, v)) < TOLERANCES[dtype]
    same = Matmul()(q * 0 + 2000, k * 0 - 2000, v)
    assert relative_error(same, v.double().mean(0).flatten().expand(9, -1)) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_are_not_rounded(dtype):
    """One key has about the weight of 4000 others together, which it loses or gains by its score's last bits."""
    q, k, v = torch.linspace(1.51, 2.63, 16).view(1, 1, 16), torch.zeros(4001, 1, 16), torch.zeros(4001, 1, 16)
    k[0] = v[0] = 1
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    exact = formula(q, k, v)
    assert exact.min() > 0.4 and exact.max() < 0.6
    assert relative_error(Matmul()(q, k, v), exact) < (1e-5 if dtype == torch.float32 else 5e-3)


def test_memory_that_nothing_has_written_is_not_read(monkeypatch):
    original = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **named: original(*args, **named).fill_(math.nan))
    q, k, v = inputs(5, 17, 3, 16)
    assert relative_error(Matmul()(q, k, v), formula(q, k, v)) < 1e-6


def test_the_product_of_a_gpu_is_given_what_it_declares():
    """Played on the CPU, where torch has none: the dispatcher checks what the operator is called with."""
    calls = []

    def product(added, a, b, out_dtype, *, beta, alpha, out):
        calls.append((out_dtype, beta, alpha))
        assert a.dtype == b.dtype == torch.bfloat16 and added.shape == out.shape
        return out.copy_(alpha * (a.float() @ b.float()))

    library = torch.library.Library("aten", "IMPL")
    try:
        library.impl("baddbmm.dtype_out", product, "CPU")
        q, k, _ = inputs(5, 17, 3, 16, torch.bfloat16)
        made, expected = torch.full((2, 5, 17), math.nan)
        backends._scores_of_half(q[:, 1], k[:, 1], 0.25, made)
    finally:
        library._destroy()
    backends._scores(q[:, 1], k[:, 1], 0.25, expected)
    assert torch.allclose(made, expected, rtol=1e-6) and calls == [(torch.float32, 0, 0.25)]


# -- on a GPU ----------------------------------------------------------------------------------------------------


@pytest.fixture
def real_gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return torch.device("cuda", torch.cuda.current_device())


def loaded_or_skip(kind: AttentionCandidate, device: torch.device):
    try:
        return kind.load()
    except BackendError as error:
        pytest.skip(str(error))


@pytest.mark.cuda
@pytest.mark.parametrize(
    "kind", [kind for kind in IMPLEMENTATIONS if "cuda" in kind.devices], ids=lambda kind: kind.name
)
@pytest.mark.parametrize("case", [(64, 200, 2, 128), (75, 333, 3, 128), (1, 1, 1, 128), (91, 91, 1, 384)], ids=str)
def test_numbers_on_a_gpu(real_gpu, kind, case):
    attention = loaded_or_skip(kind, real_gpu)
    for dtype in kind.dtypes:
        q, k, v = inputs(*case, dtype, real_gpu)
        with torch.no_grad():
            try:
                out = attention(q, k, v)
            except Exception as error:
                pytest.skip(f"this GPU cannot: {error}")
        assert out.shape == (case[0], case[2] * case[3]) and out.dtype == dtype
        assert relative_error(out, formula(q, k, v)) < TOLERANCES[dtype]


@pytest.mark.cuda
@pytest.mark.parametrize(
    "kind", [kind for kind in IMPLEMENTATIONS if "cuda" in kind.devices], ids=lambda kind: kind.name
)
def test_a_captured_call_follows_its_inputs(real_gpu, kind):
    attention = loaded_or_skip(kind, real_gpu)
    q, k, v = inputs(64, 200, 2, 128, torch.bfloat16, real_gpu)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.stream(stream):
        try:
            attention(q, k, v)
        except Exception as error:
            pytest.skip(f"this GPU cannot: {error}")
        with torch.cuda.graph(graph, stream=stream):
            out = attention(q, k, v)
    for t in (q, k, v):
        t.copy_(t.flip(0) * 0.5)
    graph.replay()
    assert relative_error(out, formula(q, k, v)) < TOLERANCES[torch.bfloat16]


@pytest.mark.cuda
def test_a_gpu_is_measured_and_remembered(real_gpu, tmp_path):
    shapes = AttentionShapes(queries=300, keys=700, heads=4, head_dim=128)
    tuner = attention_tuner(real_gpu, torch.bfloat16, shapes)
    first, again = (tuner.select(cache=tmp_path / "attention") for _ in range(2))
    assert first.timings and all(0 < time < 1000 for time in first.timings.values())
    assert first.name == min(first.timings, key=first.timings.get) == again.name
    assert "remembered" in again.reason and "remembered" not in first.reason
