"""The project's own convolutions, as the operations of a backend offer them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from echo_rt.convolution.enlarging import phase_weights
from echo_rt.convolution.prepared import Prepared
from echo_rt.convolution.shapes import ConvolutionShape
from echo_rt.ops import Ops

NO_KERNEL = "it is an operation of the backends cuda and emulated, and this model's backend has none"


@dataclass(frozen=True)
class Kernels:
    """``causal_conv`` and ``upsample_conv`` of a backend; where it has none, ``devices`` is empty."""

    backend: str | None = None
    causal_conv: Callable[..., None] | None = None
    upsample_conv: Callable[..., None] | None = None

    @classmethod
    def of(cls, ops: Ops | None) -> Kernels:
        """Those of ``ops``. The torch backend's are definitions: what torch does fast is a kind of its own."""
        causal_conv, upsample_conv = (getattr(ops, name, None) for name in ("causal_conv", "upsample_conv"))
        if ops is None or ops.name == "torch" or causal_conv is None or upsample_conv is None:
            return cls()
        return cls(ops.name, causal_conv, upsample_conv)

    @property
    def devices(self) -> tuple[str, ...]:
        """The types of device it runs on."""
        return {None: (), "cuda": ("cuda",)}.get(self.backend, ("cpu",))

    def causal(self, weight: Tensor) -> Prepared:
        """All frames of the kernel in one sum, in one launch."""
        op = self.causal_conv
        assert op is not None, "an obstacle"
        laid_out = weight.contiguous(memory_format=torch.channels_last_3d)
        out_channels, past = len(weight), weight.shape[2] - 1
        no_bias = weight.new_zeros(out_channels)

        def call(frames: Tensor, /) -> Tensor:
            count, height, width, _ = frames.shape
            out = frames.new_empty(count - past, height, width, out_channels)
            op(frames, laid_out, no_bias, None, out)
            return out

        return call

    def enlarging(self, weight: Tensor) -> Prepared:
        """One launch: phases that are written where they belong."""
        op = self.upsample_conv
        assert op is not None, "an obstacle"
        laid_out = torch.stack(phase_weights(weight)).permute(0, 1, 3, 4, 2).contiguous()
        out_channels = len(weight)
        no_bias = weight.new_zeros(out_channels)

        def call(frames: Tensor, /) -> Tensor:
            count, height, width, _ = frames.shape
            out = frames.new_empty(count, 2 * height, 2 * width, out_channels)
            op(frames, laid_out, no_bias, out)
            return out

        return call


def causal_limit(shape: ConvolutionShape) -> str:
    """What ``causal_conv`` cannot do with a shape, or ""."""
    _, height, width = shape.kernel
    return "" if height == width and height in (1, 3) else "it takes kernels of 1x1 and 3x3 pixels"
