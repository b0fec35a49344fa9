"""What tests of operations share: bounds, comparisons, and the formulas that several have in common, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import EPS, SIZES, Sizes, make_case
from closeness import relative_error
from torch import Tensor

from echo_rt.ops.backends import available_backends
from echo_rt.ops.schema import Ops

BACKENDS = [name for name, status in available_backends().items() if status == "available"]

# Rounding of the result to the dtype, and of the float32 arithmetic before it: no backend may be further off.
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}
DTYPES = pytest.mark.parametrize("dtype", BOUNDS, ids=lambda dtype: str(dtype).removeprefix("torch."))
ALL_SIZES = pytest.mark.parametrize("size", SIZES)
# Chance in torch's own error: another order of summation rounds other elements up and down.
SLACK = 0.1


def case(ops: Ops, op: str, sizes: Sizes, dtype: torch.dtype) -> list[Any]:
    """The arguments of one call, where the backend can take them."""
    return make_case(op, sizes, dtype, "cuda" if ops.name == "cuda" else "cpu")


def copies(args: list[Any]) -> list[Any]:
    return [a.clone() if isinstance(a, Tensor) else a for a in args]


def assert_close(actual: Tensor, torchs: Tensor, expected: Tensor, bound: float) -> None:
    """``torchs``: the same from torch in the same precision, whose error is the measure."""
    error, own = relative_error(actual, expected), relative_error(torchs, expected)
    allowed = min(bound, 2 * own + SLACK * bound)
    assert error <= allowed, f"off by {error:.2e}; torch is by {own:.2e}, allowed are {allowed:.2e}"


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Byte for byte; a failure names the first coordinates that differ."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    wrong = (actual.contiguous().view(torch.uint8) != expected.contiguous().view(torch.uint8)).nonzero()
    assert not len(wrong), f"{len(wrong)} bytes differ, the first at {wrong[0].tolist()} (last: byte in the row)"


def float32_is_refused(ops: Ops, op: str, args: list[Any]) -> bool:
    """Whether this is a backend on tensor cores and the arguments are float32; then the refusal is checked."""
    if ops.name == "torch" or args[0].dtype != torch.float32:
        return False
    with pytest.raises(ValueError, match=rf"^echo_rt\.{op}: \w+: expected dtype bfloat16 or float16; got float32"):
        getattr(ops, op)(*args)
    return True


def spread(x: Tensor) -> Tensor:
    """The same rows, with a stride that is not their width."""
    return torch.cat((x, x), -1)[:, : x.shape[1]]


def as_float64(args: list[Any]) -> list[Any]:
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * weight


def layer_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + EPS) * scale + shift


def rotate(x: Tensor, temporal: Tensor, spatial: Tensor) -> Tensor:
    """``x [F·S, H, d]`` turned, token by token, as complex numbers."""
    frames, tokens = temporal.shape[0], spatial.shape[0]
    table = torch.cat((temporal.repeat_interleave(tokens, 0), spatial.repeat(frames, 1, 1)), 1)
    turn = torch.view_as_complex(table.contiguous())[:, None]
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)
