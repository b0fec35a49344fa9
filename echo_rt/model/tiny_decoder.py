"""A tiny decoder for previews: 2-D convolutions that read each frame together with the one before it.

The state of a stream is one frame per block. Activations are channels-last ``[frames, height, width, channels]``,
contiguous.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from echo_rt.config import VaeConfig
from echo_rt.model.decoder_protocol import DecoderState, VideoDecoder, latents_statistics
from echo_rt.weights.tiny_vae import STEM, TinyVaeConfig, level_names

_LIMIT = 3.0  # latents are bent towards it, on either side

Past = Mapping[str, Tensor]  # the last input frame ``[H, W, C]`` of each block


class TinyDecoder(VideoDecoder[DecoderState]):
    """The decoder.

    ``tensors``: all of :func:`echo_rt.weights.tiny_vae.tiny_decoder_shapes`. ``like``: the VAE whose latents these are.
    """

    owner = "tiny decoder"

    def __init__(
        self,
        config: TinyVaeConfig,
        tensors: Mapping[str, Tensor],
        like: VaeConfig,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        weights = _Weights(tensors, torch.device(device), dtype)
        self.config = config
        self._weights = weights
        # Latents are a handful of channels: what touches them alone stays float32.
        self._statistics = None if config.normalized else latents_statistics(like, weights.device)
        self._stem = weights.convolution(STEM)
        self._levels = [_Level(level, weights) for level in range(len(config.growth))]
        # The file's colours are in [0, 1], a video's here in [-1, 1].
        self._head = weights.convolution(config.head, scale=2.0, shift=-1.0)

    def new_state(self, latent_height: int, latent_width: int, latents: int) -> DecoderState:
        device, dtype = self._weights.device, self._weights.dtype

        def zeros(level: int, channels: int) -> Tensor:
            return torch.zeros(latent_height << level, latent_width << level, channels, device=device, dtype=dtype)

        # A stream may be decoded with or without inference mode; tensors born inside it could not be written outside.
        with torch.inference_mode(False):
            past = {
                block.name: zeros(level.index, width)
                for level, width in zip(self._levels, self.config.widths, strict=False)
                for block in level.blocks
            }
        return DecoderState(past, (self.config.z_dim, latent_height, latent_width), latents)

    def decode_next(self, latents: Tensor, state: DecoderState, *, is_start: bool) -> Tensor:
        z = latents.to(self._weights.device, torch.float32).permute(0, 2, 3, 1)
        if self._statistics is not None:
            mean, std = self._statistics
            z = z * std + mean
        z = torch.tanh(z / _LIMIT) * _LIMIT
        x = _conv(z.to(self._weights.dtype).contiguous(), *self._stem).relu_()
        *coarse, finest = self._levels
        past = state.tensors()
        for level in coarse:
            x = level.enlarged(level.remembering(x, past))
        x = finest.remembering(x, past)
        return self._video(finest, x, skipped=self.config.temporal_stride - 1 if is_start else 0)

    def _video(self, finest: _Level, x: Tensor, skipped: int) -> Tensor:
        """Return the frames of the finest level as video, without the first ``skipped``.

        Frame by frame, as memory counts at full size; there is no state from here on.
        """
        _, height, width, _ = x.shape
        video = x.new_empty(len(x) * finest.growth - skipped, 2 * height, 2 * width, 3)
        done = 0
        for index in range(skipped // finest.growth, len(x)):
            large = finest.enlarged(x[index : index + 1], skipped=max(0, skipped - index * finest.growth))
            video[done : done + len(large)] = _conv(large.relu_(), *self._head)
            done += len(large)
        return video


class _Weights:
    """The tensors of a file, on their device, in the layouts that the layers want."""

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> None:
        self._tensors = tensors
        self.device, self.dtype = device, dtype

    def convolution(self, name: str, scale: float = 1.0, shift: float = 0.0) -> tuple[Tensor, Tensor]:
        """Weight, channels-last, and bias of a convolution whose output is multiplied and shifted."""
        bias = self._tensors[f"{name}.bias"].float() * scale + shift
        return self.kernel(name, scale), bias.to(self.device, self.dtype)

    def kernel(self, name: str, scale: float = 1.0) -> Tensor:
        """The weight of a convolution, channels-last."""
        weight = self._tensors[f"{name}.weight"].float() * scale
        return weight.to(self.device, self.dtype).contiguous(memory_format=torch.channels_last)


class _Block:
    """Three convolutions of each frame and the one before it, added to the frame."""

    def __init__(self, name: str, weights: _Weights) -> None:
        self.name = name
        self._convs = [weights.convolution(f"{name}.conv.{layer}") for layer in (0, 2, 4)]

    def __call__(self, x: Tensor, past: Tensor) -> Tensor:
        frames, height, width, channels = x.shape
        pairs = x.new_empty(frames, height, width, 2 * channels)
        pairs[..., :channels] = x
        pairs[0, ..., channels:] = past
        pairs[1:, ..., channels:] = x[:-1]
        past.copy_(x[-1])
        first, second, third = self._convs
        out = _conv(_conv(_conv(pairs, *first).relu_(), *second).relu_(), *third)
        return out.add_(x).relu_()


class _Level:
    """One resolution: its blocks, and the upsampling to the next."""

    def __init__(self, index: int, weights: _Weights) -> None:
        self.index = index
        blocks, growth, outlet = level_names(index)
        self.blocks = [_Block(name, weights) for name in blocks]
        self._growth = weights.kernel(growth).flatten(1).contiguous()
        self._outlet = weights.kernel(outlet)

    @property
    def growth(self) -> int:
        """Output frames per input frame."""
        rows, channels = self._growth.shape
        return rows // channels

    def remembering(self, x: Tensor, past: Past) -> Tensor:
        """Apply the blocks to ``x [T, H, W, C]`` and advance their state by T frames."""
        for block in self.blocks:
            x = block(x, past[block.name])
        return x

    def enlarged(self, x: Tensor, skipped: int = 0) -> Tensor:
        """Upsample ``x [T, H, W, C]`` to ``[T * growth - skipped, 2H, 2W, C']``.

        The published code upsamples in space first. The other order gives the same pixels for a quarter of the work.
        """
        frames, height, width, channels = x.shape
        grown = functional.linear(x, self._growth).view(frames, height, 1, width, 1, self.growth, channels)
        large = x.new_empty(frames, self.growth, height, 2, width, 2, channels)
        large.copy_(grown.permute(0, 5, 1, 2, 3, 4, 6).expand_as(large))
        return _conv(large.view(frames * self.growth, 2 * height, 2 * width, channels)[skipped:], self._outlet)


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve each frame, keeping its size."""
    out = functional.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2)
    return out.permute(0, 2, 3, 1).contiguous()
