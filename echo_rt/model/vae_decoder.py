"""Latents to video, a few at a time and for ever: the causal decoder of Wan's VAE and the state of one stream.

Decoding latents one by one, in groups or all at once gives the same video. Sizes, in frames and pixels, for Wan:
the first latent of a stream decodes to one frame, every later one to four.
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
    CausalWindow,
    Middle,
    NormConv,
    ResidualBlock,
    VaeWeights,
    Windows,
    spatial_conv,
)
from echo_rt.ops import Ops
from echo_rt.weights.shapes import vae_decoder_shapes

_OWNER = "vae decoder"


class VaeDecoderState:
    """What the decoder remembers of one stream: a window for each causal convolution, allocated once.

    ``latents_seen`` is the number of latents decoded since the start of the stream. Together with
    :meth:`tensors` it is all that a stream needs to go on bit for bit: copy both into a fresh state of the same size.
    """

    def __init__(self, windows: Windows, latent_shape: tuple[int, int, int], max_latents: int) -> None:
        self.windows = windows
        self.latent_shape = latent_shape
        self.max_latents = max_latents
        self.latents_seen = 0

    def tensors(self) -> dict[str, Tensor]:
        """The remembered frames ``[2, H, W, C]`` of each convolution, by its name in the weights; live views."""
        return {name: window.history for name, window in self.windows.items()}

    def reset(self) -> None:
        """Back to the start of a stream, in place."""
        for window in self.windows.values():
            window.history.zero_()
        self.latents_seen = 0


class VaeDecoder:
    """The decoder; it has no state of its own, so one decoder serves any number of streams.

    ``tensors``: the VAE's weights under their original names; others among them are ignored. ``ops``: the operations
    of a backend. Raises :class:`WeightsError` for a missing or misshapen tensor.
    """

    def __init__(
        self,
        config: VaeConfig,
        tensors: Mapping[str, Tensor],
        ops: Ops,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        weights = VaeWeights(tensors, vae_decoder_shapes(config), _OWNER, device=torch.device(device), dtype=dtype)
        self.config = config
        self._weights = weights
        # Latents are a handful of channels: what touches them alone stays float32.
        self._latents_mean = torch.tensor(config.latents_mean, device=weights.device, dtype=torch.float32)
        self._latents_std = torch.tensor(config.latents_std, device=weights.device, dtype=torch.float32)
        self._unpack = weights.pointwise("conv2", torch.float32)
        self._input = CausalConv("decoder.conv1", weights)
        self._middle = Middle("decoder.middle", weights, ops)
        self._levels: list[tuple[list[ResidualBlock], Upsample | None]] = []
        index = 0
        for _ in config.dim_mult:
            blocks = [
                ResidualBlock(f"decoder.upsamples.{index + n}", weights, ops) for n in range(config.num_res_blocks + 1)
            ]
            index += len(blocks)
            name = f"decoder.upsamples.{index}"
            upsample = Upsample(name, weights) if f"{name}.resample.1.weight" in weights else None
            index += upsample is not None
            self._levels.append((blocks, upsample))
        self._head = NormConv("decoder.head.0", "decoder.head.2", weights, ops)

    def new_state(self, latent_height: int, latent_width: int, max_latents: int) -> VaeDecoderState:
        """The state of a new stream of latents of this size, which decodes up to ``max_latents`` in one go.

        Every convolution has a window of ``max_latents``' worth of frames at its own resolution.
        """
        for name, value in (("height", latent_height), ("width", latent_width), ("max_latents", max_latents)):
            if value < 1:
                raise ConfigError(f"{_OWNER}: expected {name} of latents to be at least 1, got {value}")
        windows: dict[str, CausalWindow] = {}
        height, width, frames = latent_height, latent_width, max_latents

        def add(convs: Sequence[CausalConv]) -> None:
            for conv in convs:
                windows[conv.name] = CausalWindow(conv.past, frames, height, width, conv.channels, self._weights)

        # A stream may be decoded with or without inference mode; tensors born inside it could not be written outside.
        with torch.inference_mode(False):
            add([self._input, *self._middle.convs])
            for blocks, upsample in self._levels:
                for block in blocks:
                    add(block.convs)
                if upsample is not None:
                    add(upsample.convs)
                    height, width, frames = 2 * height, 2 * width, upsample.rate * frames
            add([self._head.conv])
        return VaeDecoderState(windows, (self.config.z_dim, latent_height, latent_width), max_latents)

    @torch.no_grad()
    def decode(self, latents: Tensor, state: VaeDecoderState) -> Tensor:
        """The next ``latents [T, z, h, w]`` of a stream (normalized, any float dtype) as video ``[F, H, W, 3]``.

        The video has the decoder's dtype, is nominally in [-1, 1] and is not clamped. For Wan F is 4T, or 1 + 4(T-1)
        at the start of a stream. More than ``max_latents`` are decoded in slices. Raises :class:`ConfigError` for
        latents that are not of the state's size.
        """
        if latents.dim() != 4 or len(latents) < 1 or latents.shape[1:] != state.latent_shape:
            expected = ", ".join(str(size) for size in state.latent_shape)
            raise ConfigError(
                f"{_OWNER}: expected latents [T >= 1, {expected}] (channels, height, width), got {list(latents.shape)}"
            )
        video = self.decode_next(latents, state.windows, state.max_latents, is_start=state.latents_seen == 0)
        state.latents_seen += len(latents)
        return video

    def decode_next(self, latents: Tensor, windows: Windows, max_latents: int, *, is_start: bool) -> Tensor:
        """:meth:`decode` without its checks and its count: all that it asks of the host are its arguments."""
        if len(latents) <= max_latents:
            return self._decode_slice(latents, windows, is_start)
        before = 0 if is_start else 1  # any later place in a stream has as many frames as the second
        frames = self.config.video_frames(before + len(latents)) - self.config.video_frames(before)
        stride = self.config.spatial_stride
        _, _, height, width = latents.shape
        device, dtype = self._weights.device, self._weights.dtype
        video = torch.empty(frames, height * stride, width * stride, 3, device=device, dtype=dtype)
        done = 0
        for first in range(0, len(latents), max_latents):
            decoded = self._decode_slice(latents[first : first + max_latents], windows, is_start and first == 0)
            video[done : done + len(decoded)] = decoded
            done += len(decoded)
        return video

    def _decode_slice(self, latents: Tensor, windows: Windows, is_start: bool) -> Tensor:
        """At most ``max_latents`` latents."""
        z = latents.to(self._weights.device, torch.float32).permute(0, 2, 3, 1)
        z = functional.linear(z * self._latents_std + self._latents_mean, *self._unpack)
        window = windows[self._input.name]
        window.write(z)
        x = self._input(window, len(z))
        x = self._middle(x, windows)
        for blocks, upsample in self._levels:
            for block in blocks:
                x = block(x, windows)
            if upsample is not None:
                x = upsample(x, windows, is_start)
        return self._head(x, windows)


class Upsample:
    """Doubles height and width, halves the channels; with a ``time_conv`` also doubles the frames.

    The frame of a stream's first latent passes the ``time_conv`` by and leaves no trace in its window, so the second
    one finds zeros for a past.
    """

    def __init__(self, name: str, weights: VaeWeights) -> None:
        has_time = f"{name}.time_conv.weight" in weights
        self._time = CausalConv(f"{name}.time_conv", weights) if has_time else None
        self._space = weights.convolution(f"{name}.resample.1")

    @property
    def rate(self) -> int:
        """Frames out for each frame in, after a stream's first."""
        return 1 if self._time is None else 2

    @property
    def convs(self) -> list[CausalConv]:
        return [] if self._time is None else [self._time]

    def __call__(self, x: Tensor, windows: Windows, is_start: bool) -> Tensor:
        frames, height, width, channels = x.shape
        single = frames if self._time is None else int(is_start)
        grown = x.new_empty(single + self.rate * (frames - single), 2 * height, 2 * width, channels)
        if single:
            _enlarge(x[:single, None], grown[:single])
        if self._time is not None and frames > single:
            window = windows[self._time.name]
            window.write(x[single:])
            # The first half of the channels is the earlier frame of a pair.
            pairs = self._time(window, frames - single).view(frames - single, height, width, self.rate, channels)
            _enlarge(pairs.permute(0, 3, 1, 2, 4), grown[single:])
        return spatial_conv(grown, *self._space, padding=1)


def _enlarge(source: Tensor, out: Tensor) -> None:
    """``source [T, n, H, W, C]``, every pixel doubled each way, into ``out [T*n, 2H, 2W, C]`` in one copy."""
    frames, group, height, width, channels = source.shape
    pixels = out.view(frames, group, height, 2, width, 2, channels)
    pixels.copy_(source[:, :, :, None, :, None, :].expand_as(pixels))
