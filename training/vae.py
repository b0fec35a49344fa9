"""Wan's VAE as functions that torch can differentiate, with few channels.

Videos are ``[N, C, T, H, W]``. Weights have the names of Wan's file, so the runtime loads what is trained here. Latents
are the world's own: Wan's statistics and the 1x1x1 convolutions that undo them are added when a model is written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from echo_rt.config import VaeConfig
from echo_rt.weights.shapes import Shapes, vae_decoder_shapes, vae_encoder_shapes

CONFIG = VaeConfig(base_dim=8, dim_mult=(1, 2, 4, 8), num_res_blocks=1)

_BLUR = (0.25, 0.5, 0.25)
_BRANCH = 0.1  # how much a residual block adds at first


def decode(weights: Mapping[str, Tensor], latents: Tensor) -> Tensor:
    """Decode whole videos: ``latents [N, z, T, h, w]`` from the start of a stream to ``[N, 3, 1 + 4(T-1), H, W]``."""
    x = _conv(weights, "decoder.conv1", latents)
    x = _residual(weights, "decoder.middle.0", x)
    x = _attention(weights, "decoder.middle.1", x)
    x = _residual(weights, "decoder.middle.2", x)
    for name in _stages(weights, "decoder.upsamples"):
        x = (_upsample if f"{name}.resample.1.weight" in weights else _residual)(weights, name, x)
    return _head(weights, "decoder.head", x)


def encode(weights: Mapping[str, Tensor], video: Tensor) -> Tensor:
    """Encode whole videos: ``[N, 3, 1 + 4(T-1), H, W]`` in [-1, 1] to ``[N, z, T, h, w]``, the mean alone."""
    x = _conv(weights, "encoder.conv1", video)
    for name in _stages(weights, "encoder.downsamples"):
        x = (_downsample if f"{name}.resample.1.weight" in weights else _residual)(weights, name, x)
    for part, block in ((0, _residual), (1, _attention), (2, _residual)):
        x = block(weights, f"encoder.middle.{part}", x)
    return _head(weights, "encoder.head", x)[:, : CONFIG.z_dim]


def _stages(weights: Mapping[str, Tensor], prefix: str) -> list[str]:
    numbers = {int(name.split(".")[2]) for name in weights if name.startswith(f"{prefix}.")}
    return [f"{prefix}.{number}" for number in sorted(numbers)]


def _head(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return _conv(weights, f"{name}.2", functional.silu(_norm(weights[f"{name}.0.gamma"], x)))


def initial_decoder(seed: int = 0) -> dict[str, Tensor]:
    """Draw a decoder that passes its latents through, blurred: training from there starts with a picture."""
    weights = _initial_weights(vae_decoder_shapes(CONFIG), seed)
    # A norm forgets how strong its input is; a channel that is always the same lets the next layer tell.
    weights["decoder.conv1.bias"][-1] = 2.0
    return weights


def initial_encoder(seed: int = 0) -> dict[str, Tensor]:
    """Draw an encoder whose layers pass on what they are given, at half the size."""
    weights = _initial_weights(vae_encoder_shapes(CONFIG), seed)
    weights["encoder.conv1.bias"][-1] = 2.0
    return weights


def _initial_weights(shapes: Shapes, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if name.startswith(("conv1.", "conv2.")):  # the convolutions that undo Wan's statistics
            continue
        if name.endswith("gamma"):
            weights[name] = torch.ones(shape)
        elif name.endswith("bias"):
            weights[name] = torch.zeros(shape)
        else:
            weights[name] = _initial_kernel(name, shape, generator)
    return weights


def _initial_kernel(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    rows, columns = shape[:2]
    noise = torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
    if name.endswith("time_conv.weight") and rows > columns:
        same = torch.eye(columns)[..., None]
        first, second = torch.tensor([0.0, 0.5, 0.5]), torch.tensor([0.0, 0.0, 1.0])
        return torch.cat((same * first, same * second))[..., None, None] + 0.3 * noise
    mix = torch.zeros(rows, columns)
    shared = min(rows, columns)
    mix[:shared, :shared] = torch.eye(shared)
    if rows > shared:
        mix[shared:] = torch.randn(rows - shared, columns, generator=generator) / math.sqrt(columns)
    kernel = torch.ones(())
    for axis, size in enumerate(shape[2:]):
        in_time = len(shape) == 5 and axis == 0
        taps = torch.tensor((0.0, 0.0, 1.0) if in_time else _BLUR) if size == 3 else torch.ones(1)
        kernel = kernel[..., None] * taps
    blurred = mix.view(rows, columns, *(1,) * kernel.dim()) * kernel
    if ".residual." in name or ".proj." in name:
        return (_BRANCH if name.endswith((".residual.6.weight", ".proj.weight")) else 1.0) * noise
    return blurred + 0.2 * noise


def _conv(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    time, rows, columns = weight.shape[2:]
    padded = functional.pad(x, (columns // 2, columns // 2, rows // 2, rows // 2, time - 1, 0))
    return functional.conv3d(padded, weight, bias)


def _norm(gamma: Tensor, x: Tensor) -> Tensor:
    return functional.normalize(x, dim=1) * math.sqrt(x.shape[1]) * gamma.view(1, -1, 1, 1, 1)


def _residual(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    hidden = x
    for norm, conv in ((0, 2), (3, 6)):
        normed = functional.silu(_norm(weights[f"{name}.residual.{norm}.gamma"], hidden))
        hidden = _conv(weights, f"{name}.residual.{conv}", normed)
    shortcut = f"{name}.shortcut"
    return hidden + (_conv(weights, shortcut, x) if f"{shortcut}.weight" in weights else x)


def _attention(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    count, channels, frames, height, width = x.shape
    tokens = _norm(weights[f"{name}.norm.gamma"], x).permute(0, 2, 3, 4, 1).reshape(count * frames, -1, channels)
    qkv = functional.linear(tokens, weights[f"{name}.to_qkv.weight"].flatten(1), weights[f"{name}.to_qkv.bias"])
    q, k, v = qkv.chunk(3, dim=-1)
    attended = functional.scaled_dot_product_attention(q, k, v)
    out = functional.linear(attended, weights[f"{name}.proj.weight"].flatten(1), weights[f"{name}.proj.bias"])
    return x + out.view(count, frames, height, width, channels).permute(0, 4, 1, 2, 3)


def _upsample(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    if f"{name}.time_conv.weight" in weights and x.shape[2] > 1:
        pairs = torch.stack(_conv(weights, f"{name}.time_conv", x[:, :, 1:]).chunk(2, dim=1), dim=3)
        x = torch.cat((x[:, :, :1], pairs.flatten(2, 3)), dim=2)
    count, _, frames, height, width = x.shape
    pictures = functional.interpolate(x.transpose(1, 2).flatten(0, 1), scale_factor=2, mode="nearest")
    weight, bias = weights[f"{name}.resample.1.weight"], weights[f"{name}.resample.1.bias"]
    out = functional.conv2d(pictures, weight, bias, padding=1)
    return out.view(count, frames, -1, 2 * height, 2 * width).transpose(1, 2)


def _downsample(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    count, _, frames, height, width = x.shape
    pictures = functional.pad(x.transpose(1, 2).flatten(0, 1), (0, 1, 0, 1))
    weight, bias = weights[f"{name}.resample.1.weight"], weights[f"{name}.resample.1.bias"]
    out = functional.conv2d(pictures, weight, bias, stride=2)
    x = out.view(count, frames, -1, height // 2, width // 2).transpose(1, 2)
    if f"{name}.time_conv.weight" not in weights or frames == 1:
        return x
    weight, bias = weights[f"{name}.time_conv.weight"], weights[f"{name}.time_conv.bias"]
    return torch.cat((x[:, :, :1], functional.conv3d(x, weight, bias, stride=(2, 1, 1))), dim=2)
