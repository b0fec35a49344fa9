"""The candidates for the decoder's convolutions, and what is known of each without trying it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
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

# Tiles of a weight for Hopper: output channels, input channels, and input channels that are adjacent in memory.
# csrc/vae/causal_conv_hopper.h has the same numbers, and the operation refuses other tiles.
COLUMNS, DEPTH, CHUNK = 96, 32, 8
# The compute capability of GPUs with Hopper's matrix products.
CAPABILITY = (9, 0)


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
    limit: Callable[[ConvolutionShape], str] = lambda shape: ""
    capability: tuple[int, int] | None = None

    def load(self) -> ConvolutionCandidate:
        return self

    def obstacle(self, device: torch.device, dtype: torch.dtype, shapes: ConvolutionShape) -> str:
        none = "it is an operation of the backends cuda and emulated, and this model's backend has none"
        why = (self.mismatch(device, dtype) or self._limit(device, shapes)) if self.devices else none
        everywhere = ("enlarged", "phases") if self.enlarges else ("conv3d", "three-products")
        return why and f"{why}; choose {' or '.join(name for name in everywhere if name != self.name)}"

    def _limit(self, device: torch.device, shape: ConvolutionShape) -> str:
        if limit := self.limit(shape):
            return f"{limit}, and this is {shape}"
        if self.capability is None or device.type != "cuda":
            return ""
        found = torch.cuda.get_device_capability(device)
        needed, there = (f"{major}.{minor}" for major, minor in (self.capability, found))
        return "" if found == self.capability else f"it needs compute capability {needed}, this GPU has {there}"


def causal_limit(shape: ConvolutionShape) -> str:
    """Say why ``causal_conv`` cannot compute a shape, or ""."""
    return "" if shape.kernel[1:] in ((1, 1), (3, 3)) else "it takes kernels of 1x1 and 3x3 pixels"


def hopper_limit(shape: ConvolutionShape) -> str:
    """Say why ``causal_conv_hopper`` cannot compute a shape, or ""."""
    if shape.kernel[1:] != (3, 3):
        return "it takes kernels of 3x3 pixels"
    whole = shape.channels % DEPTH == 0 and shape.out_channels % COLUMNS == 0
    return "" if whole else f"it takes multiples of {DEPTH} channels and makes multiples of {COLUMNS}"


def subpixel_limit(shape: ConvolutionShape) -> str:
    """Say why :func:`subpixel_weights` is not for a shape, or ""."""
    return "" if shape.kernel == (1, 3, 3) else "it takes kernels of 1x3x3"


def tiled(weight: Tensor) -> Tensor:
    """Lay out ``weight [Co, C, kT, 3, 3]`` for :func:`echo_rt.ops.reference.causal_conv_hopper`."""
    taps: Tensor = weight.flatten(3).unflatten(1, (-1, DEPTH // CHUNK, CHUNK)).unflatten(0, (-1, COLUMNS))
    return taps.permute(0, 5, 2, 6, 3, 1, 4).contiguous()


def _kernel(ops: Ops, name: str, lay_out: Callable[[Tensor], Tensor], *unused: None) -> Callable[[Tensor], Prepared]:
    """A kernel of ours: the weight is laid out once, and one launch computes all frames of a new output.

    ``unused``: the operation's arguments between weight and output.
    """

    def prepare(weight: Tensor) -> Prepared:
        laid_out, out_channels, past = lay_out(weight), len(weight), weight.shape[2] - 1
        launch, scale = getattr(ops, name), 2 if name == "upsample_conv" else 1

        def call(frames: Tensor, /) -> Tensor:
            count, height, width, _ = frames.shape
            out = frames.new_empty(count - past, scale * height, scale * width, out_channels)
            launch(frames, laid_out, *unused, out)
            return out

        return call

    return prepare


def implementations(ops: Ops | None = None) -> tuple[ConvolutionCandidate, ...]:
    """Return all candidates, torch's first; the kernels are those of the backend of ``ops``."""
    # The torch backend's operations are definitions, not fast; torch's fast convolutions are candidates above.
    ops = ops or load_ops("torch")
    devices = {"torch": (), "cuda": ("cuda",)}.get(ops.name, ("cpu",))
    facts: dict[str, Any] = {"devices": devices, "dtypes": HALF, "build": ops.name if devices else None}
    causal = _kernel(
        ops, "causal_conv", lambda weight: weight.contiguous(memory_format=torch.channels_last_3d), None, None
    )
    hopper = _kernel(ops, "causal_conv_hopper", tiled)
    upsample = _kernel(ops, "upsample_conv", lambda weight: subpixel_weights(weight.squeeze(2)), None)
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
