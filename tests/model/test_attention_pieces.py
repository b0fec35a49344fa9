"""Attention in pieces: the numbers of attention to all keys, and the libraries' operators it is made of."""

from __future__ import annotations

import math

import pytest
import torch
from closeness import relative_error

from echo_rt.attention import AttentionCandidate, AttentionShapes, attention_tuner, exact_attention, implementations
from echo_rt.attention.backends import IMPLEMENTATIONS, SPLITS, SplitKV, split_kv
from echo_rt.autotune.tuner import ANY_DTYPE, TOLERANCES
from echo_rt.errors import BackendError
from echo_rt.ops import reference
from echo_rt.ops.backends import load_ops

OPS = load_ops("torch")
IN_PIECES = split_kv(OPS)
GPU = torch.device("cuda", 0)


def inputs(n: int, m: int, heads: int, d: int, dtype=torch.float32, device="cpu"):
    """q, and k and v as parts of a buffer of layers, keys and values, rows."""
    generator = torch.Generator(device).manual_seed(n * 1000 + m)
    q = torch.randn(n, heads, d, generator=generator, device=device).to(dtype)
    kv = 2 * torch.randn(2, 2, m + 9, heads, d, generator=generator, device=device).to(dtype)
    return q, kv[1, 0, 4 : 4 + m], kv[1, 1, 4 : 4 + m]


class Library:
    """Attention with its sums, by formula; notes the shapes and the memory that it is given."""

    def __init__(self, *, dimension_of_one: bool = False) -> None:
        self.dimension_of_one = dimension_of_one
        self.calls: list[tuple[tuple[int, ...], ...]] = []
        self.addresses: list[int] = []

    def with_sums(self, q, k, v):
        self.calls.append(tuple(map(tuple, (q.shape, k.shape, v.shape))))
        self.addresses.append(k.data_ptr())
        scores = q.float() @ k.float().transpose(-1, -2) / math.sqrt(q.shape[-1])
        # As libraries do: outputs lie as the queries do, token by token.
        out = (scores.softmax(-1) @ v.float()).to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)
        return out, scores.logsumexp(-1, keepdim=self.dimension_of_one)

    def in_pieces(self, pieces: int, ops=OPS) -> SplitKV:
        return SplitKV("in pieces", "whole", self.with_sums, pieces, ops)


@pytest.mark.parametrize("dtype", ANY_DTYPE, ids=str)
@pytest.mark.parametrize("pieces", SPLITS)
@pytest.mark.parametrize("case", [(5, 24, 3, 16), (1, 12, 1, 8), (33, 60, 2, 20)], ids=str)
@pytest.mark.parametrize("dimension_of_one", [True, False], ids=["sums of cuDNN's shape", "of flash's"])
def test_numbers(dtype, pieces, case, dimension_of_one):
    library = Library(dimension_of_one=dimension_of_one)
    q, k, v = inputs(*case, dtype)
    n, m, heads, d = case
    out = library.in_pieces(pieces)(q, k, v)
    assert out.shape == (n, heads * d) and out.dtype == dtype and out.is_contiguous()
    assert relative_error(out, exact_attention(q, k, v)) < (1e-6 if dtype == torch.float32 else TOLERANCES[dtype] / 2)
    part = (pieces, heads, m // pieces, d)
    assert library.calls == [((pieces, heads, n, d), part, part)], "one call for all pieces"
    assert library.addresses == [k.data_ptr()], "keys are where they were"


def test_keys_that_cannot_be_cut_are_attended_to_whole():
    library = Library()
    q, k, v = inputs(5, 25, 3, 16)
    out = library.in_pieces(2)(q, k, v)
    assert relative_error(out, exact_attention(q, k, v)) < 1e-6
    assert library.calls == [((1, 3, 5, 16), (1, 3, 25, 16), (1, 3, 25, 16))]


@pytest.mark.parametrize("kind", IN_PIECES, ids=lambda kind: kind.name)
def test_torch_knows_the_operators(kind):
    """On tensors without data: arguments as this torch declares them, sums of a shape that can be merged."""
    q, k, v = (torch.empty(t.shape, dtype=torch.bfloat16, device="meta") for t in inputs(5, 24, 3, 16))
    attention = kind.load()
    out = attention(q, k, v)
    assert (out.shape, out.dtype, out.is_contiguous()) == ((5, 48), torch.bfloat16, True)
    assert attention.name == kind.name == f"{attention.library}-in-{kind.splits}"
    assert attention(q, k[:23], v[:23]).shape == (5, 48)


def test_what_is_offered():
    assert [kind.name for kind in IN_PIECES] == [
        f"{library}-in-{pieces}" for library in ("sdpa-cudnn", "sdpa-flash") for pieces in SPLITS
    ]
    assert [kind.name for kind in implementations(OPS)] == [kind.name for kind in (*IMPLEMENTATIONS, *IN_PIECES)]


def test_who_merges_is_part_of_what_was_measured():
    """Another backend's merging takes another time: what is remembered of one is not taken for the other's."""
    versions = {kind.name: kind.version() for kind in implementations(OPS)}
    assert all(versions[kind.name] == "torch" for kind in IN_PIECES)
    assert versions["sdpa-cudnn"] is None


class Judge:
    """Takes all for right, and pieces for twice as fast."""

    def __init__(self, *case) -> None: ...

    def error(self, attention) -> float:
        return 0.0

    def stopwatch(self, attention):
        return lambda: 1.0 / getattr(attention, "splits", 1)


def chosen(keys: int, monkeypatch):
    monkeypatch.setattr("echo_rt.autotune.tuner.give_memory_back", lambda device: None)
    monkeypatch.setattr("echo_rt.autotune.tuner.machine_facts", lambda device, versions: {"gpu": "imaginary"})
    torchs = [kind for kind in IMPLEMENTATIONS if kind.distribution is None]
    monkeypatch.setattr("echo_rt.attention.AttentionCheck", Judge)
    shapes = AttentionShapes(queries=6, keys=keys, heads=2, head_dim=8)
    return attention_tuner(GPU, torch.bfloat16, shapes, [*torchs, *IN_PIECES]).select(cache=None)


def test_pieces_that_the_keys_do_not_make_are_not_tried(monkeypatch):
    assert chosen(12, monkeypatch).name == "sdpa-cudnn-in-4"
    choice = chosen(15, monkeypatch)
    assert choice.name == "sdpa-cudnn-in-3"
    assert choice.rejected["sdpa-flash-in-2"] == "15 keys cannot be cut into 2 equal pieces"
    assert "sdpa-cudnn-in-4" not in choice.timings


# -- on a GPU ----------------------------------------------------------------------------------------------------


@pytest.fixture
def kernels():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    try:
        return load_ops("cuda")
    except BackendError as error:
        pytest.skip(str(error))


def on_a_gpu(name: str, ops, keys: int):
    (kind,) = (kind for kind in split_kv(ops) if kind.name == name)
    attention: AttentionCandidate = kind.load()
    q, k, v = inputs(96, keys, 2, 128, torch.bfloat16, GPU)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        try:
            out = attention(q, k, v)
        except Exception as error:
            pytest.skip(f"this GPU cannot: {error}")
    torch.cuda.current_stream().wait_stream(stream)
    return attention, stream, out, (q, k, v)


@pytest.mark.cuda
@pytest.mark.parametrize("name", [kind.name for kind in IN_PIECES])
@pytest.mark.parametrize("merging", ["torch", "cuda"])
@pytest.mark.parametrize("keys", [240, 251])
def test_numbers_on_a_gpu(kernels, name, merging, keys):
    _, _, out, (q, k, v) = on_a_gpu(name, kernels if merging == "cuda" else reference, keys)
    assert relative_error(out, exact_attention(q, k, v)) < TOLERANCES[torch.bfloat16] / 2


@pytest.mark.cuda
@pytest.mark.parametrize("name", [kind.name for kind in IN_PIECES])
def test_a_captured_call_follows_its_inputs(kernels, name):
    attention, stream, _, (q, k, v) = on_a_gpu(name, kernels, 240)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph, stream=stream):
        out = attention(q, k, v)
    for t in (q, k, v):
        t.copy_(t.flip(0) * 0.5)
    graph.replay()
    assert relative_error(out, exact_attention(q, k, v)) < TOLERANCES[torch.bfloat16] / 2
