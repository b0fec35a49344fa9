"""The layers of the VAE's encoder and decoder.

Activations are channels-last ``[frames, height, width, channels]``, contiguous. The layer before a causal convolution
writes straight into its window (:mod:`echo_rt.model.vae_windows`). A convolution does not add its bias, nor a residual
block its sum: the next layer does (:class:`Terms`), whose kernel reads the result anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from echo_rt.attention import Attention, AttentionShapes, untried_attention
from echo_rt.convolution import ConvolutionCandidate, ConvolutionShape
from echo_rt.convolution.torch_conv import Prepared, library_convolution, upsample_convolution
from echo_rt.model.vae_windows import Windows
from echo_rt.ops.schema import Ops
from echo_rt.utils.device import placed


class VaeWeights:
    """The VAE's tensors on their device, in the layouts the layers want.

    ``convs``: the convolutions made of them so far, in the order in which they run.
    """

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device | str, dtype: torch.dtype) -> None:
        self._tensors = tensors
        self.device, self.dtype = torch.device(device), dtype
        self.convs: list[Convolution] = []

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def convolution(self, name: str) -> tuple[Tensor, Tensor]:
        """Weight, channels-last, of a 2-D or 3-D convolution, and its bias, which is always float32."""
        weight = self._tensors[f"{name}.weight"].to(self.device, self.dtype)
        layout = torch.channels_last_3d if weight.dim() == 5 else torch.channels_last
        bias = placed(self._tensors[f"{name}.bias"], self.device, torch.float32)
        return weight.contiguous(memory_format=layout), bias

    def pointwise(self, name: str, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Weight ``[out, in]`` and bias of a convolution whose kernel is a single point: a matrix product."""
        weight, bias = self._tensors[f"{name}.weight"], self._tensors[f"{name}.bias"]
        dtype = dtype or self.dtype
        return weight.flatten(1).to(self.device, dtype).contiguous(), bias.to(self.device, dtype)

    def gamma(self, name: str) -> Tensor:
        """Scale of an RMS norm, float32 ``[channels]``."""
        return placed(self._tensors[f"{name}.gamma"].flatten(), self.device, torch.float32)


@dataclass
class Terms:
    """A sum not yet computed: ``x [T, H, W, C]`` plus a float32 ``bias [C]`` plus a ``residual`` like x.

    Each part is released after its last use: at full resolution it takes hundreds of megabytes.
    """

    x: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None

    def total(self) -> Tensor:
        """Compute the sum in place of ``x`` and return it."""
        for term in (self.bias, self.residual):
            if term is not None:
                self.x.add_(term)
        self.formed()
        return self.x

    def formed(self) -> None:
        """Note that ``x`` now holds the sum."""
        self.bias = self.residual = None

    def spent(self) -> None:
        """Release everything: the sum has been used."""
        self.formed()
        self.x = self.x.new_empty(0)


class Convolution:
    """A convolution by torch (``prepare``) until :meth:`use` selects another implementation; the bias is added later.

    That keeps its own form of the weight ``[Co, C, kT, kH, kW]``, mostly a copy in another layout; the original goes.
    """

    stride = 1  # in time
    past = 0  # frames of history
    enlarge = False

    def __init__(self, name: str, weights: VaeWeights, prepare: Callable[[Tensor], Prepared]) -> None:
        self.name = name
        weight, self.bias = weights.convolution(name)
        weight = weight if weight.dim() == 5 else weight.unsqueeze(2)
        self._weight: Tensor | None = weight
        self._convolved = prepare(weight)
        self.out_channels, self.channels, depth, self._rows, columns = weight.shape
        self._kernel = (depth, self._rows, columns)
        weights.convs.append(self)

    @property
    def reach(self) -> int:
        """Rows that the kernel reads above and below a pixel, counted after upsampling."""
        return self._rows // 2

    def shape(self, new: int, height: int, width: int) -> ConvolutionShape:
        """Return the shape of a call with ``new`` new frames of this size, before upsampling."""
        frames, channels = self.past + new, (self.channels, self.out_channels)
        return ConvolutionShape(frames, height, width, *channels, self._kernel, self.enlarge)

    def use(self, candidate: ConvolutionCandidate) -> None:
        """Compute by ``candidate`` from now on. May be called once: it releases the weight."""
        assert self._weight is not None, "an implementation was selected before"
        self._convolved = candidate.prepare(self._weight)
        self._weight = None

    def __call__(self, frames: Tensor) -> Terms:
        """Convolve ``frames [past + T, H, W, C]``, contiguous, to ``[T // stride, H, W, out]``, upsampled or not."""
        return Terms(self._convolved(frames), self.bias)


class CausalConv(Convolution):
    """A 3-D convolution that is causal in time.

    Its history is ``kernel - stride`` frames: 2 for the 3x3x3 ones, 1 for the encoder's temporal downsampling.
    """

    def __init__(self, name: str, weights: VaeWeights, stride: int = 1) -> None:
        super().__init__(name, weights, partial(library_convolution, stride=stride))
        self.stride, self.past = stride, self._kernel[0] - stride

    def of(self, x: Tensor, windows: Windows) -> Terms:
        """Copy the new frames ``x [T, H, W, C]`` into the window, then convolve it."""
        with windows.window(self.name, len(x)) as window:
            window.write(x)
            return self(window.frames)


class UpsampleConv(Convolution):
    """Nearest upsampling by two, then a 2-D convolution, frame by frame."""

    enlarge = True

    def __init__(self, name: str, weights: VaeWeights) -> None:
        super().__init__(name, weights, upsample_convolution)


class NormConv:
    """RMS norm and SiLU, written into the window of a causal convolution, and that convolution."""

    def __init__(self, norm: str, conv: str, weights: VaeWeights, ops: Ops) -> None:
        self._ops = ops
        self._gamma = weights.gamma(norm)
        self.conv = CausalConv(conv, weights)

    def __call__(self, terms: Terms, windows: Windows, *, keep: bool) -> Terms:
        """Apply all three. ``keep``: leave the sum of ``terms`` in its ``x`` for others; else ``terms`` is spent."""
        summed = keep and not (terms.bias is None and terms.residual is None)
        with windows.window(self.conv.name, len(terms.x)) as (frames, history):
            self._ops.rms_silu_window(terms.x, terms.bias, terms.residual, self._gamma, frames, history, summed)
            if keep:
                terms.formed()
            else:
                terms.spent()  # before the convolution asks for memory
            return self.conv(frames)


class ResidualBlock:
    """``x`` (or its 1x1x1 shortcut) plus two norm-SiLU-convolutions of it."""

    def __init__(self, name: str, weights: VaeWeights, ops: Ops) -> None:
        self._first = NormConv(f"{name}.residual.0", f"{name}.residual.2", weights, ops)
        self._second = NormConv(f"{name}.residual.3", f"{name}.residual.6", weights, ops)
        shortcut = f"{name}.shortcut"
        self._shortcut = weights.pointwise(shortcut) if f"{shortcut}.weight" in weights else None

    def __call__(self, terms: Terms, windows: Windows) -> Terms:
        inner = self._first(terms, windows, keep=True)
        x = terms.x
        outer = self._second(inner, windows, keep=False)
        residual = x if self._shortcut is None else functional.linear(x, *self._shortcut)
        return Terms(outer.x, outer.bias, residual)


class FrameAttention:
    """Single-head attention among the pixels of each frame, added to its input; frames do not see each other.

    ``compute`` is an attention that works for any head size, until the selected one replaces it.
    """

    def __init__(self, name: str, weights: VaeWeights) -> None:
        self._gamma = weights.gamma(f"{name}.norm")
        self._qkv = weights.pointwise(f"{name}.to_qkv")
        self._projection = weights.pointwise(f"{name}.proj")
        self.compute: Attention = untried_attention(weights.device)

    def shapes(self, height: int, width: int) -> AttentionShapes:
        """Return the shapes of one call of ``compute``: one frame of this size."""
        pixels = height * width
        return AttentionShapes(queries=pixels, keys=pixels, heads=1, head_dim=self._gamma.numel())

    def __call__(self, terms: Terms) -> Terms:
        x = terms.total()
        frames, height, width, channels = x.shape
        normed = rms_norm(x, self._gamma).view(frames, height * width, channels)
        qkv = functional.linear(normed, *self._qkv).unflatten(-1, (3, 1, channels))
        # Frame by frame: the scores of one frame already take much memory.
        attended = torch.stack([self.compute(*frame.unbind(1)) for frame in qkv])
        return Terms(functional.linear(attended.view(x.shape), *self._projection), residual=x)


class Middle:
    """The stage at the lowest resolution: residual block, attention, residual block."""

    def __init__(self, name: str, weights: VaeWeights, ops: Ops) -> None:
        self._before = ResidualBlock(f"{name}.0", weights, ops)
        self.attention = FrameAttention(f"{name}.1", weights)
        self._after = ResidualBlock(f"{name}.2", weights, ops)

    def __call__(self, terms: Terms, windows: Windows) -> Terms:
        return self._after(self.attention(self._before(terms, windows)), windows)


def rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """``x / max(||x||, 1e-12) * sqrt(C) * gamma`` over the last dimension, computed in float32, in ``x``'s dtype."""
    return (functional.normalize(x.float(), dim=-1) * (math.sqrt(x.shape[-1]) * gamma)).to(x.dtype)
