"""Video to latents: the causal encoder of Wan's VAE.

The first frame becomes the first latent, every group of ``temporal_stride`` frames after it one more. A video is
encoded group by group, so the memory it takes does not grow with its length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from echo_rt.config import VaeConfig
from echo_rt.errors import ConfigError
from echo_rt.model.vae_layers import (
    CausalConv,
    Middle,
    NormConv,
    ResidualBlock,
    Terms,
    VaeWeights,
    spatial_conv,
)
from echo_rt.model.vae_windows import StreamWindows, Windows, WindowSize
from echo_rt.ops.backends import load_ops
from echo_rt.weights.shapes import vae_encoder_shapes

_OWNER = "vae encoder"
_COLOURS = 3


class VaeEncoder:
    """The encoder; it always runs on the plain torch operations, being no part of generation.

    ``tensors``: the VAE's weights under their original names; others among them are ignored. Raises
    :class:`WeightsError` for a missing or misshapen tensor.
    """

    def __init__(
        self,
        config: VaeConfig,
        tensors: Mapping[str, Tensor],
        *,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        weights = VaeWeights(tensors, vae_encoder_shapes(config), _OWNER, device=torch.device(device), dtype=dtype)
        ops = load_ops("torch")
        self.config = config
        self._weights = weights
        self._latents_mean = torch.tensor(config.latents_mean, device=weights.device, dtype=torch.float32)
        self._latents_std = torch.tensor(config.latents_std, device=weights.device, dtype=torch.float32)
        # Of mean and log-variance only the mean, the first half of the rows, is of interest.
        pack_weight, pack_bias = weights.pointwise("conv1", torch.float32)
        self._pack = pack_weight[: config.z_dim], pack_bias[: config.z_dim]
        self._input = CausalConv("encoder.conv1", weights)
        self._levels: list[tuple[list[ResidualBlock], Downsample | None]] = []
        index = 0
        for _ in config.dim_mult:
            blocks = [
                ResidualBlock(f"encoder.downsamples.{index + n}", weights, ops) for n in range(config.num_res_blocks)
            ]
            index += len(blocks)
            name = f"encoder.downsamples.{index}"
            downsample = Downsample(name, weights) if f"{name}.resample.1.weight" in weights else None
            index += downsample is not None
            self._levels.append((blocks, downsample))
        self._middle = Middle("encoder.middle", weights, ops)
        self._head = NormConv("encoder.head.0", "encoder.head.2", weights, ops)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Normalized mean latents ``[T, z, h, w]``, float32, of ``video [F, 3, H, W]`` in [-1, 1].

        F is 1 + ``temporal_stride``·k and gives T = 1 + k; H and W are multiples of ``spatial_stride``; anything else
        raises :class:`ConfigError`.
        """
        group, stride = self.config.temporal_stride, self.config.spatial_stride
        if video.dim() != 4 or len(video) < 1 or video.shape[1] != _COLOURS:
            raise ConfigError(f"{_OWNER}: expected a video [F >= 1, {_COLOURS}, H, W], got {list(video.shape)}")
        frames, _, height, width = video.shape
        if (frames - 1) % group:
            raise ConfigError(f"{_OWNER}: expected 1 + {group}*k video frames, got {frames}")
        if height % stride or width % stride or not height or not width:
            raise ConfigError(f"{_OWNER}: expected height and width in multiples of {stride}, got {height} and {width}")
        windows = self._new_windows(height, width)
        latents = torch.empty(
            1 + (frames - 1) // group,
            self.config.z_dim,
            height // stride,
            width // stride,
            device=self._weights.device,
            dtype=torch.float32,
        )
        latents[0] = self._encode_group(video[:1], windows, is_start=True)
        for index in range(1, len(latents)):
            start = 1 + (index - 1) * group
            latents[index] = self._encode_group(video[start : start + group], windows, is_start=False)
        return latents

    def _new_windows(self, height: int, width: int) -> StreamWindows:
        sizes: list[WindowSize] = []
        frames = self.config.temporal_stride

        def add(convs: Sequence[CausalConv]) -> None:
            for conv in convs:
                sizes.append(WindowSize(conv.name, conv.past, frames, height, height, width, conv.channels))

        add([self._input])
        for blocks, downsample in self._levels:
            for block in blocks:
                add(block.convs)
            if downsample is not None:
                height, width = height // 2, width // 2
                add(downsample.convs)
                frames //= downsample.rate
        add([*self._middle.convs, self._head.conv])
        return StreamWindows(sizes, device=self._weights.device, dtype=self._weights.dtype)

    def _encode_group(self, video: Tensor, windows: Windows, *, is_start: bool) -> Tensor:
        """One latent ``[z, h, w]`` of the first frame, or of one group of frames."""
        x = self._input.of(video.permute(0, 2, 3, 1), windows)
        for blocks, downsample in self._levels:
            for block in blocks:
                x = block(x, windows)
            if downsample is not None:
                x = downsample(x, windows, is_start)
        x = self._head(self._middle(x, windows), windows, keep=False)
        mean = functional.linear(x.total().float(), *self._pack)
        return ((mean - self._latents_mean) / self._latents_std).squeeze(0).permute(2, 0, 1)


class Downsample:
    """Halves height and width; with a ``time_conv`` also the frames.

    The first frame of a video passes the ``time_conv`` by, but is the past that the next one finds.
    """

    def __init__(self, name: str, weights: VaeWeights) -> None:
        has_time = f"{name}.time_conv.weight" in weights
        self._time = CausalConv(f"{name}.time_conv", weights, stride=2) if has_time else None
        self._space = weights.convolution(f"{name}.resample.1")

    @property
    def rate(self) -> int:
        """Frames in for each frame out, after a video's first."""
        return 1 if self._time is None else self._time.stride

    @property
    def convs(self) -> list[CausalConv]:
        return [] if self._time is None else [self._time]

    def __call__(self, terms: Terms, windows: Windows, is_start: bool) -> Terms:
        padded = functional.pad(terms.total(), (0, 0, 0, 1, 0, 1))  # one column on the right, one row at the bottom
        x = spatial_conv(padded, *self._space, stride=2)
        if self._time is None:
            return x
        if not is_start:
            return self._time.of(x.total(), windows)
        first = x.total()
        window = windows.open(self._time.name, len(first))
        window.write(first)
        windows.close(self._time.name, window)
        return Terms(first)
