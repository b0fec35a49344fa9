"""The state of one stream in the VAE's decoder, and the plan of how many frames each level decodes at once.

The higher the resolution, the fewer frames are computed at once. The low resolutions take a whole block, which fills
the GPU; the full resolution takes at most the frames of one latent, which fill it too; no level works on more bytes. So
memory does not grow with the number of latents per call, and nothing is computed twice. With tiles, the two highest
resolutions are decoded in bands of rows, each with the rows around it that it depends on (:class:`Bands`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from echo_rt.convolution import ConvolutionShape
from echo_rt.errors import ConfigError
from echo_rt.model.vae_layers import CausalConv, UpsampleConv
from echo_rt.model.vae_windows import BandWindows, Rows, StreamWindows, WindowSize


@dataclass(frozen=True)
class LevelShape:
    """The convolutions of one level: ``entry`` before upsampling, ``convs`` after it.

    ``upsample``: the one that doubles height and width in between, if any; ``rate``: output frames per input frame.
    """

    entry: Sequence[CausalConv]
    convs: Sequence[CausalConv]
    upsample: UpsampleConv | None
    rate: int

    @property
    def channels(self) -> int:
        """Channels of its output."""
        return self.convs[-1].channels

    @property
    def numbers_a_pixel(self) -> int:
        """Output elements per input pixel."""
        return self.rate * (1 if self.upsample is None else 4) * self.channels

    @property
    def convolutions(self) -> list[CausalConv | UpsampleConv]:
        """All of its convolutions, in order of execution."""
        return [*self.entry, *([] if self.upsample is None else [self.upsample]), *self.convs]


@dataclass(frozen=True)
class Bands:
    """The horizontal bands of the levels from ``first`` on.

    ``bands[b][i]`` are the rows of band ``b`` at the input of level ``first + i``; the last entry is the head's.
    """

    first: int
    bands: tuple[tuple[Rows, ...], ...]


class VaeDecoderState:
    """The state of one stream, allocated once.

    ``latents_seen`` is the number of latents decoded so far. To go on bit for bit, copy it and :meth:`tensors` into a
    new state of the same size.
    """

    def __init__(
        self,
        windows: StreamWindows,
        latent_shape: tuple[int, int, int],
        frames_at_once: tuple[int, ...],
        bands: Bands | None,
    ) -> None:
        self.windows, self.latent_shape = windows, latent_shape
        self.frames_at_once, self.bands = frames_at_once, bands
        self.kept: dict[str, Tensor] = {}
        self.latents_seen = 0

    def tensors(self) -> dict[str, Tensor]:
        """Return the history ``[past, H, W, C]`` of each convolution, by its name in the weights; live views."""
        return dict(self.windows.histories)

    def buffers(self) -> dict[str, Tensor]:
        """Return every tensor that outlives a call, by name."""
        named = {f"history {name}": tensor for name, tensor in self.windows.histories.items()}
        return named | {f"kept {name}": tensor for name, tensor in self.kept.items()} | {"room": self.windows.room}

    @property
    def nbytes(self) -> int:
        """Device memory of the state, in bytes."""
        return sum(tensor.nbytes for tensor in self.buffers().values())

    def reset(self) -> None:
        """Go back to the start of a stream, in place."""
        self.windows.reset()
        self.latents_seen = 0

    def band_windows(self, rows: Rows) -> BandWindows:
        return BandWindows(self.windows, self.kept, rows)


@dataclass(frozen=True)
class DecodingPlan:
    """How a stream is decoded: ``sizes`` of its windows, ``frames_at_once`` of each level, ``margins`` of bands.

    ``convolutions``: the largest shape of each convolution, by its name in the weights.
    """

    latent_shape: tuple[int, int, int]
    sizes: Sequence[WindowSize]
    frames_at_once: tuple[int, ...]
    bands: Bands | None
    margins: Mapping[str, int]
    convolutions: Mapping[str, ConvolutionShape]

    def new_state(self, *, device: torch.device, dtype: torch.dtype) -> VaeDecoderState:
        """Allocate the state of a stream at its start."""
        # A stream may be decoded with or without inference mode; tensors born inside it could not be written outside.
        with torch.inference_mode(False):
            windows = StreamWindows(self.sizes, device=device, dtype=dtype)
            state = VaeDecoderState(windows, self.latent_shape, self.frames_at_once, self.bands)
            for name, margin in self.margins.items():
                past, _, *size = windows.histories[name].shape
                if past and margin:
                    state.kept[name] = torch.zeros(past, margin, *size, device=device, dtype=dtype)
        return state


def plan_decoding(
    levels: Sequence[LevelShape],
    head: CausalConv,
    latent_shape: tuple[int, int, int],
    latents: int,
    *,
    frames_at_full: int,
    tiles: int,
) -> DecodingPlan:
    """Plan the decoding of at most ``latents`` per call, with ``frames_at_full`` frames of full resolution at once.

    ``tiles``: number of horizontal tiles for the two highest resolutions. Raises :class:`ConfigError` where a tile
    would have too few rows.
    """
    _, height, width = latent_shape
    bands = None if tiles == 1 else _bands(levels, head, height, tiles)
    sizes: list[WindowSize] = []
    at_once: list[int] = []
    margins: dict[str, int] = {}
    convolutions: dict[str, ConvolutionShape] = {}
    frames = latents
    enlarged = 2 ** sum(level.upsample is not None for level in levels)
    # No tensor between two convolutions is larger than those at full resolution.
    numbers_at_once = frames_at_full * (height * enlarged) * (width * enlarged) * levels[-1].channels

    def tallest(at: Sequence[Rows] | None) -> int:
        return height if at is None else max(rows.last - rows.first for rows in at)

    def add(convs: Sequence[CausalConv], at: Sequence[Rows] | None) -> None:
        for conv in convs:
            convolutions[conv.name] = conv.shape(frames, tallest(at), width)
            sizes.append(WindowSize(conv.name, conv.past, frames, tallest(at), height, width, conv.channels))
            if at is not None:
                margins[conv.name] = max(rows.begin - rows.first for rows in at)

    for index, level in enumerate(levels):
        rows = None if bands is None or index < bands.first else [band[index - bands.first] for band in bands.bands]
        if bands is None or index <= bands.first:
            limit = numbers_at_once // (height * width * level.numbers_a_pixel)
            if bands is not None and index == bands.first:  # frames are not split from here on
                limit = frames_at_full // math.prod(each.rate for each in levels[index:])
            slices = math.ceil(frames / max(1, limit))
            frames = math.ceil(frames / slices)  # slices of equal size
            at_once.append(frames)
        add(level.entry, rows)
        frames *= level.rate
        if level.upsample is not None:
            convolutions[level.upsample.name] = level.upsample.shape(frames, tallest(rows), width)
            height, width = 2 * height, 2 * width
            rows = None if rows is None else [each.upsampled() for each in rows]
        add(level.convs, rows)
    add([head], None if bands is None else [band[-1] for band in bands.bands])
    return DecodingPlan(latent_shape, sizes, tuple(at_once), bands, margins, convolutions)


def _bands(levels: Sequence[LevelShape], head: CausalConv, latent_height: int, tiles: int) -> Bands:
    """Return the bands of the two highest resolutions, or of the highest where only that one upsamples."""
    first = max(1, len(levels) - 2)
    height = latent_height * 2 ** sum(level.upsample is not None for level in levels[:first])
    if first == len(levels):
        raise ConfigError(f"vae_tiles: expected 1 for a VAE of one resolution, got {tiles}")
    # From the output back to the first tiled level: the margin of rows that each level needs.
    margins = [head.reach]
    for level in reversed(levels[first:]):
        seen = margins[0] + sum(conv.reach for conv in level.convs)
        if level.upsample is not None:
            seen += level.upsample.reach
        margins.insert(0, -(-seen // 2))
    most = height // margins[0]
    if not 1 <= tiles <= most:
        able = f"1 to {most}" if most > 1 else "1"
        raise ConfigError(f"vae_tiles: expected {able} for latents {latent_height} rows high, got {tiles}")
    bands = []
    for index in range(tiles):
        begin, end = (height * at // tiles for at in (index, index + 1))
        entered = [
            Rows.around(begin * 2**doubled, end * 2**doubled, margin, height * 2**doubled)
            for doubled, margin in enumerate(margins)
        ]
        bands.append(tuple(entered))
    return Bands(first, tuple(bands))
