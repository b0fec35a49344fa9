"""The causal decoder of Wan's VAE: latents to video, in a stream without end.

Latents decoded one by one, in groups or all at once give the same video. In Wan the first latent of a stream decodes to
one frame, every later one to four.

The higher the resolution, the fewer frames are computed at once, so memory does not grow with the number of latents per
call, and nothing is computed twice. With tiles, the two highest resolutions are decoded in bands of rows, each with the
rows around it that it depends on (:class:`DecodingPlan`, ``docs/decoder.md``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from echo_rt.config import VaeConfig
from echo_rt.convolution import ConvolutionCandidate, ConvolutionShape
from echo_rt.errors import ConfigError
from echo_rt.model.decoder_protocol import DecoderState, VideoDecoder, latents_statistics
from echo_rt.model.vae_layers import (
    CausalConv,
    Convolution,
    Middle,
    NormConv,
    ResidualBlock,
    Terms,
    UpsampleConv,
    VaeWeights,
)
from echo_rt.model.vae_windows import Rows, Windows, WindowSize
from echo_rt.ops.schema import Ops


@dataclass(frozen=True)
class DecodingPlan:
    """How a stream is decoded: ``windows`` of the causal convolutions, by their names in the weights.

    ``convolutions``: the largest shape of each convolution, upsampling ones among them; ``frames_at_once`` of each
    level. ``bands``: the horizontal bands of the levels from ``first_tiled`` on, empty without tiles: ``bands[b][i]``
    are the rows of band ``b`` at the input of level ``first_tiled + i``; the last entry is the head's.
    """

    windows: Mapping[str, WindowSize]
    convolutions: Mapping[str, ConvolutionShape]
    frames_at_once: tuple[int, ...]
    first_tiled: int
    bands: Sequence[Sequence[Rows]]


class VaeDecoderState(DecoderState):
    """The state of one stream at its start, allocated once: the history ``[past, H, W, C]`` of each convolution."""

    def __init__(
        self, plan: DecodingPlan, windows: Windows, latent_shape: tuple[int, int, int], max_latents: int
    ) -> None:
        super().__init__(windows.histories, latent_shape, max_latents)
        self.plan, self.windows = plan, windows

    def buffers(self) -> dict[str, Tensor]:
        named = {f"history {name}": tensor for name, tensor in self.windows.histories.items()}
        return named | {f"kept {n}": tensor for n, tensor in self.windows.kept.items()} | {"room": self.windows.room}


class VaeDecoder(VideoDecoder[VaeDecoderState]):
    """The decoder.

    ``tensors``: the VAE's weights under their original names, of the shapes that ``config`` says; others are ignored.
    ``tiles``: number of horizontal tiles for the two highest resolutions, for GPUs with little memory.

    ``levels`` are the resolutions from lowest to highest; ``head`` turns the output of the last into RGB; ``attention``
    is that among the pixels of a frame.
    """

    owner = "vae decoder"

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
        weights = VaeWeights(tensors, device, dtype)
        self.config, self.tiles = config, tiles
        self.device, self.dtype = weights.device, dtype
        # Latents are a handful of channels: what touches them alone stays float32.
        self._latents_mean, self._latents_std = latents_statistics(config, weights.device)
        # float64: a process can have its float32 products rounded to TF32, for a decoder of 16 bits too.
        self._unpack = weights.pointwise("conv2", torch.float64)
        self._input = CausalConv("decoder.conv1", weights)
        self._middle = Middle("decoder.middle", weights, ops)
        self.attention = self._middle.attention
        self.levels: list[Level] = []
        names, index = (f"decoder.upsamples.{part}" for part in itertools.count()), 0
        for level in range(len(config.dim_mult)):
            upsample = Upsample(next(names), weights) if level > 0 else None
            blocks = [ResidualBlock(next(names), weights, ops) for _ in range(config.num_res_blocks + 1)]
            self.levels.append(Level(upsample, blocks, weights.convs[index:]))
            index = len(weights.convs)
        self.head = NormConv("decoder.head.0", "decoder.head.2", weights, ops)
        self._convs = weights.convs

    def new_state(
        self, latent_height: int, latent_width: int, latents: int, *, frames_at_full: int | None = None
    ) -> VaeDecoderState:
        """Return the state of a new stream of latents of this size, decoded at most ``latents`` at a time.

        ``frames_at_full``: frames of full resolution computed at once; None for those of one latent, or for one frame
        where the decoder has ``tiles``. The frames that one frame is upsampled to in time are never split.
        """
        plan = self._plan(latent_height, latent_width, latents, frames_at_full)
        windows = Windows(plan.windows, device=self.device, dtype=self.dtype)
        return VaeDecoderState(plan, windows, (self.config.z_dim, latent_height, latent_width), latents)

    def convolution_shapes(self, latent_height: int, latent_width: int, latents: int) -> dict[str, ConvolutionShape]:
        """Return the shape of each convolution, by its name in the weights, in the steady state of a stream."""
        return dict(self._plan(latent_height, latent_width, latents, None).convolutions)

    def use(self, candidates: Mapping[str, ConvolutionCandidate]) -> None:
        """Compute each convolution by the candidate under its name from now on. May be called once."""
        for conv in self._convs:
            conv.use(candidates[conv.name])

    def _plan(self, height: int, width: int, latents: int, frames_at_full: int | None) -> DecodingPlan:
        """Plan the decoding of at most ``latents`` per call; raises :class:`ConfigError` for tiles of too few rows."""
        if frames_at_full is None:
            frames_at_full = self.config.temporal_stride if self.tiles == 1 else 1
        first_tiled, bands = self._bands(height)
        windows: dict[str, WindowSize] = {}
        convolutions: dict[str, ConvolutionShape] = {}
        at_once: list[int] = []
        frames = latents
        stride = self.config.spatial_stride
        # No tensor between two convolutions is larger than those at full resolution.
        numbers_at_once = frames_at_full * (height * stride) * (width * stride) * self.levels[-1].convs[-1].channels

        def add(conv: Convolution, at: Sequence[Rows]) -> None:
            rows, margin = max(r.last - r.first for r in at), max(r.begin - r.first for r in at)
            convolutions[conv.name] = shape = conv.shape(frames, rows, width)
            if not conv.enlarge:
                windows[conv.name] = WindowSize(conv.past, height, shape, margin)

        for index, level in enumerate(self.levels):
            rows = [Rows(0, 0, height, height)]
            if index >= first_tiled:
                rows = [band[index - first_tiled] for band in bands]
            if index <= first_tiled:
                pixels = level.rate * height * width * (4 if index > 0 else 1)
                limit = numbers_at_once // (pixels * level.convs[-1].channels)
                if index == first_tiled:  # frames are not split from here on
                    limit = frames_at_full // math.prod(each.rate for each in self.levels[index:])
                slices = math.ceil(frames / max(1, limit))
                frames = math.ceil(frames / slices)  # slices of equal size
                at_once.append(frames)
            for conv in level.convs:
                if conv.enlarge:
                    frames *= level.rate
                add(conv, rows)
                if conv.enlarge:
                    height, width = 2 * height, 2 * width
                    rows = [each.upsampled() for each in rows]
        add(self.head.conv, [band[-1] for band in bands] or [Rows(0, 0, height, height)])
        return DecodingPlan(windows, convolutions, tuple(at_once), first_tiled, bands)

    def _bands(self, latent_height: int) -> tuple[int, list[list[Rows]]]:
        """Return the first tiled level, of two upsampling ones or of one, and the bands; no level without tiles."""
        levels, tiles = self.levels, self.tiles
        if tiles == 1:
            return len(levels), []
        first = max(1, len(levels) - 2)
        if first == len(levels):
            raise ConfigError(f"vae_tiles: expected 1 for a VAE of one resolution, got {tiles}")
        # From the output back to the first tiled level: the margin of rows that each level needs.
        margins = [self.head.conv.reach]
        for level in reversed(levels[first:]):
            seen = margins[0] + sum(conv.reach for conv in level.convs)
            margins.insert(0, math.ceil(seen / 2))
        height = latent_height << (first - 1)
        most = height // margins[0]
        if tiles > most:
            able = f"1 to {most}" if most > 1 else "1"
            raise ConfigError(f"vae_tiles: expected {able} for latents {latent_height} rows high, got {tiles}")
        bounds = [height * index // tiles for index in range(tiles + 1)]
        return first, [
            [Rows.around(begin << doubled, end << doubled, m, height << doubled) for doubled, m in enumerate(margins)]
            for begin, end in itertools.pairwise(bounds)
        ]

    def decode_next(self, latents: Tensor, state: VaeDecoderState, *, is_start: bool) -> Tensor:
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
        done, plan = 0, state.plan
        for first, part in enumerate(x.split(plan.frames_at_once[index])):
            is_first, rest = is_start and first == 0, video[done:]
            if index == plan.first_tiled:
                done += self._in_bands(part, state, is_first, rest)
                continue
            terms = Terms(part) if index > 0 else self.enter(part, state.windows)
            terms = self.levels[index](terms, state.windows, is_first)
            if index + 1 < len(self.levels):
                done += self._from_level(index + 1, terms.total(), state, is_first, rest)
                continue
            frames = self.head(terms, state.windows, keep=False).total()
            rest[: len(frames)].copy_(frames)
            done += len(frames)
        return done

    def _in_bands(self, x: Tensor, state: VaeDecoderState, is_start: bool, video: Tensor) -> int:
        """Decode as :meth:`_from_level` does from the first tiled level on, one band of rows after the other."""
        frames, plan = 0, state.plan
        for *entered, rows in plan.bands:
            terms, seen = Terms(x), Rows(0, 0, x.shape[1], x.shape[1])
            for level, at in zip(self.levels[plan.first_tiled :], entered, strict=True):
                part = Terms(terms.total()[:, at.part_of(seen)].contiguous())
                terms, seen = level(part, state.windows.band(at), is_start), at.upsampled()
            part = Terms(terms.total()[:, rows.part_of(seen)].contiguous())
            picture = self.head(part, state.windows.band(rows), keep=False).total()
            frames = len(picture)
            video[:frames, rows.begin : rows.end].copy_(picture[:, rows.wanted])
        return frames


class Level:
    """One resolution: upsampling, except at the lowest, and residual blocks.

    ``convs``: its convolutions, and at the lowest level all before them, in the order in which they run; ``rate``:
    output frames per input frame.
    """

    def __init__(self, upsample: Upsample | None, blocks: list[ResidualBlock], convs: Sequence[Convolution]) -> None:
        self._upsample, self._blocks, self.convs = upsample, blocks, convs
        self.rate = 1 if upsample is None else upsample.rate

    def __call__(self, terms: Terms, windows: Windows, is_start: bool) -> Terms:
        if self._upsample is not None:
            terms = self._upsample(terms.total(), windows, is_start)
            windows = windows.upsampled()
        for block in self._blocks:
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
        self.rate = 2 if has_time else 1  # output frames per input frame, after the first of a stream

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
