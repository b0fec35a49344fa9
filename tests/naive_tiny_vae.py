"""TAEHV's decoder as plainly as it can be written: a whole video at once, ``[T, C, H, W]``, float64, no state.

Written from the published definition: a flat list of layers, of which the numbered ones have weights. A block sees each
frame beside the one before it (zeros before the first), and of what all latents decode to the first three frames are
left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

# What stands at each place of the published list.
LEVEL = ("block", "block", "block", "enlarge", "grow", "conv")
LAYERS = ("clamp", "conv", "relu", *LEVEL, *LEVEL, *LEVEL, "relu", "conv")
RELEASED_WIDTHS, RELEASED_GROWTH = (256, 128, 64, 64), (1, 2, 2)


def random_decoder(
    z_dim: int, widths: Sequence[int], growth: Sequence[int] = RELEASED_GROWTH, seed: int = 0
) -> dict[str, Tensor]:
    """A file's tensors under their published names and in their published shapes, scaled by their fan-in."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}

    def conv(name: str, out: int, channels: int, size: int = 3, bias: bool = True) -> None:
        spread = 1 / math.sqrt(channels * size * size)
        tensors[f"{name}.weight"] = spread * torch.randn(out, channels, size, size, generator=generator)
        if bias:
            tensors[f"{name}.bias"] = 0.1 * torch.randn(out, generator=generator)

    def blocks(first: int, width: int) -> None:
        for index in range(first, first + 3):
            conv(f"decoder.{index}.conv.0", width, 2 * width)
            conv(f"decoder.{index}.conv.2", width, width)
            conv(f"decoder.{index}.conv.4", width, width)

    conv("decoder.1", widths[0], z_dim)
    blocks(3, widths[0])
    conv("decoder.7.conv", growth[0] * widths[0], widths[0], size=1, bias=False)
    conv("decoder.8", widths[1], widths[0], bias=False)
    blocks(9, widths[1])
    conv("decoder.13.conv", growth[1] * widths[1], widths[1], size=1, bias=False)
    conv("decoder.14", widths[2], widths[1], bias=False)
    blocks(15, widths[2])
    conv("decoder.19.conv", growth[2] * widths[2], widths[2], size=1, bias=False)
    conv("decoder.20", widths[3], widths[2], bias=False)
    conv("decoder.22", 3, widths[3])
    return tensors


def naive_decode(tensors: dict[str, Tensor], latents: Tensor) -> Tensor:
    """All the latents ``[T, z, h, w]`` of a stream as video ``[F, 3, H, W]``, nominally in [0, 1], not clamped."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}

    def conv(x: Tensor, name: str) -> Tensor:
        weight = weights[f"{name}.weight"]
        return functional.conv2d(x, weight, weights.get(f"{name}.bias"), padding=weight.shape[-1] // 2)

    x = latents.double()
    grown = 1
    for place, layer in enumerate(LAYERS):
        name = f"decoder.{place}"
        if layer == "clamp":
            x = 3 * torch.tanh(x / 3)
        elif layer == "relu":
            x = x.clamp_min(0)
        elif layer == "conv":
            x = conv(x, name)
        elif layer == "enlarge":
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        elif layer == "grow":
            channels = x.shape[1]
            x = conv(x, f"{name}.conv")
            growth = x.shape[1] // channels
            x = torch.cat([part for frame in x.split(1) for part in frame.chunk(growth, dim=1)])
            grown *= growth
        else:
            before = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
            inner = conv(torch.cat([x, before], dim=1), f"{name}.conv.0").clamp_min(0)
            inner = conv(inner, f"{name}.conv.2").clamp_min(0)
            x = (conv(inner, f"{name}.conv.4") + x).clamp_min(0)
    return x[grown - 1 :]
