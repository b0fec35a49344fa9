"""The project's own convolutions, as the operations of a backend offer them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from echo_rt.convolution.hopper import tiled
from echo_rt.convolution.phases import phase_weights
from echo_rt.convolution.prepared import Prepared
from echo_rt.convolution.shapes import ConvolutionShape
from echo_rt.ops.schema import Ops

NO_KERNEL = "it is an operation of the backends cuda and emulated, and this model's backend has none"


@dataclass(frozen=True)
class Kernels:
    """``causal_conv`` and ``upsample_conv`` of a backend, or None where it has no kernels."""

    ops: Ops | None

    @classmethod
    def of(cls, ops: Ops | None) -> Kernels:
        """Those of ``ops``. The torch backend's are definitions: what torch does fast is a kind of its own."""
        return cls(None if ops is None or ops.name == "torch" else ops)

    @property
    def backend(self) -> str | None:
        """The backend's name."""
        return None if self.ops is None else self.ops.name

    @property
    def devices(self) -> tuple[str, ...]:
        """The types of device it runs on; none without kernels."""
        return {None: (), "cuda": ("cuda",)}.get(self.backend, ("cpu",))

    def causal(self, weight: Tensor) -> Prepared:
        """All frames of the kernel in one sum, in one launch."""
        ops = self.ops
        assert ops is not None, "an obstacle"
        laid_out = weight.contiguous(memory_format=torch.channels_last_3d)
        out_channels, past = len(weight), weight.shape[2] - 1

        def call(frames: Tensor, /) -> Tensor:
            count, height, width, _ = frames.shape
            out = frames.new_empty(count - past, height, width, out_channels)
            ops.causal_conv(frames, laid_out, None, None, out)
            return out

        return call

    def causal_hopper(self, weight: Tensor) -> Prepared:
        """The same on the matrix products that Hopper alone has."""
        ops = self.ops
        assert ops is not None, "an obstacle"
        laid_out, out_channels, past = tiled(weight), len(weight), weight.shape[2] - 1

        def call(frames: Tensor, /) -> Tensor:
            count, height, width, _ = frames.shape
            out = frames.new_empty(count - past, height, width, out_channels)
            ops.causal_conv_hopper(frames, laid_out, out)
            return out

        return call

    def enlarging(self, weight: Tensor) -> Prepared:
        """The phases, each written where it belongs, in one launch."""
        ops = self.ops
        assert ops is not None, "an obstacle"
        laid_out, out_channels = phase_weights(weight.squeeze(2)), len(weight)

        def call(frames: Tensor, /) -> Tensor:
            count, height, width, _ = frames.shape
            out = frames.new_empty(count, 2 * height, 2 * width, out_channels)
            ops.upsample_conv(frames, laid_out, None, out)
            return out

        return call


def causal_limit(shape: ConvolutionShape) -> str:
    """What ``causal_conv`` cannot do with a shape, or ""."""
    _, height, width = shape.kernel
    return "" if height == width and height in (1, 3) else "it takes kernels of 1x1 and 3x3 pixels"
