"""The ways there are to compute the decoder's convolutions: what is known of each before it is tried."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from echo_rt.convolution.causal import accumulated_products, library_convolution, searched_convolution
from echo_rt.convolution.enlarging import enlarged_convolution, phase_convolution, phases_limit
from echo_rt.convolution.hopper import CAPABILITY, hopper_limit
from echo_rt.convolution.kernel import NO_KERNEL, Kernels, causal_limit
from echo_rt.convolution.prepared import Prepared
from echo_rt.convolution.shapes import ConvolutionShape
from echo_rt.ops.schema import Ops
from echo_rt.utils.wording import plain

_HALF = (torch.bfloat16, torch.float16)


def _any_shape(shape: ConvolutionShape) -> str:
    return ""


@dataclass(frozen=True)
class Kind:
    """A way to compute a convolution.

    ``prepare`` takes its weight ``[Co, C, kT, kH, kW]``, laid out in any way, in the dtype of the frames, once, and
    gives the function of the frames. ``enlarges``: for those that double every pixel first.
    ``limit``: what it cannot do with a shape, or "". ``reserve``: why it is for where nothing else works, or "".
    ``quick_on_cpu``: dtypes in which it is the quickest of its family there, where nothing is tried.
    ``capability``: the compute capability that a GPU must have, where any will not do.
    ``build``: what it depends on beside torch and echo-rt.
    """

    name: str
    prepare: Callable[[Tensor], Prepared]
    enlarges: bool = False
    devices: tuple[str, ...] = ("cuda", "cpu")
    dtypes: tuple[torch.dtype, ...] = (*_HALF, torch.float32)
    limit: Callable[[ConvolutionShape], str] = _any_shape
    reserve: str = ""
    quick_on_cpu: tuple[torch.dtype, ...] = ()
    capability: tuple[int, int] | None = None
    build: str | None = None

    def obstacle(self, device: torch.device, dtype: torch.dtype, shape: ConvolutionShape) -> str | None:
        """Why it cannot compute ``shape`` and what can be done, as far as is known untried; None if it can."""
        why = ""
        if not self.devices:
            why = NO_KERNEL
        elif device.type not in self.devices:
            why = f"it runs on {' and '.join(self.devices)}, the device is {device}"
        elif dtype not in self.dtypes:
            why = f"it computes in {' or '.join(map(plain, self.dtypes))}, the model's dtype is {plain(dtype)}"
        elif limit := self.limit(shape):
            why = f"{limit}, and this is {shape}"
        elif self.capability and device.type == "cuda":
            found = torch.cuda.get_device_capability(device)
            needed, there = (f"{major}.{minor}" for major, minor in (self.capability, found))
            why = "" if found == self.capability else f"it needs compute capability {needed}, this GPU has {there}"
        everywhere = ("enlarged", "phases") if self.enlarges else ("conv3d", "three-products")
        others = " or ".join(name for name in everywhere if name != self.name)
        return f"{why}; choose {others}" if why else None

    def version(self) -> str | None:
        """What the outcome of a trial depends on beside the versions of torch and echo-rt."""
        return self.build


_SEARCHED_RESERVE = (
    "cuDNN's search can end differently in each thread and process, and a resumed video with it; "
    "ask for it by name where that does not matter"
)


def kinds(ops: Ops | None = None) -> tuple[Kind, ...]:
    """All of them, those of torch first; what ``ops`` offers is that of its backend."""
    own = Kernels.of(ops)
    of_backend: dict[str, Any] = {"devices": own.devices, "dtypes": _HALF, "build": own.backend}
    return (
        Kind("conv3d", library_convolution),
        # In float32 torch's 3-D convolution takes a path of its own on a CPU, which is several times as long.
        Kind("three-products", accumulated_products, quick_on_cpu=(torch.float32,)),
        Kind("conv3d-searched", searched_convolution, devices=("cuda",), dtypes=_HALF, reserve=_SEARCHED_RESERVE),
        Kind("kernel", own.causal, limit=causal_limit, **of_backend),
        Kind("kernel-hopper", own.causal_hopper, limit=hopper_limit, capability=CAPABILITY, **of_backend),
        Kind("enlarged", enlarged_convolution, enlarges=True),
        Kind("phases", phase_convolution, enlarges=True, limit=phases_limit),
        Kind("kernel", own.enlarging, enlarges=True, limit=phases_limit, **of_backend),
    )


CONVOLUTION_NAMES = tuple(dict.fromkeys(kind.name for kind in kinds()))
