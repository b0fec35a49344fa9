"""The project's own convolution, as the operations of a backend offer it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from echo_rt.convolution.prepared import Prepared
from echo_rt.convolution.shapes import ConvolutionShape
from echo_rt.ops import Ops

NO_KERNEL = "it is an operation of the backends cuda and emulated, and this model's backend has none"


@dataclass(frozen=True)
class Kernel:
    """``causal_conv`` of a backend, or nothing: then ``devices`` is empty."""

    op: Callable[..., Tensor] | None
    backend: str | None

    @classmethod
    def of(cls, ops: Ops | None) -> Kernel:
        """What ``ops`` offers. The torch backend's is a definition, that of torch a better one of its speed."""
        if ops is None or ops.name == "torch":
            return cls(None, None)
        op = getattr(ops, "causal_conv", None)
        return cls(op, None if op is None else ops.name)

    @property
    def devices(self) -> tuple[str, ...]:
        if self.op is None:
            return ()
        return ("cuda",) if self.backend == "cuda" else ("cpu",)

    def limit(self, shape: ConvolutionShape) -> str:
        return ""

    def prepare(self, weight: Tensor, bias: Tensor) -> Prepared:
        op = self.op
        assert op is not None, "asked for where there is an obstacle"
        laid_out = weight.contiguous()

        def call(frames: Tensor, residual: Tensor | None = None, /) -> Tensor:
            return op(frames, laid_out, bias, residual)

        return call
