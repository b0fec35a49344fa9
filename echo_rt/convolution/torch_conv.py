"""The shape of a convolution, and convolutions by torch, with cuDNN's process-wide switches (but one) set per call.

cuDNN makes a plan at the first call with new sizes, strides, dtype or address alignment, and caches it per thread. Only
deterministic plans are requested, without its search, which may end differently in each thread and process: so a
resumed video is the same on the same GPU with the same libraries (``docs/architecture.md``).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# For even and odd output rows (or columns): which of the three taps fall on the first and on the second of the two
# input rows.
_MEETING = (((0,), (1, 2)), ((0, 1), (2,)))


@dataclass(frozen=True)
class ConvolutionShape:
    """Shape of one call on ``frames`` (history and new) of ``height x width`` pixels.

    ``kernel`` is (time, height, width): causal in time, zero-padded in space, so there are ``frames - kernel[0] + 1``
    frames of output. With ``enlarge`` the frames are upsampled by two first, and the kernel is one frame deep.
    """

    frames: int
    height: int
    width: int
    channels: int
    out_channels: int
    kernel: tuple[int, int, int]
    enlarge: bool = False

    @property
    def out_size(self) -> tuple[int, int, int, int]:
        """``[frames, height, width, channels]`` of the output."""
        scale = 2 if self.enlarge else 1
        return (self.frames - self.kernel[0] + 1, scale * self.height, scale * self.width, self.out_channels)

    def __str__(self) -> str:
        kernel = "x".join(map(str, self.kernel))
        enlarged = " after enlarging" if self.enlarge else ""
        return (
            f"{self.frames} frames of {self.width}x{self.height}, {self.channels} to {self.out_channels} channels, "
            f"kernel {kernel}{enlarged}"
        )


class Prepared(Protocol):
    """A convolution with its weight, for any number and size of frames. It does not add the bias.

    It keeps no state between calls, changes no input and does not synchronize after its first call in a thread, so a
    thread that has called it with some sizes can capture it with these.
    """

    def __call__(self, frames: Tensor, /) -> Tensor:
        """Convolve ``[past + T, H, W, C]`` to ``[T, H, W, Co]``, or ``[T, 2H, 2W, Co]`` upsampled, all contiguous.

        Zero padding in space, none in time.
        """


def convolve(x: Tensor, weight: Tensor, padding: tuple[int, ...], *, stride: tuple[int, ...] | None = None) -> Tensor:
    """Convolve ``x [N, C, ...]`` with ``weight [Co, C, ...]``, in the weight's layout; ``stride`` None: 1."""
    once = (1,) * len(padding)
    # Dilation 1, no transposed convolution, one group.
    geometry = (stride or once, padding, once, False, (0,) * len(padding), 1)
    # No search, deterministic, cuDNN, and TF32 whatever the process-wide switch says: float32 is float32.
    switches = (False, True, torch.backends.cudnn.enabled, x.dtype is not torch.float32)
    out: Tensor = torch.ops.aten._convolution.default(x, weight, None, *geometry, *switches)
    return out


def convolve_frames(frames: Tensor, weight: Tensor, padding: tuple[int, int]) -> Tensor:
    """Convolve ``frames [T, H, W, C]`` to ``[T, H', W', Co]`` in 2-D; the weight is channels-last."""
    # A view: channels-last frames are what torch calls channels_last, so no layout changes hands.
    out = convolve(frames.permute(0, 3, 1, 2), weight, padding)
    return out.permute(0, 2, 3, 1).contiguous()


def _same(weight: Tensor) -> tuple[int, int]:
    """Return the padding in space by which a convolution keeps the size."""
    return weight.shape[-2] // 2, weight.shape[-1] // 2


def library_convolution(weight: Tensor, stride: int = 1) -> Prepared:
    """Compute one 3-D convolution; ``stride`` is in time, for the encoder."""
    laid_out, padding = weight.contiguous(memory_format=torch.channels_last_3d), (0, *_same(weight))

    def call(frames: Tensor, /) -> Tensor:
        # A view, as above. The batch comes first: torch infers the layout from all strides, that of a batch of one too.
        video = frames.unsqueeze(0).permute(0, 4, 1, 2, 3)
        out = convolve(video, laid_out, padding, stride=(stride, 1, 1))
        return out.squeeze(0).permute(1, 2, 3, 0).contiguous()

    return call


def accumulated_products(weight: Tensor) -> Prepared:
    """Compute one 2-D convolution per frame of the kernel, each added to the rounded sum."""
    slices = [part.contiguous(memory_format=torch.channels_last) for part in weight.unbind(2)]
    padding = _same(weight)

    def call(frames: Tensor, /) -> Tensor:
        new = len(frames) - len(slices) + 1
        out = convolve_frames(frames[:new], slices[0], padding)
        for first, part in enumerate(slices[1:], start=1):
            out.add_(convolve_frames(frames[first : first + new], part, padding))
        return out

    return call


def _interleaved(parts: Tensor) -> Tensor:
    """Copy ``parts [T, H, 2, W, 2, C]`` into frames ``[T, 2H, 2W, C]``."""
    count, height, _, width, _, channels = parts.shape
    out = parts.new_empty(parts.shape)
    return out.copy_(parts).view(count, 2 * height, 2 * width, channels)


def upsample_convolution(weight: Tensor) -> Prepared:
    """Upsample by nearest pixels, then convolve the large frames."""
    laid_out, padding = weight.squeeze(2).contiguous(memory_format=torch.channels_last), _same(weight)

    def call(frames: Tensor, /) -> Tensor:
        large = _interleaved(frames[:, :, None, :, None, :].expand(-1, -1, 2, -1, 2, -1))
        return convolve_frames(large, laid_out, padding)

    return call


def subpixel_convolution(weight: Tensor) -> Prepared:
    """Do the same without the large frames, at four ninths of the products: see :func:`subpixel_weights`.

    One convolution computes the four subpixel positions as channels, one copy interleaves them.
    """
    out_channels = len(weight)
    laid_out = subpixel_weights(weight.squeeze(2)).flatten(0, 1).permute(0, 3, 1, 2)  # channels-last

    def call(frames: Tensor, /) -> Tensor:
        count, height, width, _ = frames.shape
        # Pixel (i, j) reads the small pixels (i-1, j-1) to (i, j), so even pixels are at i, odd ones at i + 1.
        seen = convolve_frames(frames, laid_out, (1, 1))
        frame, row, column, _ = seen.stride()
        phases = seen.as_strided(
            (count, height, 2, width, 2, out_channels),
            (frame, row, row + 2 * out_channels, column, column + out_channels, 1),
        )
        return _interleaved(phases)

    return call


def subpixel_weights(weight: Tensor) -> Tensor:
    """Turn a 3x3 convolution after nearest upsampling into four 2x2 ones of the small frame.

    ``weight [Co, C, 3, 3]`` -> ``[4, Co, 2, 2, C]``, for :func:`echo_rt.ops.reference.upsample_conv`; index 2a + b
    is for rows of parity a and columns of parity b.

    After upsampling every pixel fills two rows and two columns. Of the three rows that an even output row reads, the
    last two are the same row of the small frame; for an odd row the first two are; columns likewise. The weights of
    taps on the same pixel are added, so four of nine products are left. Sums are float64 and rounded once: pass the
    weight as the checkpoint has it, and convert the result to the dtype of the model.
    """
    wide = weight.double()
    taps = [
        wide[:, :, list(row)][..., list(column)].sum((-2, -1))
        for rows, columns in itertools.product(_MEETING, repeat=2)
        for row, column in itertools.product(rows, columns)
    ]
    phases: Tensor = torch.stack(taps).unflatten(0, (4, 2, 2)).permute(0, 3, 1, 2, 4)
    return phases.contiguous().to(weight.dtype)
