"""The decoder's convolutions straight from their definition, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from echo_rt.convolution import ConvolutionShape


def naive(frames: Tensor, weight: Tensor, shape: ConvolutionShape) -> Tensor:
    """``[frames, H, W, C]`` -> ``[T, H', W', Co]``, by torch's conv3d of the whole."""
    video = frames.double().permute(3, 0, 1, 2)[None]
    if shape.enlarge:
        video = video.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
    padding = (0, shape.kernel[1] // 2, shape.kernel[2] // 2)
    out = torch.nn.functional.conv3d(video, weight.double(), padding=padding)
    return out[0].permute(1, 2, 3, 0)


def inputs(shape: ConvolutionShape, dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
    """Frames and weight."""
    generator = torch.Generator(device).manual_seed(shape.frames * 1000 + shape.width)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    frames = normal(shape.frames, shape.height, shape.width, shape.channels)
    weight = normal(shape.out_channels, shape.channels, *shape.kernel)
    scale = (shape.channels * weight[0, 0].numel()) ** -0.5
    return frames.to(dtype), (weight * scale).to(dtype)
