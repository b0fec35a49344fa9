"""What the VAE's decoder remembers of one stream, and how much of the stream it takes on at once.

The higher the resolution, the fewer frames are worked on at once: the low resolutions take a whole block, which fills
the GPU; the full one takes a latent's frames at most, which fill it too, and no other works on more bytes than these.
So memory does not grow with the number of latents decoded in one go, and nothing is computed twice. Where memory is
scarcer still, the two highest resolutions are decoded in bands of rows, each with the rows around it that its pixels
depend on (:class:`Bands`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from echo_rt.convolution import ConvolutionShape
from echo_rt.errors import ConfigError
from echo_rt.model.vae_layers import CausalConv, EnlargingConv
from echo_rt.model.vae_windows import BandWindows, Rows, StreamWindows, WindowSize


@dataclass(frozen=True)
class LevelShape:
    """What one resolution of the decoder is made of: ``entry`` are the convolutions before pictures are enlarged.

    ``enlarging``: what doubles height and width between ``entry`` and ``convs``, if anything does; ``rate``: frames
    that come out for each one that goes in.
    """

    entry: Sequence[CausalConv]
    convs: Sequence[CausalConv]
    enlarging: EnlargingConv | None
    rate: int

    @property
    def channels(self) -> int:
        """Of its pictures."""
        return self.convs[-1].channels

    @property
    def numbers_a_pixel(self) -> int:
        """What it makes of each pixel that it is given."""
        return self.rate * (1 if self.enlarging is None else 4) * self.channels

    @property
    def convolutions(self) -> list[CausalConv | EnlargingConv]:
        """All of them, in the order in which they are computed."""
        return [*self.entry, *([] if self.enlarging is None else [self.enlarging]), *self.convs]


@dataclass(frozen=True)
class Bands:
    """The rows of each band, by level: ``levels[i]`` is level ``first + i`` as it is entered, then the head's.

    Each band is a list of rows at the resolution in which it enters that level (the head: the full one).
    """

    first: int
    bands: tuple[tuple[Rows, ...], ...]


class VaeDecoderState:
    """What the decoder remembers of one stream, allocated once.

    ``latents_seen`` is the number of latents decoded since the start of the stream. Together with
    :meth:`tensors` it is all that a stream needs to go on bit for bit: copy both into a fresh state of the same size.
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
        """The remembered frames ``[2, H, W, C]`` of each convolution, by its name in the weights; live views."""
        return dict(self.windows.histories)

    def buffers(self) -> dict[str, Tensor]:
        """Every tensor that outlives a call, by name."""
        named = {f"history {name}": tensor for name, tensor in self.windows.histories.items()}
        return named | {f"kept {name}": tensor for name, tensor in self.kept.items()} | {"room": self.windows.room}

    @property
    def nbytes(self) -> int:
        """Of device memory, for as long as the stream lives."""
        return sum(tensor.nbytes for tensor in self.buffers().values())

    def reset(self) -> None:
        """Back to the start of a stream, in place."""
        self.windows.reset()
        self.latents_seen = 0

    def band_windows(self, rows: Rows) -> BandWindows:
        return BandWindows(self.windows, self.kept, rows)


@dataclass(frozen=True)
class DecodingPlan:
    """How a stream is decoded: ``sizes`` of its windows, ``frames_at_once`` of each level, ``margins`` of bands.

    ``convolutions``: the most that each one is given at once, by its name in the weights.
    """

    latent_shape: tuple[int, int, int]
    sizes: Sequence[WindowSize]
    frames_at_once: tuple[int, ...]
    bands: Bands | None
    margins: Mapping[str, int]
    convolutions: Mapping[str, ConvolutionShape]

    def new_state(self, *, device: torch.device, dtype: torch.dtype) -> VaeDecoderState:
        """What such a stream remembers, at its start."""
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
    """For up to ``latents`` at a time, with ``frames_at_full`` frames of full resolution at once.

    ``tiles``: how many bands of rows the two highest resolutions are decoded in. Raises :class:`ConfigError` for more
    than there are rows for.
    """
    _, height, width = latent_shape
    bands = None if tiles == 1 else _bands(levels, head, height, tiles)
    sizes: list[WindowSize] = []
    at_once: list[int] = []
    margins: dict[str, int] = {}
    convolutions: dict[str, ConvolutionShape] = {}
    frames = latents
    enlarged = 2 ** sum(level.enlarging is not None for level in levels)
    # What one convolution hands to the next is nowhere larger than at full resolution.
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
            if bands is not None and index == bands.first:  # nothing is taken apart from here on
                limit = frames_at_full // math.prod(each.rate for each in levels[index:])
            slices = math.ceil(frames / max(1, limit))
            frames = math.ceil(frames / slices)  # slices of one size
            at_once.append(frames)
        add(level.entry, rows)
        frames *= level.rate
        if level.enlarging is not None:
            convolutions[level.enlarging.name] = level.enlarging.shape(frames, tallest(rows), width)
            height, width = 2 * height, 2 * width
            rows = None if rows is None else [each.enlarged() for each in rows]
        add(level.convs, rows)
    add([head], None if bands is None else [band[-1] for band in bands.bands])
    return DecodingPlan(latent_shape, sizes, tuple(at_once), bands, margins, convolutions)


def _bands(levels: Sequence[LevelShape], head: CausalConv, latent_height: int, tiles: int) -> Bands:
    """Bands of the two highest resolutions, or of the highest one where it is the only one that enlarges."""
    first = max(1, len(levels) - 2)
    height = latent_height * 2 ** sum(level.enlarging is not None for level in levels[:first])
    if first == len(levels):
        raise ConfigError(f"vae_tiles: expected 1 for a VAE of one resolution, got {tiles}")
    # From the picture back to where the bands begin: each level must see so many rows beyond those that are wanted.
    margins = [head.reach]
    for level in reversed(levels[first:]):
        seen = margins[0] + sum(conv.reach for conv in level.convs)
        if level.enlarging is not None:
            seen += level.enlarging.reach
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
