"""The causal decoder of Wan's VAE: latents to video, in a stream without end.

Latents decoded one by one, in groups or all at once give the same video. In Wan the first latent of a stream decodes to
one frame, every later one to four.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from echo_rt.attention import Attention, AttentionShapes
from echo_rt.config import VaeConfig
from echo_rt.convolution import ConvolutionCandidate, ConvolutionShape
from echo_rt.errors import ConfigError
from echo_rt.model.vae_decoder_state import DecodingPlan, LevelShape, VaeDecoderState, plan_decoding
from echo_rt.model.vae_layers import CausalConv, Middle, NormConv, ResidualBlock, Terms, UpsampleConv, VaeWeights
from echo_rt.model.vae_windows import Rows, Windows
from echo_rt.ops.schema import Ops
from echo_rt.weights.shapes import vae_decoder_shapes

_OWNER = "vae decoder"


class VaeDecoder:
    """The decoder. It holds no state of a stream, so one decoder serves any number of streams.

    ``tensors``: the VAE's weights under their original names; others are ignored. ``ops``: a backend's operations.
    ``tiles``: number of horizontal tiles for the two highest resolutions, for GPUs with little memory. Raises
    :class:`WeightsError` for a missing or misshapen tensor.

    ``levels`` are the resolutions from lowest to highest; ``head`` turns the output of the last into RGB.
    """

    def __init__(
        self,
        config: VaeConfig,
        tensors: Mapping[str, Tensor],
        ops: Ops,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        tiles: int = 1,
    ) -> None:
        weights = VaeWeights(tensors, vae_decoder_shapes(config), _OWNER, device=torch.device(device), dtype=dtype)
        self.config, self.tiles = config, tiles
        self.device, self.dtype = weights.device, dtype
        # Latents are a handful of channels: what touches them alone stays float32.
        self._latents_mean = torch.tensor(config.latents_mean, device=weights.device, dtype=torch.float32)
        self._latents_std = torch.tensor(config.latents_std, device=weights.device, dtype=torch.float32)
        # float64: a process can have its float32 products rounded to TF32, for a decoder of 16 bits too.
        self._unpack = weights.pointwise("conv2", torch.float64)
        self._input = CausalConv("decoder.conv1", weights)
        self._middle = Middle("decoder.middle", weights, ops)
        self.levels: list[Level] = []
        index = 0
        upsample: Upsample | None = None
        for _ in config.dim_mult:
            blocks = [
                ResidualBlock(f"decoder.upsamples.{index + n}", weights, ops) for n in range(config.num_res_blocks + 1)
            ]
            self.levels.append(Level(upsample, blocks))
            index += len(blocks)
            name = f"decoder.upsamples.{index}"
            upsample = Upsample(name, weights) if f"{name}.resample.1.weight" in weights else None
            index += upsample is not None
        self.head = NormConv("decoder.head.0", "decoder.head.2", weights, ops)

    def new_state(
        self, latent_height: int, latent_width: int, latents: int, *, frames_at_full: int | None = None
    ) -> VaeDecoderState:
        """Return the state of a new stream of latents of this size, decoded at most ``latents`` at a time.

        ``frames_at_full``: frames of full resolution computed at once; None for those of one latent, or for one frame
        where the decoder has ``tiles``. The frames that one frame is upsampled to in time are never split.
        """
        plan = self._plan(latent_height, latent_width, latents, frames_at_full)
        return plan.new_state(device=self.device, dtype=self.dtype)

    def convolution_shapes(self, latent_height: int, latent_width: int, latents: int) -> dict[str, ConvolutionShape]:
        """Return the shape of each convolution, by its name in the weights, in the steady state of a stream."""
        return dict(self._plan(latent_height, latent_width, latents, None).convolutions)

    def attention_shapes(self, latent_height: int, latent_width: int) -> AttentionShapes:
        """Return the shapes of the attention among the pixels of a frame, for latents of this size."""
        return self._middle.attention.shapes(latent_height, latent_width)

    def attend_by(self, attention: Attention) -> None:
        """Compute the attention among the pixels of a frame by ``attention`` from now on."""
        self._middle.attention.compute = attention

    def use(self, candidates: Mapping[str, ConvolutionCandidate]) -> None:
        """Compute each convolution by the candidate under its name from now on. May be called once."""
        for level in self._shapes():
            for convolution in level.convolutions:
                convolution.use(candidates[convolution.name])
        self.head.conv.use(candidates[self.head.conv.name])

    def _shapes(self) -> list[LevelShape]:
        lowest, *others = (level.shape for level in self.levels)
        entry = [self._input, *self._middle.convs]
        return [LevelShape(entry, lowest.convs, lowest.upsample, lowest.rate), *others]

    def _plan(self, latent_height: int, latent_width: int, latents: int, frames_at_full: int | None) -> DecodingPlan:
        if frames_at_full is None:
            frames_at_full = self.config.temporal_stride if self.tiles == 1 else 1
        for name, value in (
            ("height of latents", latent_height),
            ("width of latents", latent_width),
            ("latents", latents),
            ("frames_at_full", frames_at_full),
            ("tiles", self.tiles),
        ):
            if value < 1:
                raise ConfigError(f"{_OWNER}: expected {name} to be at least 1, got {value}")
        return plan_decoding(
            self._shapes(),
            self.head.conv,
            (self.config.z_dim, latent_height, latent_width),
            latents,
            frames_at_full=frames_at_full,
            tiles=self.tiles,
        )

    @torch.no_grad()
    def decode(self, latents: Tensor, state: VaeDecoderState) -> Tensor:
        """Decode the next ``latents [T, z, h, w]`` of a stream (normalized, any float dtype) to video ``[F, H, W, 3]``.

        The video has the decoder's dtype, is nominally in [-1, 1] and is not clamped. For Wan F is 4T, or 1 + 4(T-1)
        at the start of a stream. T may be any number. Raises :class:`ConfigError` for latents of another size than the
        state's.
        """
        if latents.dim() != 4 or len(latents) < 1 or latents.shape[1:] != state.latent_shape:
            expected = ", ".join(str(size) for size in state.latent_shape)
            raise ConfigError(
                f"{_OWNER}: expected latents [T >= 1, {expected}] (channels, height, width), got {list(latents.shape)}"
            )
        video = self.decode_next(latents, state, is_start=state.latents_seen == 0)
        state.latents_seen += len(latents)
        return video

    def decode_next(self, latents: Tensor, state: VaeDecoderState, *, is_start: bool) -> Tensor:
        """Decode as :meth:`decode` does, without its checks and its count, so that it can be captured in a graph."""
        before = 0 if is_start else 1  # any later place in a stream has as many frames as the second
        frames = self.config.video_frames(before + len(latents)) - self.config.video_frames(before)
        stride = self.config.spatial_stride
        _, _, height, width = latents.shape
        video = torch.empty(frames, height * stride, width * stride, 3, device=self.device, dtype=self.dtype)
        z = latents.to(self.device, torch.float32).permute(0, 2, 3, 1)
        z = functional.linear((z * self._latents_std + self._latents_mean).double(), *self._unpack).float()
        self._from_level(0, z, state, is_start, video)
        return video

    def enter(self, z: Tensor, windows: Windows) -> Terms:
        """Compute the input of the lowest level from denormalized latents ``z [T, h, w, z_dim]``."""
        return self._middle(self._input.of(z, windows), windows)

    def _from_level(self, index: int, x: Tensor, state: VaeDecoderState, is_start: bool, video: Tensor) -> int:
        """Decode ``x``, the input of a level, into the front of ``video``; return the number of frames.

        Each level takes at most its own number of frames at once.
        """
        done = 0
        most = state.frames_at_once[index]
        for first in range(0, len(x), most):
            part, is_first = x[first : first + most], is_start and first == 0
            if state.bands is not None and index == state.bands.first:
                done += self._in_bands(part, state, is_first, video[done:])
                continue
            terms = Terms(part) if index > 0 else self.enter(part, state.windows)
            terms = self.levels[index](terms, state.windows, is_first)
            if index + 1 < len(self.levels):
                done += self._from_level(index + 1, terms.total(), state, is_first, video[done:])
                continue
            frames = self.head(terms, state.windows, keep=False).total()
            video[done : done + len(frames)].copy_(frames)
            done += len(frames)
        return done

    def _in_bands(self, x: Tensor, state: VaeDecoderState, is_start: bool, video: Tensor) -> int:
        """Decode as :meth:`_from_level` does from the first tiled level on, one band of rows after the other."""
        assert state.bands is not None
        frames = 0
        for entered in state.bands.bands:
            terms, seen = Terms(x), Rows.around(0, x.shape[1], 0, x.shape[1])
            for level, rows in zip(self.levels[state.bands.first :], entered, strict=False):
                windows = state.band_windows(rows)
                terms = level(Terms(terms.total()[:, rows.part_of(seen)].contiguous()), windows, is_start)
                seen = rows.upsampled()
            rows = entered[-1]
            part = terms.total()[:, rows.part_of(seen)].contiguous()
            picture = self.head(Terms(part), state.band_windows(rows), keep=False).total()
            frames = len(picture)
            video[:frames, rows.begin : rows.end].copy_(picture[:, rows.wanted])
        return frames


class Level:
    """One resolution: upsampling, except at the lowest, and residual blocks."""

    def __init__(self, upsample: Upsample | None, blocks: list[ResidualBlock]) -> None:
        self.upsample, self.blocks = upsample, blocks

    @property
    def shape(self) -> LevelShape:
        convs = [conv for block in self.blocks for conv in block.convs]
        if self.upsample is None:
            return LevelShape([], convs, upsample=None, rate=1)
        return LevelShape(self.upsample.convs, convs, upsample=self.upsample.space, rate=self.upsample.rate)

    def __call__(self, terms: Terms, windows: Windows, is_start: bool) -> Terms:
        if self.upsample is not None:
            terms = self.upsample(terms.total(), windows, is_start)
            windows = windows.upsampled()
        for block in self.blocks:
            terms = block(terms, windows)
        return terms


class Upsample:
    """Doubles height and width and halves the channels; with a ``time_conv`` it also doubles the frames.

    The first frame of a stream skips the ``time_conv`` and its window, so the second one finds a history of zeros.
    """

    def __init__(self, name: str, weights: VaeWeights) -> None:
        has_time = f"{name}.time_conv.weight" in weights
        self._time = CausalConv(f"{name}.time_conv", weights) if has_time else None
        self.space = UpsampleConv(f"{name}.resample.1", weights)

    @property
    def rate(self) -> int:
        """Output frames per input frame, after the first of a stream."""
        return 1 if self._time is None else 2

    @property
    def convs(self) -> list[CausalConv]:
        return [] if self._time is None else [self._time]

    def __call__(self, x: Tensor, windows: Windows, is_start: bool) -> Terms:
        frames, height, width, channels = x.shape
        single = int(is_start)
        if self._time is None or frames == single:
            return self.space(x)
        doubled = frames - single
        small = x.new_empty(single + self.rate * doubled, height, width, channels)
        small[:single].copy_(x[:single])
        made = self._time.of(x[single:], windows)
        # The first half of the channels is the earlier frame of a pair.
        pairs = made.x.view(doubled, height, width, self.rate, channels).permute(0, 3, 1, 2, 4)
        bias = self._time.bias.view(self.rate, 1, 1, channels)
        torch.add(pairs, bias, out=small[single:].view(doubled, self.rate, height, width, channels))
        del made, pairs  # before the upsampled frames are allocated
        return self.space(small)
