"""The implementations of attention: torch's own, the flash-attn libraries, plain matrix products, split keys.

Torch's are called as operators. ``torch.nn.attention.sdpa_kernel`` would select among them with switches of the whole
process, so that two runtimes in two threads would disturb each other.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from echo_rt.attention.cudnn_float8 import CudnnFloat8
from echo_rt.autotune.tuner import ANY_DTYPE, HALF, Candidate
from echo_rt.errors import BackendError
from echo_rt.ops.schema import Ops
from echo_rt.utils.device import FLOAT8
from echo_rt.utils.wording import counted, first_line

Function = Callable[[Tensor, Tensor, Tensor], Any]

CONVERTED = "converted"  # what any device has for float8 tensors
# The numbers of splits that ops.merge_attention takes.
SPLITS = (2, 3, 4)

# Size limit of the scores that Matmul holds at once. By count, half a frame of 832x480 fits and fills the
# multiprocessors of a large GPU as well as a whole frame; a much smaller slice would leave many of them idle.
_SCORES_BYTES = 128 * 2**20


@dataclass(frozen=True)
class AttentionShapes:
    """Shapes of one call: tokens ``queries`` attend to tokens ``keys``, in ``heads`` heads of size ``head_dim``."""

    queries: int
    keys: int
    heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.queries} queries, {self.keys} keys, {counted(self.heads, 'head')} of {self.head_dim}"


class Attention(Protocol):
    """Softmax attention without a mask, scaled by the root of the head size.

    It keeps no state between calls and never synchronizes, so that it can be captured in a CUDA graph. A library may
    compile or plan at the first call with new sizes, cuDNN once per thread: the capturing thread must call it before.
    """

    @property
    def name(self) -> str: ...

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``q [n, H, d]`` and ``k, v [m, H, d]``, which may be parts of a larger buffer -> ``[n, H·d]``."""


@dataclass(frozen=True)
class Library:
    """A function of ``[1, H, n, d]``, as torch's are, or of ``[1, n, H, d]``, as flash-attn's are.

    It returns its output or a tuple that begins with it: releases of flash-attn 3 and 4 differ in whether the
    log-sum-exp comes along.
    """

    name: str
    function: Function
    heads_first: bool = True

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = ((t.transpose(0, 1) if self.heads_first else t).unsqueeze(0) for t in (q, k, v))
        result = self.function(q, k, v)
        out: Tensor = (result[0] if isinstance(result, tuple) else result)[0]
        return (out.transpose(0, 1) if self.heads_first else out).flatten(-2)


@dataclass(frozen=True)
class SplitKV:
    """Split-KV attention: a library attends to ``splits`` equal parts of the keys as a batch, then they are merged.

    It fills the last wave of thread blocks (``docs/kernels.md``); measuring tells whether that pays for copying and
    merging. ``function`` returns outputs ``[splits, H, n, d]`` and natural log-sum-exps of as many rows. Keys that
    cannot be split evenly are attended to whole, by the same library.
    """

    name: str
    library: str
    function: Function
    splits: int
    ops: Ops

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if k.shape[0] % self.splits:
            return Library(self.library, self.function)(q, k, v)
        tokens, heads, _ = q.shape
        # Copies, as libraries differ in whether a batch may be the same memory over and over.
        queries = q.expand(self.splits, -1, -1, -1).contiguous()
        keys, values = (t.unflatten(0, (self.splits, -1)) for t in (k, v))
        outputs, sums, *_ = self.function(*(t.transpose(1, 2) for t in (queries, keys, values)))
        # cuDNN's sums have a last dimension of one.
        return self.ops.merge_attention(outputs.transpose(1, 2), sums.view(self.splits, heads, tokens))


@dataclass(frozen=True)
class Converted:
    """Attention of float8 tensors by another's in ``dtype``, to which they convert exactly; ``name`` tells of both."""

    attention: Attention
    dtype: torch.dtype
    name: str = CONVERTED

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attention(*(t.to(self.dtype) for t in (q, k, v)))


@dataclass(frozen=True)
class ByDtype:
    """Attention of float8 tensors by ``in_float8``, and of all others by ``attention``."""

    attention: Attention
    in_float8: Attention

    @property
    def name(self) -> str:
        return f"{self.attention.name}, {self.in_float8.name} in float8"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (self.in_float8 if q.dtype == FLOAT8 else self.attention)(q, k, v)


@dataclass(frozen=True)
class Matmul:
    """Attention by matrix products for heads of any size, one head and one slice of its queries at a time.

    Fused kernels do not support heads above 256 or are slow there; the VAE's one head has 384. The larger the head, the
    smaller the share of the score traffic.

    Scores and softmax are float32, as in a fused kernel; the weights are rounded once, to the dtype of the values. The
    scratch memory is that of one slice: scores, softmax, rounded weights.
    """

    name: str = "products"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries, heads, size = q.shape
        scale = 1 / math.sqrt(size)
        out = q.new_empty(queries, heads, size)
        rows = _rows_at_once(queries, len(k))
        buffer = q.new_empty(rows, len(k), dtype=torch.float32)
        # On a CPU, torch has no matrix product of 16-bit inputs with a float32 result.
        compute = _scores_of_half if q.is_cuda and q.dtype is not torch.float32 else _scores
        for head in range(heads):
            for some, to in zip(q[:, head].split(rows), out[:, head].split(rows), strict=True):
                scores = buffer[: len(some)]
                compute(some, k[:, head], scale, scores)
                torch.mm(torch.softmax(scores, dim=-1).to(v.dtype), v[:, head], out=to)
        return out.flatten(-2)


def _rows_at_once(queries: int, keys: int) -> int:
    """Return the queries per slice, the same in each, so that the last slice fills the GPU too."""
    slices = math.ceil(queries * keys * torch.float32.itemsize / _SCORES_BYTES)
    return math.ceil(queries / slices)


def _scores(q: Tensor, k: Tensor, scale: float, out: Tensor) -> None:
    """Write ``scale`` times the products of ``q [n, d]`` with ``k [m, d]``, in float32, to ``out [n, m]``."""
    torch.addmm(out, q.float(), k.float().T, beta=0, alpha=scale, out=out)


def _scores_of_half(q: Tensor, k: Tensor, scale: float, out: Tensor) -> None:
    """Do the same for 16-bit inputs on a GPU, where the float32 sums are stored without rounding."""
    # Some versions of torch refuse an addend of another dtype than q's in addmm, although it is not read.
    into = out.unsqueeze(0)
    torch.ops.aten.baddbmm.dtype_out(
        into, q.unsqueeze(0), k.T.unsqueeze(0), torch.float32, beta=0, alpha=scale, out=into
    )


@dataclass(frozen=True)
class AttentionCandidate(Candidate[Attention, AttentionShapes]):
    """``make`` returns the attention, or raises :class:`BackendError` that says why and how to get it.

    ``fused``: it never holds all scores at once. ``splits``: number of parts of the keys.
    """

    make: Callable[[], Attention]
    _: KW_ONLY
    devices: tuple[str, ...] = ("cuda",)
    dtypes: tuple[torch.dtype, ...] = HALF
    fused: bool = True
    splits: int = 1

    def load(self) -> Attention:
        return self.make()

    def obstacle(self, device: torch.device, dtype: torch.dtype, shapes: AttentionShapes) -> str:
        why = self.mismatch(device, dtype)
        able = " or ".join(other.name for other in IMPLEMENTATIONS if not other.mismatch(device, dtype)) or CONVERTED
        other_dtype = ", or another dtype" if device.type in self.devices else ""
        return why and f"{why}; choose {able}{other_dtype}"

    def reserve(self, shapes: AttentionShapes) -> str:
        if shapes.keys % self.splits:
            return f"{shapes.keys} keys cannot be cut into {self.splits} equal pieces"
        # Scores take gigabytes, and it is slow wherever another works; Matmul serves heads of any size.
        return "" if self.fused else "it holds all scores in memory: for where nothing else works"


_ATEN = torch.ops.aten
_CUDNN = _ATEN._scaled_dot_product_cudnn_attention.default
_FLASH = _ATEN._scaled_dot_product_flash_attention.default
_EFFICIENT = _ATEN._scaled_dot_product_efficient_attention.default
_MATH = _ATEN._scaled_dot_product_attention_math.default
# No bias, and no log-sum-exp for a backward pass.
_NO_SUMS = {"attn_bias": None, "compute_log_sumexp": False}


def _of_torch(name: str, function: Function, **facts: Any) -> AttentionCandidate:
    return AttentionCandidate(name, partial(Library, name, function), **facts)


def _imported(module: str, name: str, remedy: str) -> Callable[..., Any]:
    """Import a library's function; :class:`BackendError` where it is missing or does not load."""
    try:
        library = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            raise BackendError(f"it is not installed; {remedy}") from None
        raise BackendError(f"it does not load: no module {error.name}; {remedy}") from error
    except Exception as error:  # a library built for another torch can raise anything
        raise BackendError(f"it does not load: {first_line(error)}; {remedy}") from error
    # flash-attn 4 alone also makes a package flash_attn, with nothing else in it.
    function: Callable[..., Any] | None = getattr(library, name, None)
    if function is None:
        raise BackendError(f"it is not installed; {remedy}")
    return function


def _flash_attn(name: str, module: str, distribution: str, remedy: str, **facts: Any) -> AttentionCandidate:
    def make() -> Attention:
        return Library(name, _imported(module, "flash_attn_func", remedy), heads_first=False)

    return AttentionCandidate(name, make, distribution=distribution, **facts)


def _sage_attention() -> Attention:
    """SageAttention takes 16 bits and quantizes in each call: keys without their mean and queries to int8."""
    remedy = (
        "build it from SageAttention's sources, newer than release 2.2.0, which computes noise on Hopper GPUs: "
        "pip install --no-build-isolation ."
    )
    function = partial(_imported("sageattention", "sageattn", remedy), tensor_layout="NHD")
    name = "sage-attention"
    return Converted(Library(name, function, heads_first=False), torch.bfloat16, name)


_FLASH_ATTN_3 = (
    "flash_attn_interface",
    "flash_attn_3",
    "for Hopper GPUs, it is built from the folder hopper of flash-attention's sources: pip install "
    "--no-build-isolation .",
)
# In the order of listing; which one is selected is measured.
IMPLEMENTATIONS = (
    _of_torch("sdpa-cudnn", partial(_CUDNN, **_NO_SUMS)),
    _of_torch("sdpa-flash", _FLASH),
    _of_torch("sdpa-efficient", partial(_EFFICIENT, **_NO_SUMS), dtypes=ANY_DTYPE),
    _of_torch("sdpa", scaled_dot_product_attention, devices=("cpu",), dtypes=ANY_DTYPE),
    AttentionCandidate("products", Matmul, devices=("cuda", "cpu"), dtypes=ANY_DTYPE),
    _of_torch("sdpa-math", _MATH, devices=("cuda", "cpu"), dtypes=ANY_DTYPE, fused=False),
    _flash_attn("flash-attn-2", "flash_attn", "flash-attn", "pip install --no-build-isolation flash-attn"),
    _flash_attn("flash-attn-3", *_FLASH_ATTN_3),
    _flash_attn(
        "flash-attn-4", "flash_attn.cute", "flash-attn-4", "for Hopper and newer GPUs: pip install flash-attn-4"
    ),
)


# Of float8 tensors.
FLOAT8_LIBRARIES = (
    AttentionCandidate("cudnn-float8", CudnnFloat8, dtypes=(FLOAT8,), distribution="nvidia-cudnn-frontend"),
    _flash_attn("flash-attn-3-float8", *_FLASH_ATTN_3, dtypes=(FLOAT8,)),
    AttentionCandidate("sage-attention", _sage_attention, dtypes=(FLOAT8,), distribution="sageattention"),
)


def split_kv(ops: Ops) -> tuple[AttentionCandidate, ...]:
    """Return the split-KV candidates of cuDNN and of flash attention, which ``ops`` merges."""
    cudnn = partial(_CUDNN, attn_bias=None, compute_log_sumexp=True)
    libraries: tuple[tuple[str, Function], ...] = (("sdpa-cudnn", cudnn), ("sdpa-flash", _FLASH))
    return tuple(
        AttentionCandidate(name, partial(SplitKV, name, library, function, splits, ops), splits=splits, build=ops.name)
        for library, function in libraries
        for splits in SPLITS
        for name in [f"{library}-in-{splits}"]
    )


def implementations(ops: Ops) -> tuple[AttentionCandidate, ...]:
    """Return all candidates for a model with these operations."""
    return (*IMPLEMENTATIONS, *split_kv(ops))
