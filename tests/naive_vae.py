"""Wan's VAE as plainly as it can be written: a whole video at once, ``[C, T, H, W]``, float64, history by zero padding.

It has no state, no windows and no layouts; the golden bundle pins it down, and it pins down the rest.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from echo_rt.config import VaeConfig
from echo_rt.weights.shapes import Shapes


class Bundle:
    """The golden VAE bundle; videos ``[F, 3, H, W]`` as stored."""

    def __init__(self, folder: Path) -> None:
        self.config = VaeConfig.from_flat(json.loads((folder / "config.json").read_text()))
        self.weights = load_file(folder / "weights.safetensors")
        self.inputs = load_file(folder / "inputs.safetensors")
        self.expected = load_file(folder / "expected.safetensors")


def tiny_config(**options: object) -> VaeConfig:
    """A VAE of few channels, with statistics that are not Wan's."""
    return VaeConfig(base_dim=8, z_dim=3, latents_mean=(0.1, -0.2, 0.3), latents_std=(1.5, 0.5, 2.0), **options)


def random_weights(shapes: Shapes) -> dict[str, Tensor]:
    """Weights that keep activations near 1, so that an error anywhere shows in the end."""
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        weights[name] = 1 + 0.1 * noise if name.endswith("gamma") else noise / math.sqrt(max(math.prod(shape[1:]), 4))
    return weights


class NaiveVae:
    """Encoder and decoder, as far as ``weights`` has them."""

    def __init__(self, config: VaeConfig, weights: dict[str, Tensor]) -> None:
        self.config = config
        self.weights = {name: tensor.double() for name, tensor in weights.items()}
        self.mean = torch.tensor(config.latents_mean, dtype=torch.float64)[:, None, None]
        self.std = torch.tensor(config.latents_std, dtype=torch.float64)[:, None, None]

    def decode(self, latents: Tensor) -> Tensor:
        """All the latents ``[T, z, h, w]`` of a stream as video ``[F, 3, H, W]``."""
        x = (latents.double() * self.std + self.mean).transpose(0, 1)
        x = self._middle(self._conv(self._conv(x, "conv2"), "decoder.conv1"), "decoder.middle")
        for name in self._stages("decoder.upsamples"):
            x = self._upsample(x, name) if f"{name}.resample.1.weight" in self.weights else self._residual(x, name)
        return self._head(x, "decoder.head").transpose(0, 1)

    def encode(self, video: Tensor) -> Tensor:
        """A whole video ``[F, 3, H, W]`` as normalized latents ``[T, z, h, w]``."""
        x = self._conv(video.double().transpose(0, 1), "encoder.conv1")
        for name in self._stages("encoder.downsamples"):
            x = self._downsample(x, name) if f"{name}.resample.1.weight" in self.weights else self._residual(x, name)
        x = self._conv(self._head(self._middle(x, "encoder.middle"), "encoder.head"), "conv1")
        return (x[: self.config.z_dim].transpose(0, 1) - self.mean) / self.std

    def _stages(self, prefix: str) -> list[str]:
        depth = prefix.count(".") + 1
        indices = {int(name.split(".")[depth]) for name in self.weights if name.startswith(f"{prefix}.")}
        return [f"{prefix}.{index}" for index in sorted(indices)]

    def _conv(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        time, rows, columns = weight.shape[2:]
        padded = functional.pad(x, (columns // 2, columns // 2, rows // 2, rows // 2, time - 1, 0))
        return functional.conv3d(padded[None], weight, bias)[0]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return functional.normalize(x, dim=0) * math.sqrt(len(x)) * self.weights[f"{name}.gamma"].reshape(-1, 1, 1, 1)

    def _head(self, x: Tensor, name: str) -> Tensor:
        return self._conv(functional.silu(self._norm(x, f"{name}.0")), f"{name}.2")

    def _residual(self, x: Tensor, name: str) -> Tensor:
        hidden = self._conv(functional.silu(self._norm(x, f"{name}.residual.0")), f"{name}.residual.2")
        hidden = self._conv(functional.silu(self._norm(hidden, f"{name}.residual.3")), f"{name}.residual.6")
        return hidden + (self._conv(x, f"{name}.shortcut") if f"{name}.shortcut.weight" in self.weights else x)

    def _middle(self, x: Tensor, name: str) -> Tensor:
        return self._residual(self._attention(self._residual(x, f"{name}.0"), f"{name}.1"), f"{name}.2")

    def _attention(self, x: Tensor, name: str) -> Tensor:
        def project(frame: Tensor, part: str) -> Tensor:
            return self.weights[f"{part}.weight"][..., 0, 0] @ frame + self.weights[f"{part}.bias"][:, None]

        frames = []
        for frame in self._norm(x, f"{name}.norm").flatten(2).unbind(1):
            q, k, v = project(frame, f"{name}.to_qkv").chunk(3)
            frames.append(project(v @ torch.softmax(q.T @ k / math.sqrt(len(q)), dim=-1).T, f"{name}.proj"))
        return x + torch.stack(frames, dim=1).reshape(x.shape)

    def _resample(self, x: Tensor, name: str, **options: int) -> Tensor:
        weight, bias = self.weights[f"{name}.resample.1.weight"], self.weights[f"{name}.resample.1.bias"]
        return functional.conv2d(x.transpose(0, 1), weight, bias, **options).transpose(0, 1)

    def _upsample(self, x: Tensor, name: str) -> Tensor:
        if f"{name}.time_conv.weight" in self.weights and x.shape[1] > 1:
            earlier, later = self._conv(x[:, 1:], f"{name}.time_conv").chunk(2)
            x = torch.cat([x[:, :1], torch.stack([earlier, later], dim=2).flatten(1, 2)], dim=1)
        return self._resample(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3), name, padding=1)

    def _downsample(self, x: Tensor, name: str) -> Tensor:
        x = self._resample(functional.pad(x, (0, 1, 0, 1)), name, stride=2)
        if f"{name}.time_conv.weight" not in self.weights or x.shape[1] == 1:
            return x
        weight, bias = self.weights[f"{name}.time_conv.weight"], self.weights[f"{name}.time_conv.bias"]
        return torch.cat([x[:, :1], functional.conv3d(x[None], weight, bias, stride=(2, 1, 1))[0]], dim=1)
