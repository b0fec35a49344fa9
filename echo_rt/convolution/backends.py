"""The candidates for the decoder's convolutions, and what is known of each without trying it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from echo_rt.autotune.tuner import HALF, Candidate
from echo_rt.convolution import kernels
from echo_rt.convolution.shapes import ConvolutionShape, Prepared
from echo_rt.convolution.torch_conv import (
    accumulated_products,
    library_convolution,
    subpixel_convolution,
    upsample_convolution,
)
from echo_rt.ops.backends import load_ops
from echo_rt.ops.schema import Ops

# Names from earlier versions that snapshots and caches may hold: why they are gone and what to choose.
REMOVED = {
    "conv3d-searched": "cuDNN's search could end differently in each process, so that no video could be resumed bit "
    "for bit; choose conv3d or three-products"
}


def _any_shape(shape: ConvolutionShape) -> str:
    return ""


@dataclass(frozen=True)
class ConvolutionCandidate(Candidate["ConvolutionCandidate", ConvolutionShape]):
    """An implementation of convolutions.

    ``prepare`` takes the weight ``[Co, C, kT, kH, kW]``, in any layout, in the dtype of the frames, and returns the
    function of the frames. ``enlarges``: it upsamples by two first. ``limit``: why it cannot compute a shape, or "".
    ``capability``: the compute capability that it needs, if any.
    """

    prepare: Callable[[Tensor], Prepared]
    _: KW_ONLY
    enlarges: bool = False
    limit: Callable[[ConvolutionShape], str] = _any_shape
    capability: tuple[int, int] | None = None

    def load(self) -> ConvolutionCandidate:
        return self

    def obstacle(self, device: torch.device, dtype: torch.dtype, shapes: ConvolutionShape) -> str:
        none = "it is an operation of the backends cuda and emulated, and this model's backend has none"
        why = (self.mismatch(device, dtype) or self._limit(device, shapes)) if self.devices else none
        everywhere = ("enlarged", "phases") if self.enlarges else ("conv3d", "three-products")
        others = " or ".join(name for name in everywhere if name != self.name)
        return why and f"{why}; choose {others}"

    def _limit(self, device: torch.device, shape: ConvolutionShape) -> str:
        if limit := self.limit(shape):
            return f"{limit}, and this is {shape}"
        if self.capability is None or device.type != "cuda":
            return ""
        found = torch.cuda.get_device_capability(device)
        needed, there = (f"{major}.{minor}" for major, minor in (self.capability, found))
        return "" if found == self.capability else f"it needs compute capability {needed}, this GPU has {there}"


def implementations(ops: Ops | None = None) -> tuple[ConvolutionCandidate, ...]:
    """Return all candidates, torch's first; the kernels are those of the backend of ``ops``."""
    # The torch backend's operations are definitions, not fast; torch's fast convolutions are candidates above.
    ops = ops or load_ops("torch")
    devices = {"torch": (), "cuda": ("cuda",)}.get(ops.name, ("cpu",))
    facts: dict[str, Any] = {"devices": devices, "dtypes": HALF, "build": ops.name if devices else None}
    causal, hopper, upsample = (partial(one, ops) for one in (kernels.causal, kernels.causal_hopper, kernels.upsample))

    def subpixel_limit(shape: ConvolutionShape) -> str:
        return "" if shape.kernel == (1, 3, 3) else "it takes kernels of 1x3x3"

    of = ConvolutionCandidate
    return (
        of("conv3d", library_convolution),
        # On a CPU in float32, torch's 3-D convolution takes another path that is several times slower.
        of("three-products", accumulated_products, quick_on_cpu=(torch.float32,)),
        of("kernel", causal, limit=kernels.causal_limit, **facts),
        of("kernel-hopper", hopper, limit=kernels.hopper_limit, capability=kernels.CAPABILITY, **facts),
        of("enlarged", upsample_convolution, enlarges=True),
        of("phases", subpixel_convolution, enlarges=True, limit=subpixel_limit),
        of("kernel", upsample, enlarges=True, limit=subpixel_limit, **facts),
    )
