"""Products of the transformer's linear layers: torch's choice, or on a GPU the fastest of what cuBLASLt proposes."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu as gelu_of
from torch.nn.functional import linear

from echo_rt.autotune.cache import Cache
from echo_rt.autotune.tuner import HALF, Candidate, Check, Selection, Tuner
from echo_rt.config import ModelConfig
from echo_rt.errors import BackendError
from echo_rt.ops.schema import Ops
from echo_rt.utils.device import FLOAT8, parse_dtype
from echo_rt.utils.wording import first_line

_ALGORITHMS = 8  # that cuBLASLt is asked for
_ALIGNMENT = 256  # bytes, the most that one of them needs
_INSTALL = "pip install 'nvmath-python>=1.0'"
# Otherwise nvmath asks the root logger, and at level INFO it times each call.
_QUIET = logging.getLogger("echo_rt.linear.nvmath")
_QUIET.setLevel(logging.WARNING)


@dataclass(frozen=True)
class LinearShape:
    """Shape of one call: ``rows`` of ``inputs`` numbers become as many of ``outputs``, to which GELU is applied."""

    rows: int
    inputs: int
    outputs: int
    gelu: bool = False

    def __str__(self) -> str:
        return f"{self.rows} rows, {self.inputs} to {self.outputs}{' with GELU' if self.gelu else ''}"


def gelu_tanh(x: Tensor) -> Tensor:
    """Compute GELU by its tanh formula, in ``x``'s dtype."""
    return gelu_of(x, approximate="tanh")


class TorchLinear:
    """``x [n, in] @ weight.T + bias`` in their dtype ``[n, out]``, then :func:`gelu_tanh` if asked for, by torch.

    ``weight [out, in]``, ``bias [out]``. On a GPU cuBLASLt applies GELU before it writes the result, which saves one
    pass over it.
    """

    name = "torch"

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor, gelu: bool) -> Tensor:
        if gelu and x.is_cuda:
            return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
        out = linear(x, weight, bias)
        return gelu_tanh(out) if gelu else out  # the operator above has GELU's other formula on a CPU


TORCH = TorchLinear()


class CublasLt(threading.local):
    """The same by algorithm number ``algorithm``, from 1, of those that cuBLASLt's heuristic proposes for a shape.

    Only of those without a workspace, which graphs that run at the same time would share. Planned at the first call
    with a new shape in each thread, as nvmath's objects belong to one: the capturing thread must call it before.
    Tensors that lie otherwise are left to torch.
    """

    def __init__(self, algorithm: int) -> None:
        self.name, self._algorithm = f"cublaslt-{algorithm}", algorithm
        try:
            self._nvmath: Any = import_module("nvmath.linalg.advanced")
        except Exception as error:  # a library made for another CUDA can raise anything
            raise BackendError(f"nvmath-python does not load: {first_line(error)}; {_INSTALL}") from error
        for method in ("reset_operands_unchecked", "release_operands"):
            if not hasattr(self._nvmath.Matmul, method):
                raise BackendError(f"nvmath-python is too old, its Matmul has no {method}; {_INSTALL}")
        self._plans: dict[Any, Any] = {}

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor, gelu: bool) -> Tensor:
        if not all(t.is_contiguous() and t.data_ptr() % _ALIGNMENT == 0 for t in (x, weight, bias)):
            return TORCH(x, weight, bias, gelu)
        key = (x.device, x.dtype, x.shape, weight.shape, gelu)
        if key not in self._plans:
            self._plans[key] = self._plan(x, weight, bias, gelu)
        plan = self._plans[key]
        plan.reset_operands_unchecked(a=weight, b=x.t(), epilog_inputs={"bias": bias})
        out: Tensor = plan.execute()
        plan.release_operands()  # else it would keep x
        return out.t()

    def _plan(self, x: Tensor, weight: Tensor, bias: Tensor, gelu: bool) -> Any:
        """Plan ``weight @ x.T``, as cuBLASLt adds a bias to the columns of a matrix that is stored by columns."""
        product = self._nvmath.Matmul(weight, x.t(), options={"memory_limit": 0, "logger": _QUIET})
        epilogs = self._nvmath.MatmulEpilog
        after = {"epilog": epilogs.GELU_BIAS if gelu else epilogs.BIAS, "epilog_inputs": {"bias": bias}}
        found = product.plan(preferences={"limit": _ALGORITHMS}, **after)
        if len(found) < self._algorithm:
            raise BackendError(f"the last algorithm that cuBLASLt proposes is number {len(found)}")
        product.plan(algorithms=[found[self._algorithm - 1]], **after)
        return product


LinearProduct = TorchLinear | CublasLt
LinearSelection = Selection[LinearProduct]
Products = Mapping[LinearShape, LinearProduct]  # by the shape of a call; torch computes all others
CACHE = Cache("linear", LinearShape)
cache_folder = CACHE.path


@dataclass(frozen=True)
class LinearCandidate(Candidate[LinearProduct, LinearShape]):
    """``algorithm``: the number of one of cuBLASLt's, 0 for torch's choice."""

    _: KW_ONLY
    algorithm: int = 0

    def load(self) -> LinearProduct:
        return CublasLt(self.algorithm) if self.algorithm else TORCH

    def obstacle(self, device: torch.device, dtype: torch.dtype, shapes: LinearShape) -> str:
        if why := self.mismatch(device, dtype):
            return f"{why}; choose {TORCH.name}"
        missing = self.algorithm and find_spec("nvmath") is None
        return f"nvmath-python is not installed; {_INSTALL}" if missing else ""

    def version(self) -> str | None:
        """Return the versions of nvmath-python and of cuBLASLt, whose heuristic numbers the algorithms."""
        try:
            own = import_module("nvmath.bindings.cublasLt").get_version() if self.algorithm else None
        except Exception as error:  # which loading it tells
            own = first_line(error)
        return own and f"{super().version()}, cuBLASLt {own}"


_LIBRARY: dict[str, Any] = {"devices": ("cuda",), "dtypes": HALF, "distribution": "nvmath-python"}
# Torch's first, then cuBLASLt's in the order of the times that its heuristic expects.
IMPLEMENTATIONS = (
    LinearCandidate(TORCH.name),
    *(LinearCandidate(f"cublaslt-{number}", algorithm=number, **_LIBRARY) for number in range(1, _ALGORITHMS + 1)),
)


class LinearCheck(Check[LinearProduct]):
    """Random rows, weight and bias of ``shape``."""

    calls = 4

    def __init__(self, shape: LinearShape, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(device, dtype, (shape.rows, shape.outputs))
        self._x, self._bias = self.normal(shape.rows, shape.inputs), self.normal(shape.outputs)
        self._weight = self.normal(shape.outputs, shape.inputs) / math.sqrt(shape.inputs)
        self.inputs, self._gelu = (self._x,), shape.gelu

    def call(self, product: LinearProduct, /) -> Callable[[], Tensor]:
        return partial(product, self._x, self._weight, self._bias, self._gelu)

    def errors(self, out: Tensor) -> Tensor:
        """Return the errors of rows spread from first to last."""
        rows = torch.linspace(0, len(out) - 1, min(64, len(out)), device=out.device).round().long()
        exact = self._x[rows].double() @ self._weight.double().t() + self._bias.double()
        exact = gelu_tanh(exact) if self._gelu else exact
        errors: Tensor = (out[rows].double() - exact).norm(dim=1) / exact.norm(dim=1)
        return errors if out.is_contiguous() else errors.new_tensor(math.inf)


def linear_tuner(device: torch.device, dtype: torch.dtype, shape: LinearShape) -> Tuner[LinearProduct, LinearShape]:
    """Return the tuner that selects a product for ``shape``."""
    return Tuner(CACHE, device, dtype, shape, IMPLEMENTATIONS, partial(LinearCheck, shape, device, dtype))


def linear_shapes(config: ModelConfig, dtype: torch.dtype) -> tuple[LinearShape, ...]:
    """Return the shapes of the large 16-bit products of a pass; in float8 they are those behind both attentions."""
    rows, dim, ffn = config.tokens_per_block, config.transformer.dim, config.transformer.ffn_dim
    behind_attention = LinearShape(rows, dim, dim)
    if dtype == FLOAT8:
        return (behind_attention,)
    into = LinearShape(rows, dim, ffn, gelu=True)
    return LinearShape(rows, dim, 3 * dim), behind_attention, into, LinearShape(rows, ffn, dim)


def select_linear(
    shape: LinearShape,
    device: torch.device,
    dtype: torch.dtype,
    requested: str | None,
    prescribed: str | None,
    cache: Path | None,
) -> LinearSelection:
    """Select a product as :meth:`echo_rt.autotune.tuner.Tuner.select` does.

    Where there is none but torch's, and none other is asked for, nothing is measured.
    """
    by_torch = requested in (None, TORCH.name) and prescribed in (None, TORCH.name)
    if by_torch and all(one.obstacle(device, dtype, shape) for one in IMPLEMENTATIONS[1:]):
        return Selection(TORCH, "the only one here", by_name=requested is not None)
    return linear_tuner(device, dtype, shape).select(requested, prescribed, cache=cache)


def probes(device: torch.device, ops: Ops) -> tuple[Tuner[LinearProduct, LinearShape], ...]:
    """Return a tuner that tries all candidates without a model, in the dtype that models have there."""
    return (linear_tuner(device, parse_dtype(None, device), LinearShape(rows=256, inputs=128, outputs=384)),)
