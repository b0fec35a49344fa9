"""Input of the VAE's causal convolutions: a history of past frames for each, and one shared buffer.

A history lasts as long as its stream. A window, history followed by new frames in contiguous memory, is needed only
while its convolution runs, so all convolutions share one buffer for it. By count, at 832x480 in bfloat16 the histories
take 1.8 GiB and the shared buffer 0.5; one window per convolution for the frames of a block would take 11.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from echo_rt.convolution import ConvolutionShape


class Window(NamedTuple):
    """Input of one causal convolution: ``frames [past + new, H, W, C]``.

    Whoever writes the new frames copies ``history [past, H, W, C]`` in front of them and then updates it with the last
    ones. It is None where the windows do both.
    """

    frames: Tensor
    history: Tensor | None

    def write(self, x: Tensor) -> None:
        """Write the new frames ``x [T, H, W, C]`` and update the history, where no kernel does it."""
        past = len(self.frames) - len(x)
        self.frames[past:].copy_(x)
        if self.history is not None:
            self.frames[:past].copy_(self.history)
            self.history.copy_(self.frames[len(x) :])


class WindowSize(NamedTuple):
    """Size of the window of one convolution: ``past`` frames of ``height`` rows are its history.

    ``call``: the shape of the largest call; ``margin``: rows that a band reads of the one above it.
    """

    past: int
    height: int
    call: ConvolutionShape
    margin: int = 0


class Rows(NamedTuple):
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
        return Rows(*(2 * row for row in self))

    def part_of(self, outer: Rows) -> slice:
        """Slice of these rows in a tensor of the rows of ``outer``."""
        return slice(self.first - outer.first, self.last - outer.first)

    @property
    def wanted(self) -> slice:
        """Slice of the wanted rows in a tensor of these rows."""
        return slice(self.begin - self.first, self.end - self.first)


class Windows:
    """The windows of a stream, for whole frames, or for a :meth:`band` of their rows. Its buffers never move.

    ``histories``: ``[past, height, width, channels]`` of each convolution; ``kept``: the same of ``margin`` rows.
    """

    rows: Rows | None = None

    def __init__(self, sizes: Mapping[str, WindowSize], *, device: torch.device, dtype: torch.dtype) -> None:
        def zeros(size: WindowSize, rows: int) -> Tensor:
            return torch.zeros(size.past, rows, size.call.width, size.call.channels, device=device, dtype=dtype)

        # A stream may go on with or without inference mode; tensors born inside it could not be written outside.
        with torch.inference_mode(False):
            self.histories = {name: zeros(size, size.height) for name, size in sizes.items()}
            self.kept = {n: zeros(size, size.margin) for n, size in sizes.items() if size.past and size.margin}
            calls = [size.call for size in sizes.values()]
            most = max(call.frames * call.height * call.width * call.channels for call in calls)
            self.room = torch.empty(most, device=device, dtype=dtype)

    def band(self, rows: Rows) -> Windows:
        """Return the same windows for ``rows`` of frames that are decoded one band after the other.

        A band reads some rows of its neighbours. The history of the band above is already updated, so its last rows are
        kept as they were. The history of the band below is not yet.
        """
        windows = copy.copy(self)
        windows.rows = rows
        return windows

    def upsampled(self) -> Windows:
        """Return the windows for the same rows after upsampling; they are looked up by the names of convolutions."""
        return self if self.rows is None else self.band(self.rows.upsampled())

    @contextmanager
    def window(self, name: str, new: int) -> Iterator[Window]:
        """Lend the window of convolution ``name`` for ``new`` frames; there is one at a time.

        That of a band updates the history once the new frames are in it.
        """
        history, kept, rows = self.histories[name], self.kept.get(name), self.rows
        past, height, *size = history.shape
        if rows is None:
            yield Window(self._piece(past + new, height, *size), history)
            return
        frames = self._piece(past + new, rows.last - rows.first, *size)
        above = rows.begin - rows.first
        if above and kept is not None:
            frames[:past, :above].copy_(kept[:, -above:])
        frames[:past, above:].copy_(history[:, rows.begin : rows.last])
        yield Window(frames, None)
        if kept is not None and rows.end < height:
            kept.copy_(history[:, rows.end - kept.shape[1] : rows.end])
        if past:
            history[:, rows.begin : rows.end].copy_(frames[-past:, rows.wanted])

    def _piece(self, *shape: int) -> Tensor:
        """View the shared buffer as a tensor of ``shape``."""
        return self.room[: math.prod(shape)].view(shape)
