"""Operations on views: each argument in turn with strides of its own is taken, with the same bits, or refused."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from cases import OPS, SIZES, Sizes
from op_checks import assert_same, case, copies
from torch import Tensor

from echo_rt.ops.backends import available_backends, load_ops
from echo_rt.ops.schema import Ops

BACKENDS = [name for name, status in available_backends().items() if status == "available"]
# Of every operation at once: the memory's have tiles for this head size.
KERNEL_SIZES = Sizes(tokens=5, heads=2, head_dim=64)
# Arguments whose rows may lie apart, as slices of a product and of the cache do.
ROWS_APART = {
    "qkv_norm_rope_store": {"qkv", "k_cache", "v_cache", "raw_k"},
    "merge_attention": {"outputs"},
    "memory_attention": {"q", "k", "v"},
    "gated_update": {"old", "candidate", "gate_weight", "out"},
    "modulated_layer_norm": {"x"},
    "gated_residual_norm": {"x", "y"},
    "modulated_layer_norm_quantize": {"x"},
    "gated_residual_norm_quantize": {"x", "y"},
    "gelu_quantize": {"x"},
    "causal_conv": {"window", "residual", "out"},
    "causal_conv_hopper": {"window", "out"},
    "upsample_conv": {"x", "out"},
}


@pytest.fixture(params=BACKENDS)
def ops(request: pytest.FixtureRequest) -> Ops:
    return load_ops(request.param)


def rows_apart(x: Tensor) -> Tensor:
    """The same tensor, whose rows lie among as many others that hold the largest byte there is."""
    room = torch.full((x.shape[0], 2, x[0].nbytes), 0xFF, dtype=torch.uint8, device=x.device)
    view = room.view(x.dtype).unflatten(-1, x.shape[1:])[:, 0] if x.dim() > 1 else room.view(x.dtype)[:, 0, 0]
    return view.copy_(x)


def elements_apart(x: Tensor) -> Tensor:
    return torch.stack((x, x), -1)[..., 0]


ARGUMENTS = [
    (op, index, name)
    for op in OPS
    for index, name in enumerate(inspect.signature(getattr(Ops, op)).parameters)
    if isinstance(case(load_ops("torch"), op, SIZES["small"], torch.bfloat16)[index], Tensor)
]


def run(ops: Ops, op: str, args: list[Any]) -> list[Any]:
    return [getattr(ops, op)(*args), *args]


@pytest.mark.parametrize(("op", "index", "name"), ARGUMENTS, ids=[f"{op}-{name}" for op, _, name in ARGUMENTS])
def test_an_argument_whose_rows_lie_apart(ops: Ops, op: str, index: int, name: str) -> None:
    args = case(ops, op, KERNEL_SIZES, torch.bfloat16)
    dense, apart = copies(args), copies(args)
    apart[index] = rows_apart(apart[index])
    if ops.name != "torch" and name not in ROWS_APART.get(op, ()):
        words = "expected (contiguous|channels-last) memory; got strides"
        with pytest.raises(ValueError, match=rf"^echo_rt\.{op}: {name}: {words}"):
            run(ops, op, apart)
        return
    for theirs, ours in zip(run(ops, op, dense), run(ops, op, apart), strict=True):
        if isinstance(theirs, Tensor):
            assert_same(ours, theirs)
    between = apart[index].storage_offset() + apart[index].stride(0) // 2
    others = apart[index].as_strided(apart[index].shape, apart[index].stride(), between)
    assert (others.contiguous().view(torch.uint8) == 0xFF).all(), "written between the rows"


@pytest.mark.parametrize(("op", "index", "name"), ARGUMENTS, ids=[f"{op}-{name}" for op, _, name in ARGUMENTS])
def test_an_argument_whose_elements_lie_apart(ops: Ops, op: str, index: int, name: str) -> None:
    args = case(ops, op, KERNEL_SIZES, torch.bfloat16)
    dense, apart = copies(args), copies(args)
    apart[index] = elements_apart(apart[index])
    if ops.name != "torch":
        words = "expected ((contiguous|channels-last) memory|dense rows); got strides"
        with pytest.raises(ValueError, match=rf"^echo_rt\.{op}: {name}: {words}"):
            run(ops, op, apart)
        return
    for theirs, ours in zip(run(ops, op, dense), run(ops, op, apart), strict=True):
        if isinstance(theirs, Tensor):
            assert_same(ours, theirs)


def test_a_difference_is_named_by_its_coordinates() -> None:
    expected = torch.zeros(2, 3, 4, dtype=torch.bfloat16)
    actual = expected.clone()
    actual[1, 2, 3] = -0.0  # equal as a number
    with pytest.raises(AssertionError, match=r"1 bytes differ, the first at \[1, 2, 7\]"):
        assert_same(actual, expected)
