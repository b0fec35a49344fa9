"""The candidates for the decoder's convolutions, and what is known of each without trying it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from echo_rt.autotune.tuner import HALF, Candidate
from echo_rt.convolution.torch_conv import (
    ConvolutionShape,
    Prepared,
    accumulated_products,
    library_convolution,
    subpixel_convolution,
    subpixel_weights,
    upsample_convolution,
)
from echo_rt.ops.backends import load_ops
from echo_rt.ops.schema import Ops

# Names from earlier versions that snapshots and caches may hold: why they are gone and what to choose.
REMOVED = {
    "conv3d-searched": "cuDNN's search could end differently in each process, so that no video could be resumed bit "
    "for bit; choose conv3d or three-products"
}

# Tiles of a weight for Hopper: output channels, input channels, and input channels that are adjacent in memory.
# csrc/vae/causal_conv_hopper.h has the same numbers, and the operation refuses other tiles.
COLUMNS, DEPTH, CHUNK = 96, 32, 8
# The compute capability of GPUs with Hopper's matrix products.
CAPABILITY = (9, 0)


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


def causal_kernel(ops: Ops, weight: Tensor) -> Prepared:
    """Compute all frames of the kernel in one launch."""
    laid_out = weight.contiguous(memory_format=torch.channels_last_3d)
    return _launched(lambda frames, out: ops.causal_conv(frames, laid_out, None, None, out), weight)


def hopper_kernel(ops: Ops, weight: Tensor) -> Prepared:
    """Do the same on Hopper's matrix products."""
    laid_out = tiled(weight)
    return _launched(lambda frames, out: ops.causal_conv_hopper(frames, laid_out, out), weight)


def upsample_kernel(ops: Ops, weight: Tensor) -> Prepared:
    """Compute the four parts of :func:`subpixel_weights` in one launch, each written in its place."""
    laid_out = subpixel_weights(weight.squeeze(2))
    return _launched(lambda frames, out: ops.upsample_conv(frames, laid_out, None, out), weight, scale=2)


def _launched(launch: Callable[[Tensor, Tensor], object], weight: Tensor, scale: int = 1) -> Prepared:
    """Return a function of frames that calls ``launch`` with them and a new output."""
    out_channels, past = len(weight), weight.shape[2] - 1

    def call(frames: Tensor, /) -> Tensor:
        count, height, width, _ = frames.shape
        out = frames.new_empty(count - past, scale * height, scale * width, out_channels)
        launch(frames, out)
        return out

    return call


def causal_limit(shape: ConvolutionShape) -> str:
    """Say why ``causal_conv`` cannot compute a shape, or ""."""
    _, height, width = shape.kernel
    return "" if height == width and height in (1, 3) else "it takes kernels of 1x1 and 3x3 pixels"


def hopper_limit(shape: ConvolutionShape) -> str:
    """Say why ``causal_conv_hopper`` cannot compute a shape, or ""."""
    if shape.kernel[1:] != (3, 3):
        return "it takes kernels of 3x3 pixels"
    whole = shape.channels % DEPTH == 0 and shape.out_channels % COLUMNS == 0
    return "" if whole else f"it takes multiples of {DEPTH} channels and makes multiples of {COLUMNS}"


def tiled(weight: Tensor) -> Tensor:
    """Lay out ``weight [Co, C, kT, 3, 3]`` for :func:`echo_rt.ops.reference.causal_conv_hopper`."""
    taps: Tensor = weight.flatten(3).unflatten(1, (-1, DEPTH // CHUNK, CHUNK)).unflatten(0, (-1, COLUMNS))
    return taps.permute(0, 5, 2, 6, 3, 1, 4).contiguous()


def untiled(weight: Tensor) -> Tensor:
    """Invert :func:`tiled`."""
    kernel: Tensor = weight.permute(0, 5, 2, 4, 6, 1, 3).flatten(2, 4).flatten(0, 1).unflatten(-1, (3, 3))
    return kernel


def implementations(ops: Ops | None = None) -> tuple[ConvolutionCandidate, ...]:
    """Return all candidates, torch's first; the kernels are those of the backend of ``ops``."""
    # The torch backend's operations are definitions, not fast; torch's fast convolutions are candidates above.
    ops = ops or load_ops("torch")
    devices = {"torch": (), "cuda": ("cuda",)}.get(ops.name, ("cpu",))
    facts: dict[str, Any] = {"devices": devices, "dtypes": HALF, "build": ops.name if devices else None}
    causal, hopper, upsample = (partial(one, ops) for one in (causal_kernel, hopper_kernel, upsample_kernel))

    def subpixel_limit(shape: ConvolutionShape) -> str:
        return "" if shape.kernel == (1, 3, 3) else "it takes kernels of 1x3x3"

    of = ConvolutionCandidate
    return (
        of("conv3d", library_convolution),
        # On a CPU in float32, torch's 3-D convolution takes another path that is several times slower.
        of("three-products", accumulated_products, quick_on_cpu=(torch.float32,)),
        of("kernel", causal, limit=causal_limit, **facts),
        of("kernel-hopper", hopper, limit=hopper_limit, capability=CAPABILITY, **facts),
        of("enlarged", upsample_convolution, enlarges=True),
        of("phases", subpixel_convolution, enlarges=True, limit=subpixel_limit),
        of("kernel", upsample, enlarges=True, limit=subpixel_limit, **facts),
    )
