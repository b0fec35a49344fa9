"""Input of the VAE's causal convolutions: a history of past frames for each, and one shared buffer.

A history lasts as long as its stream. A window, history followed by new frames in contiguous memory, is needed only
while its convolution runs, so all convolutions share one buffer for it. By count, at 832x480 in bfloat16 the histories
take 1.8 GiB and the shared buffer 0.5; one window per convolution for the frames of a block would take 11.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """Input of one causal convolution: ``frames [past + new, H, W, C]``.

    Whoever writes the new frames copies ``history [past, H, W, C]`` in front of them and then updates it with the last
    ones. It is None where the windows do both.
    """

    frames: Tensor
    history: Tensor | None

    def write(self, x: Tensor) -> None:
        """Write the new frames ``x [T, H, W, C]`` and update the history, where no kernel does it."""
        past = len(self.frames) - len(x)
        if self.history is not None:
            self.frames[:past].copy_(self.history)
        self.frames[past:].copy_(x)
        if self.history is not None:
            self.history.copy_(self.frames[len(x) :])


class WindowSize(NamedTuple):
    """Size of the window of one convolution: at most ``most`` new frames, ``rows`` rows at a time."""

    name: str
    past: int
    most: int
    rows: int
    height: int
    width: int
    channels: int


class StreamWindows:
    """The windows of a stream that is decoded or encoded in whole frames. Its buffers never move."""

    def __init__(self, sizes: Iterable[WindowSize], *, device: torch.device, dtype: torch.dtype) -> None:
        sizes = list(sizes)
        self.histories = {
            size.name: torch.zeros(size.past, size.height, size.width, size.channels, device=device, dtype=dtype)
            for size in sizes
        }
        most = max((size.past + size.most) * size.rows * size.width * size.channels for size in sizes)
        self.room = torch.empty(most, device=device, dtype=dtype)

    def piece(self, *shape: int) -> Tensor:
        """View the shared buffer as a tensor of ``shape``."""
        return self.room[: math.prod(shape)].view(shape)

    def open(self, name: str, new: int) -> Window:
        """Return the window of convolution ``name`` for ``new`` frames; valid until the next one is opened."""
        history = self.histories[name]
        past, *size = history.shape
        return Window(self.piece(past + new, *size), history)

    def close(self, name: str, window: Window) -> None:
        """Do nothing: whoever wrote the new frames has updated the history."""

    def upsampled(self) -> StreamWindows:
        """Return the same windows: they are looked up by name."""
        return self

    def reset(self) -> None:
        """Zero all histories in place."""
        for history in self.histories.values():
            history.zero_()


@dataclass(frozen=True)
class Rows:
    """Rows ``first .. last`` of a frame: ``begin .. end`` are wanted, the others are their margin.

    Upper bounds are exclusive. The edge of the frame has no margin: convolutions pad with zeros there.
    """

    first: int
    begin: int
    end: int
    last: int

    @classmethod
    def around(cls, begin: int, end: int, margin: int, height: int) -> Rows:
        """Return ``begin .. end`` of ``height`` rows with up to ``margin`` more on each side."""
        return cls(max(0, begin - margin), begin, end, min(height, end + margin))

    def upsampled(self) -> Rows:
        return Rows(2 * self.first, 2 * self.begin, 2 * self.end, 2 * self.last)

    def part_of(self, outer: Rows) -> slice:
        """Slice of these rows in a tensor of the rows of ``outer``."""
        return slice(self.first - outer.first, self.last - outer.first)

    @property
    def wanted(self) -> slice:
        """Slice of the wanted rows in a tensor of these rows."""
        return slice(self.begin - self.first, self.end - self.first)


class BandWindows:
    """The windows while the same frames are decoded one band of rows after the other.

    A band reads some rows of its neighbours. The history of the band above is already updated, so its last rows are
    kept as they were: ``kept [past, margin, W, C]`` of each convolution. The history of the band below is not yet.
    """

    def __init__(self, whole: StreamWindows, kept: dict[str, Tensor], rows: Rows) -> None:
        self._whole, self._kept, self.rows = whole, kept, rows

    def upsampled(self) -> BandWindows:
        """Return the windows for the same rows after upsampling."""
        return BandWindows(self._whole, self._kept, self.rows.upsampled())

    def open(self, name: str, new: int) -> Window:
        history, rows = self._whole.histories[name], self.rows
        past, _, *size = history.shape
        frames = self._whole.piece(past + new, rows.last - rows.first, *size)
        above = rows.begin - rows.first
        if above:
            frames[:past, :above].copy_(self._kept[name][:, -above:])
        frames[:past, above:].copy_(history[:, rows.begin : rows.last])
        return Window(frames, None)

    def close(self, name: str, window: Window) -> None:
        """Update the history, now that the new frames are in the window."""
        history, rows = self._whole.histories[name], self.rows
        past, height, *_ = history.shape
        if rows.end < height and name in self._kept:
            kept = self._kept[name]
            kept.copy_(history[:, rows.end - kept.shape[1] : rows.end])
        if past:
            history[:, rows.begin : rows.end].copy_(window.frames[-past:, rows.wanted])


Windows = StreamWindows | BandWindows
