"""The kinds of attention there are: torch's own, one implementation each, and the flash-attn libraries.

Torch's are called as the operators they are. ``torch.nn.attention.sdpa_kernel`` would choose among them with switches
of the whole process: two runtimes in two threads would take turns at being computed by the other's.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from echo_rt.attention.products import Products
from echo_rt.errors import BackendError
from echo_rt.utils.wording import first_line, plain

_HALF = (torch.bfloat16, torch.float16)


class Attention(Protocol):
    """Softmax attention without a mask, scaled by the root of the head size.

    It keeps nothing between calls and never waits for the device, so that it can be captured in a CUDA graph; a
    library may compile or plan at the first call with new sizes, and cuDNN does so once in every thread: the thread
    that captures has to call it before.
    """

    @property
    def name(self) -> str: ...

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``q [n, H, d]`` and ``k, v [m, H, d]``, which may be parts of a larger buffer -> ``[n, H·d]``."""


@dataclass(frozen=True)
class HeadsFirst:
    """A function of ``[1, H, n, d]``, as torch's are, that returns its output or a tuple that begins with it."""

    name: str
    function: Callable[[Tensor, Tensor, Tensor], Any]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
        return _output(self.function(q, k, v))[0].transpose(0, 1).flatten(-2)


@dataclass(frozen=True)
class TokensFirst:
    """A function of ``[1, n, H, d]``, as flash-attn's are, that returns its output or a tuple that begins with it."""

    name: str
    function: Callable[[Tensor, Tensor, Tensor], Any]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _output(self.function(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)))[0].flatten(-2)


def _output(result: Any) -> Tensor:
    # Releases of flash-attn 3 and 4 differ in whether the log-sum-exp comes along.
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output


@dataclass(frozen=True)
class Kind:
    """What is known of an attention before it is tried.

    ``load`` returns it, or raises :class:`BackendError` that says why it is not there and how to get it. ``fused``:
    it never holds all scores where they are many. ``distribution``: the package it comes in, where that is not torch.
    ``pieces``: into how many it cuts the keys, ``merged_by``: the backend that merges what came of them.
    """

    name: str
    load: Callable[[], Attention]
    devices: tuple[str, ...] = ("cuda",)
    dtypes: tuple[torch.dtype, ...] = _HALF
    fused: bool = True
    distribution: str | None = None
    pieces: int = 1
    merged_by: str | None = None

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> str:
        """Why it cannot be had on ``device`` in ``dtype`` and what can be done, as far as is known untried; or ""."""
        if device.type not in self.devices:
            there = [kind.name for kind in KINDS if device.type in kind.devices]
            return f"it runs on {' and '.join(self.devices)}, the device is {device}; choose {' or '.join(there)}"
        if dtype not in self.dtypes:
            able = [kind.name for kind in KINDS if device.type in kind.devices and dtype in kind.dtypes]
            return (
                f"it computes in {' or '.join(map(plain, self.dtypes))}, the model's dtype is {plain(dtype)}; "
                f"choose {' or '.join(able)}, or another dtype"
            )
        return ""

    def version(self) -> str | None:
        """What of it may change: its package's version, or who merges. None where torch's or echo-rt's says it all."""
        if self.distribution is None:
            return self.merged_by
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None


# Their arguments after q, k, v: no bias, no log-sum-exp for a backward pass.
def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return torch.ops.aten._scaled_dot_product_cudnn_attention.default(q, k, v, None, False)


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return torch.ops.aten._scaled_dot_product_flash_attention.default(q, k, v)


def _efficient(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return torch.ops.aten._scaled_dot_product_efficient_attention.default(q, k, v, None, False)


def _math(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return torch.ops.aten._scaled_dot_product_attention_math.default(q, k, v)


def _torch_kind(name: str, function: Callable[[Tensor, Tensor, Tensor], Any], **facts: Any) -> Kind:
    return Kind(name, lambda: HeadsFirst(name, function), **facts)


def _library_kind(name: str, module: str, distribution: str, remedy: str) -> Kind:
    def load() -> Attention:
        try:
            library = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is not None and f"{module}.".startswith(f"{error.name}."):
                raise BackendError(f"it is not installed; {remedy}") from None
            raise BackendError(f"it does not load: no module {error.name}; {remedy}") from error
        except Exception as error:  # a library built for another torch can raise anything
            raise BackendError(f"it does not load: {first_line(error)}; {remedy}") from error
        # flash-attn 4 alone also makes a package flash_attn, with nothing else in it.
        function = getattr(library, "flash_attn_func", None)
        if function is None:
            raise BackendError(f"it is not installed; {remedy}")
        return TokensFirst(name, function)

    return Kind(name, load, distribution=distribution)


_ANY_DTYPE = (*_HALF, torch.float32)

# In the order in which they are listed; what is chosen is decided by measuring.
KINDS = (
    _torch_kind("sdpa-cudnn", _cudnn),
    _torch_kind("sdpa-flash", _flash),
    _torch_kind("sdpa-efficient", _efficient, dtypes=_ANY_DTYPE),
    _torch_kind("sdpa", scaled_dot_product_attention, devices=("cpu",), dtypes=_ANY_DTYPE),
    Kind("products", Products, devices=("cuda", "cpu"), dtypes=_ANY_DTYPE),
    _torch_kind("sdpa-math", _math, devices=("cuda", "cpu"), dtypes=_ANY_DTYPE, fused=False),
    _library_kind("flash-attn-2", "flash_attn", "flash-attn", "pip install --no-build-isolation flash-attn"),
    _library_kind(
        "flash-attn-3",
        "flash_attn_interface",
        "flash_attn_3",
        "for Hopper GPUs, it is built from the folder hopper of flash-attention's sources: pip install "
        "--no-build-isolation .",
    ),
    _library_kind(
        "flash-attn-4", "flash_attn.cute", "flash-attn-4", "for Hopper and newer GPUs: pip install flash-attn-4"
    ),
)
