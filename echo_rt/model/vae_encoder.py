"""Video to latents: the causal encoder of Wan's VAE.

The first frame becomes the first latent, every group of ``temporal_stride`` frames after it one more. A video is
encoded group by group, in as many calls as one likes, so the memory it takes does not grow with its length.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from echo_rt.config import VaeConfig
from echo_rt.convolution.torch_conv import convolve
from echo_rt.errors import ConfigError
from echo_rt.model.decoder_protocol import latents_statistics
from echo_rt.model.vae_layers import CausalConv, Convolution, Middle, NormConv, ResidualBlock, Terms, VaeWeights
from echo_rt.model.vae_windows import Windows, WindowSize
from echo_rt.ops.backends import load_ops

_OWNER = "vae encoder"
_COLOURS = 3


@dataclass
class VaeEncoderState:
    """What the encoder remembers of one video of frames ``height`` x ``width``; ``latents_made``: so far."""

    windows: Windows
    height: int
    width: int
    latents_made: int = 0


class VaeEncoder:
    """The encoder; it always runs on the plain torch operations, being no part of generation.

    ``tensors``: the VAE's weights under their original names, of the shapes that ``config`` says; others are ignored.
    """

    def __init__(
        self,
        config: VaeConfig,
        tensors: Mapping[str, Tensor],
        *,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        weights = VaeWeights(tensors, device, dtype)
        ops = load_ops("torch")
        self.config = config
        self._weights = weights
        self._latents_mean, self._latents_std = latents_statistics(config, weights.device)
        # Of mean and log-variance only the mean, the first half of the rows, is of interest.
        pack_weight, pack_bias = weights.pointwise("conv1", torch.float32)
        self._pack = pack_weight[: config.z_dim], pack_bias[: config.z_dim]
        self._input = CausalConv("encoder.conv1", weights)
        # Each convolution, how often height and width are halved before it, and its most new frames.
        self._sized: list[tuple[Convolution, int, int]] = []
        frames = config.temporal_stride

        def note(level: int) -> None:
            nonlocal frames
            for conv in weights.convs[len(self._sized) :]:
                self._sized.append((conv, level, frames))
                frames //= conv.stride

        self._levels: list[tuple[Downsample | None, list[ResidualBlock]]] = []
        names = (f"encoder.downsamples.{part}" for part in itertools.count())
        for level in range(len(config.dim_mult)):
            downsample = Downsample(next(names), weights) if level > 0 else None
            blocks = [ResidualBlock(next(names), weights, ops) for _ in range(config.num_res_blocks)]
            self._levels.append((downsample, blocks))
            note(level)
        self._middle = Middle("encoder.middle", weights, ops)
        self._head = NormConv("encoder.head.0", "encoder.head.2", weights, ops)
        note(level)

    def new_state(self, height: int, width: int) -> VaeEncoderState:
        """The state of a new video of frames of this size, in multiples of ``spatial_stride`` pixels."""
        stride = self.config.spatial_stride
        if height % stride or width % stride or not height or not width:
            raise ConfigError(f"{_OWNER}: expected height and width in multiples of {stride}, got {height} and {width}")
        sizes = {
            conv.name: WindowSize(conv.past, height >> level, conv.shape(frames, height >> level, width >> level))
            for conv, level, frames in self._sized
        }
        windows = Windows(sizes, device=self._weights.device, dtype=self._weights.dtype)
        return VaeEncoderState(windows, height, width)

    def encode(self, video: Tensor) -> Tensor:
        """Normalized mean latents ``[T, z, h, w]``, float32, of a whole ``video [F, 3, H, W]`` in [-1, 1].

        F is 1 + ``temporal_stride``·k and gives T = 1 + k; H and W are multiples of ``spatial_stride``; anything else
        raises :class:`ConfigError`.
        """
        if video.dim() != 4:
            raise ConfigError(f"{_OWNER}: expected a video [F >= 1, {_COLOURS}, H, W], got {list(video.shape)}")
        return self.encode_next(video, self.new_state(*video.shape[2:]))

    @torch.no_grad()
    def encode_next(self, video: Tensor, state: VaeEncoderState) -> Tensor:
        """:meth:`encode` of the next frames of the video that ``state`` is of, in whole groups.

        In which pieces a video comes does not show in its latents. After its first piece, of 1 + ``temporal_stride``·k
        frames, each has ``temporal_stride``·k.
        """
        group = self.config.temporal_stride
        size = (_COLOURS, state.height, state.width)
        if video.dim() != 4 or len(video) < 1 or video.shape[1:] != size:
            raise ConfigError(
                f"{_OWNER}: expected a video [F >= 1, {', '.join(map(str, size))}], got {list(video.shape)}"
            )
        first = int(state.latents_made == 0)  # frames that are a latent of their own
        if (len(video) - first) % group:
            raise ConfigError(f"{_OWNER}: expected {'1 + ' * first}{group}*k video frames, got {len(video)}")
        latents = []
        for piece in [video[:first]] * first + [video[at : at + group] for at in range(first, len(video), group)]:
            latents.append(self._encode_group(piece, state.windows, is_start=state.latents_made == 0))
            state.latents_made += 1
        return torch.stack(latents)

    def _encode_group(self, video: Tensor, windows: Windows, *, is_start: bool) -> Tensor:
        """One latent ``[z, h, w]`` of the first frame, or of one group of frames."""
        x = self._input.of(video.permute(0, 2, 3, 1), windows)
        for downsample, blocks in self._levels:
            if downsample is not None:
                x = downsample(x, windows, is_start)
            for block in blocks:
                x = block(x, windows)
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

    def __call__(self, terms: Terms, windows: Windows, is_start: bool) -> Terms:
        padded = functional.pad(terms.total(), (0, 0, 0, 1, 0, 1))  # one column on the right, one row at the bottom
        weight, bias = self._space
        out = convolve(padded.permute(0, 3, 1, 2), weight, (0, 0), stride=(2, 2))
        x = Terms(out.permute(0, 2, 3, 1).contiguous(), bias)
        if self._time is None:
            return x
        if not is_start:
            return self._time.of(x.total(), windows)
        first = x.total()
        with windows.window(self._time.name, len(first)) as window:
            window.write(first)
        return Terms(first)
