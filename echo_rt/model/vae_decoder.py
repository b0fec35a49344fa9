"""Latents to video, a few at a time and for ever: the causal decoder of Wan's VAE.

Decoding latents one by one, in groups or all at once gives the same video. Sizes, in frames and pixels, for Wan:
the first latent of a stream decodes to one frame, every later one to four.
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
from echo_rt.model.vae_layers import CausalConv, EnlargingConv, Middle, NormConv, ResidualBlock, Terms, VaeWeights
from echo_rt.model.vae_windows import Rows, Windows
from echo_rt.ops.schema import Ops
from echo_rt.weights.shapes import vae_decoder_shapes

_OWNER = "vae decoder"


class VaeDecoder:
    """The decoder; it has no state of its own, so one decoder serves any number of streams.

    ``tensors``: the VAE's weights under their original names; others among them are ignored. ``ops``: the operations
    of a backend. ``tiles``: in how many bands of rows its streams decode the two highest resolutions, for GPUs with
    little memory. Raises :class:`WeightsError` for a missing or misshapen tensor.

    ``levels`` are the resolutions from the lowest to the highest, ``head`` is what makes pictures of the last one.
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
        """The state of a new stream of latents of this size, of which up to ``latents`` are decoded in one go.

        ``frames_at_full``: how many frames of full resolution are worked on at once; None for those of one latent, or
        a single one where the decoder has ``tiles``. What one frame becomes on its way is not taken apart, however.
        """
        plan = self._plan(latent_height, latent_width, latents, frames_at_full)
        return plan.new_state(device=self.device, dtype=self.dtype)

    def convolution_shapes(self, latent_height: int, latent_width: int, latents: int) -> dict[str, ConvolutionShape]:
        """Of each convolution, by its name in the weights, in the steady state of a stream of :meth:`new_state`."""
        return dict(self._plan(latent_height, latent_width, latents, None).convolutions)

    def attention_shapes(self, latent_height: int, latent_width: int) -> AttentionShapes:
        """Of the attention among the pixels of a frame, in a stream of latents of this size."""
        return self._middle.attention.shapes(latent_height, latent_width)

    def attend_by(self, attention: Attention) -> None:
        """From now on the pixels of a frame attend to each other by ``attention``."""
        self._middle.attention.compute = attention

    def use(self, candidates: Mapping[str, ConvolutionCandidate]) -> None:
        """From now on each convolution is computed by the candidate under its name. Once: it is all that they keep."""
        for level in self._shapes():
            for convolution in level.convolutions:
                convolution.use(candidates[convolution.name])
        self.head.conv.use(candidates[self.head.conv.name])

    def _shapes(self) -> list[LevelShape]:
        lowest, *others = (level.shape for level in self.levels)
        entry = [self._input, *self._middle.convs]
        return [LevelShape(entry, lowest.convs, lowest.enlarging, lowest.rate), *others]

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
        """The next ``latents [T, z, h, w]`` of a stream (normalized, any float dtype) as video ``[F, H, W, 3]``.

        The video has the decoder's dtype, is nominally in [-1, 1] and is not clamped. For Wan F is 4T, or 1 + 4(T-1)
        at the start of a stream. Any number of latents may come. Raises :class:`ConfigError` for latents that are not
        of the state's size.
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
        """:meth:`decode` without its checks and its count: all that it asks of the host are its arguments."""
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
        """What the lowest level is given, of de-normalized latents ``z [T, h, w, z_dim]``."""
        return self._middle(self._input.of(z, windows), windows)

    def _from_level(self, index: int, x: Tensor, state: VaeDecoderState, is_start: bool, video: Tensor) -> int:
        """Takes ``x``, the input of a level, to the picture, as many frames at once as the level takes.

        They are written to the front of ``video``; gives how many there are.
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
        """The same from the first level of the bands on, a band of rows after the other."""
        assert state.bands is not None
        frames = 0
        for entered in state.bands.bands:
            terms, seen = Terms(x), Rows.around(0, x.shape[1], 0, x.shape[1])
            for level, rows in zip(self.levels[state.bands.first :], entered, strict=False):
                windows = state.band_windows(rows)
                terms = level(Terms(terms.total()[:, rows.part_of(seen)].contiguous()), windows, is_start)
                seen = rows.enlarged()
            rows = entered[-1]
            part = terms.total()[:, rows.part_of(seen)].contiguous()
            picture = self.head(Terms(part), state.band_windows(rows), keep=False).total()
            frames = len(picture)
            video[:frames, rows.begin : rows.end].copy_(picture[:, rows.wanted])
        return frames


class Level:
    """One resolution: where it is not the lowest, pictures are enlarged to it first; then come residual blocks."""

    def __init__(self, upsample: Upsample | None, blocks: list[ResidualBlock]) -> None:
        self.upsample, self.blocks = upsample, blocks

    @property
    def shape(self) -> LevelShape:
        convs = [conv for block in self.blocks for conv in block.convs]
        if self.upsample is None:
            return LevelShape([], convs, enlarging=None, rate=1)
        return LevelShape(self.upsample.convs, convs, enlarging=self.upsample.space, rate=self.upsample.rate)

    def __call__(self, terms: Terms, windows: Windows, is_start: bool) -> Terms:
        if self.upsample is not None:
            terms = self.upsample(terms.total(), windows, is_start)
            windows = windows.enlarged()
        for block in self.blocks:
            terms = block(terms, windows)
        return terms


class Upsample:
    """Doubles height and width, halves the channels; with a ``time_conv`` also doubles the frames.

    The frame of a stream's first latent passes the ``time_conv`` by and leaves no trace in its window, so the second
    one finds zeros for a past.
    """

    def __init__(self, name: str, weights: VaeWeights) -> None:
        has_time = f"{name}.time_conv.weight" in weights
        self._time = CausalConv(f"{name}.time_conv", weights) if has_time else None
        self.space = EnlargingConv(f"{name}.resample.1", weights)

    @property
    def rate(self) -> int:
        """Frames out for each frame in, after a stream's first."""
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
        del made, pairs  # before the enlarged frames ask for memory
        return self.space(small)
