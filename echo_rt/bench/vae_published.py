"""The decoder as it is published, in eager torch: what most people run, and what ours is measured beside.

One latent at a time, activations ``[1, C, T, H, W]`` contiguous. Each convolution that looks back keeps clones of its
last two input frames in a cache, puts them before the new ones and pads all of it with zeros; the picture is enlarged
in float32. Written anew from what it does, so that every pass over memory that it makes is there, and none more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from echo_rt.config import VaeConfig
from echo_rt.weights.shapes import vae_decoder_shapes

Cache = dict[str, Tensor]
# Takes the activation and the cache, and whether this is a stream's first latent.
StageCall = Callable[[Tensor, Cache, bool], Tensor]

_PAST = 2


class PublishedDecoder:
    """``stages``: one function for each resolution, from the lowest, and one for the head; ``cache`` is a stream's."""

    def __init__(
        self, config: VaeConfig, tensors: Mapping[str, Tensor], *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._weights = {name: tensors[name].to(device, dtype).contiguous() for name in vae_decoder_shapes(config)}
        self._mean, self._std = (
            torch.tensor(values, device=device).view(-1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        self._dtype = dtype
        self.cache: Cache = {}
        self.stages: list[StageCall] = [self._lowest(config)]
        index = config.num_res_blocks + 1
        for _ in config.dim_mult[1:]:
            names = [f"decoder.upsamples.{index + 1 + n}" for n in range(config.num_res_blocks + 1)]
            self.stages.append(self._higher(f"decoder.upsamples.{index}", names))
            index += 1 + len(names)
        self.stages.append(self._head)

    def decode(self, latents: Tensor, *, is_start: bool) -> Tensor:
        """The next normalized ``latents [T, z, h, w]`` of the stream as ``[1, 3, F, H, W]``."""
        z = (latents.transpose(0, 1) * self._std + self._mean)[None].to(self._dtype)
        z = functional.conv3d(z, self._weights["conv2.weight"], self._weights["conv2.bias"])
        video: Tensor | None = None
        for place in range(z.shape[2]):
            x = z[:, :, place : place + 1]
            for stage in self.stages:
                x = stage(x, self.cache, is_start and place == 0)
            video = x if video is None else torch.cat([video, x], 2)
        assert video is not None
        return video

    @property
    def state_bytes(self) -> int:
        """Of the frames that are remembered."""
        return sum(tensor.nbytes for tensor in self.cache.values())

    def _lowest(self, config: VaeConfig) -> StageCall:
        def stage(x: Tensor, cache: Cache, is_start: bool) -> Tensor:
            x = self._residual(self._causal(x, "decoder.conv1", cache), "decoder.middle.0", cache)
            x = self._residual(self._attention(x, "decoder.middle.1"), "decoder.middle.2", cache)
            for n in range(config.num_res_blocks + 1):
                x = self._residual(x, f"decoder.upsamples.{n}", cache)
            return x

        return stage

    def _higher(self, upsample: str, blocks: list[str]) -> StageCall:
        def stage(x: Tensor, cache: Cache, is_start: bool) -> Tensor:
            x = self._upsample(x, upsample, cache, is_start)
            for name in blocks:
                x = self._residual(x, name, cache)
            return x

        return stage

    def _head(self, x: Tensor, cache: Cache, is_start: bool) -> Tensor:
        return self._causal(functional.silu(self._norm(x, "decoder.head.0")), "decoder.head.2", cache)

    def _causal(self, x: Tensor, name: str, cache: Cache) -> Tensor:
        weight = self._weights[f"{name}.weight"]
        remembered = x[:, :, -_PAST:].clone()
        before = cache.get(name)
        if remembered.shape[2] < _PAST:
            older = torch.zeros_like(remembered) if before is None else before[:, :, -1:]
            remembered = torch.cat([older, remembered], 2)
        rows, columns = (size // 2 for size in weight.shape[3:])
        if before is not None:
            x = torch.cat([before, x], 2)
        x = functional.pad(x, (columns, columns, rows, rows, 0 if before is not None else _PAST, 0))
        cache[name] = remembered
        return functional.conv3d(x, weight, self._weights[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        gamma = self._weights[f"{name}.gamma"].flatten()
        return functional.normalize(x, dim=1) * math.sqrt(len(gamma)) * gamma.view(-1, *[1] * (x.dim() - 2))

    def _residual(self, x: Tensor, name: str, cache: Cache) -> Tensor:
        shortcut = self._weights.get(f"{name}.shortcut.weight")
        kept = x if shortcut is None else functional.conv3d(x, shortcut, self._weights[f"{name}.shortcut.bias"])
        x = functional.silu(self._norm(x, f"{name}.residual.0"))
        x = self._causal(x, f"{name}.residual.2", cache)
        x = functional.silu(self._norm(x, f"{name}.residual.3"))
        return self._causal(x, f"{name}.residual.6", cache) + kept

    def _attention(self, x: Tensor, name: str) -> Tensor:
        _, channels, frames, height, width = x.shape
        pictures = self._pictures(x)
        qkv = functional.conv2d(
            self._norm(pictures, f"{name}.norm"), self._weights[f"{name}.to_qkv.weight"], self._bias(f"{name}.to_qkv")
        )
        q, k, v = qkv.reshape(frames, 1, 3 * channels, -1).permute(0, 1, 3, 2).contiguous().chunk(3, dim=-1)
        attended = functional.scaled_dot_product_attention(q, k, v)
        attended = attended.squeeze(1).permute(0, 2, 1).reshape(frames, channels, height, width)
        attended = functional.conv2d(attended, self._weights[f"{name}.proj.weight"], self._bias(f"{name}.proj"))
        return attended.view(1, frames, channels, height, width).permute(0, 2, 1, 3, 4) + x

    def _upsample(self, x: Tensor, name: str, cache: Cache, is_start: bool) -> Tensor:
        _, channels, frames, height, width = x.shape
        if f"{name}.time_conv.weight" in self._weights and not is_start:
            pairs = self._causal(x, f"{name}.time_conv", cache).reshape(1, 2, channels, frames, height, width)
            x = torch.stack((pairs[:, 0], pairs[:, 1]), 3).reshape(1, channels, 2 * frames, height, width)
        pictures = functional.interpolate(self._pictures(x).float(), scale_factor=2.0, mode="nearest-exact").type_as(x)
        convolved = functional.conv2d(
            pictures, self._weights[f"{name}.resample.1.weight"], self._bias(f"{name}.resample.1"), padding=1
        )
        frames, channels, height, width = convolved.shape
        return convolved.view(1, frames, channels, height, width).permute(0, 2, 1, 3, 4)

    def _bias(self, name: str) -> Tensor:
        return self._weights[f"{name}.bias"]

    def _pictures(self, x: Tensor) -> Tensor:
        """``[1, C, T, H, W]`` as ``[T, C, H, W]``, as contiguous as it comes to be that way."""
        _, channels, frames, height, width = x.shape
        return x.permute(0, 2, 1, 3, 4).reshape(frames, channels, height, width)
