"""Where the VAE's causal convolutions find their input: the frames that each one remembers, and room for the new ones.

What a convolution remembers is its own and lasts. The window that it reads, remembered frames followed by new ones in
one piece of memory, is needed only while it runs, so all share one piece of memory. By count, at 832x480 in bfloat16
the remembered frames take 1.8 GiB and the shared room 0.5; windows of their own for the frames of a block took 11.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """Input of one causal convolution: ``frames [past + new, H, W, C]``.

    ``history [past, H, W, C]`` is what the convolution remembers, to be put before the new frames and to be moved on by
    whoever writes those; None where both is done by the one who opened the window.
    """

    frames: Tensor
    history: Tensor | None

    def write(self, x: Tensor) -> None:
        """Puts in the new frames ``x [T, H, W, C]``, for what no kernel writes."""
        past = len(self.frames) - len(x)
        if self.history is not None:
            self.frames[:past].copy_(self.history)
        self.frames[past:].copy_(x)
        if self.history is not None:
            self.history.copy_(self.frames[len(x) :])


class Windows(Protocol):
    """The windows of one stream."""

    def open(self, name: str, new: int) -> Window:
        """The window of convolution ``name`` with room for ``new`` frames, good until the next one is opened."""

    def close(self, name: str, window: Window) -> None:
        """The new frames are in the window: what is remembered may move on."""

    def enlarged(self) -> Windows:
        """The windows where pictures are twice as high and as wide."""


class WindowSize(NamedTuple):
    """Of one convolution, with the most frames that it is ever given at once; ``rows`` of them in one piece."""

    name: str
    past: int
    most: int
    rows: int
    height: int
    width: int
    channels: int


class StreamWindows:
    """The windows of a stream that is decoded (or encoded) whole pictures at a time. The memory never moves."""

    def __init__(self, sizes: Iterable[WindowSize], *, device: torch.device, dtype: torch.dtype) -> None:
        sizes = list(sizes)
        self.histories = {
            size.name: torch.zeros(size.past, size.height, size.width, size.channels, device=device, dtype=dtype)
            for size in sizes
        }
        most = max((size.past + size.most) * size.rows * size.width * size.channels for size in sizes)
        self.room = torch.empty(most, device=device, dtype=dtype)

    def piece(self, *shape: int) -> Tensor:
        """The shared memory as a tensor of ``shape``."""
        return self.room[: math.prod(shape)].view(shape)

    def open(self, name: str, new: int) -> Window:
        history = self.histories[name]
        past, *size = history.shape
        return Window(self.piece(past + new, *size), history)

    def close(self, name: str, window: Window) -> None:
        """Nothing to do: whoever wrote the new frames moved the past on."""

    def enlarged(self) -> StreamWindows:
        """The same: they are looked up by name."""
        return self

    def reset(self) -> None:
        """All that is remembered becomes zero, in place."""
        for history in self.histories.values():
            history.zero_()


@dataclass(frozen=True)
class Rows:
    """Rows ``first .. last`` of a picture: ``begin .. end`` are wanted, the others are there to see them by.

    Upper bounds are exclusive. At the edges of the picture there is nothing more to see, as there are zeros beyond.
    """

    first: int
    begin: int
    end: int
    last: int

    @classmethod
    def around(cls, begin: int, end: int, margin: int, height: int) -> Rows:
        """``begin .. end`` of ``height`` rows and up to ``margin`` more on each side."""
        return cls(max(0, begin - margin), begin, end, min(height, end + margin))

    def enlarged(self) -> Rows:
        return Rows(2 * self.first, 2 * self.begin, 2 * self.end, 2 * self.last)

    def part_of(self, outer: Rows) -> slice:
        """Where these rows lie in a tensor of the rows of ``outer``."""
        return slice(self.first - outer.first, self.last - outer.first)

    @property
    def wanted(self) -> slice:
        """Where the wanted rows lie in a tensor of these rows."""
        return slice(self.begin - self.first, self.end - self.first)


class BandWindows:
    """The windows while one band of rows after the other is decoded, for the same frames of the whole width.

    A band sees some rows of its neighbours. What the one above remembers has moved on already, so the rows at the
    border are kept as they were: ``kept [past, margin, W, C]`` of each convolution. That of the one below has not.
    """

    def __init__(self, whole: StreamWindows, kept: dict[str, Tensor], rows: Rows) -> None:
        self._whole, self._kept, self.rows = whole, kept, rows

    def enlarged(self) -> BandWindows:
        """The windows for the same rows, of which there are twice as many."""
        return BandWindows(self._whole, self._kept, self.rows.enlarged())

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
        history, rows = self._whole.histories[name], self.rows
        past, height, *_ = history.shape
        if rows.end < height and name in self._kept:
            kept = self._kept[name]
            kept.copy_(history[:, rows.end - kept.shape[1] : rows.end])
        if past:
            history[:, rows.begin : rows.end].copy_(window.frames[-past:, rows.wanted])
