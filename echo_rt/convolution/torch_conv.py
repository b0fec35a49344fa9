"""Convolutions by torch, with what it usually takes from switches of the whole process given for each call.

Whether there is cuDNN at all remains its user's to say (``torch.backends.cudnn.enabled``).

cuDNN makes a plan at the first call with new sizes, strides, dtype or alignment of addresses, and keeps it for the
thread. Only deterministic plans are asked for, and its search ("benchmark") is not used: without it the plan is the
first of cuDNN's own list that works, the same in every process on the same GPU with the same libraries. A search may
end differently in each thread and process, nothing can read or prescribe its outcome, and a resumed video would differ
in the last bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from echo_rt.convolution.shapes import Prepared

# For output rows (or columns) of even and of odd number: which taps of three fall on the first and on the second of
# the two rows that are seen.
_MEETING = (((0,), (1, 2)), ((0, 1), (2,)))


def convolve(x: Tensor, weight: Tensor, padding: tuple[int, ...], *, stride: tuple[int, ...] | None = None) -> Tensor:
    """``x [N, C, ...]`` with ``weight [Co, C, ...]``, in the layout of the weight; ``stride`` None: 1 each way."""
    dimensions = len(padding)
    once = (1,) * dimensions
    geometry = (stride or once, padding, once, False, (0,) * dimensions, 1)  # then dilation, and what is not transposed
    out: Tensor
    if x.device.type == "meta":
        # Of shapes alone some releases, 2.11 among them, know no convolution that is told which plans it may take.
        out = torch.ops.aten.convolution.default(x, weight, None, *geometry)
    else:
        # No search, deterministic, cuDNN, and TF32, of which the caller's switch is not asked: float32 is float32.
        switches = (False, True, torch.backends.cudnn.enabled, x.dtype is not torch.float32)
        out = torch.ops.aten._convolution.default(x, weight, None, *geometry, *switches)
    return out


def convolve_pictures(pictures: Tensor, weight: Tensor, padding: tuple[int, int]) -> Tensor:
    """Frame by frame: ``pictures [T, H, W, C]`` to ``[T, H', W', Co]``; the weight is channels-last."""
    # A view: channels-last frames are what torch calls channels_last, so no layout changes hands.
    out = convolve(pictures.permute(0, 3, 1, 2), weight, padding)
    return out.permute(0, 2, 3, 1).contiguous()


def library_convolution(weight: Tensor, stride: int = 1) -> Prepared:
    """One 3-D convolution, by the plan that cuDNN thinks best; ``stride`` is in time, for the encoder."""
    laid_out = weight.contiguous(memory_format=torch.channels_last_3d)
    padding = (0, weight.shape[3] // 2, weight.shape[4] // 2)

    def call(frames: Tensor, /) -> Tensor:
        # A view: channels-last frames are what torch calls channels_last_3d, so no layout changes hands. The batch is
        # put first: torch tells the layout by the strides, and that of a batch of one counts too.
        video = frames.unsqueeze(0).permute(0, 4, 1, 2, 3)
        out = convolve(video, laid_out, padding, stride=(stride, 1, 1))
        return out.squeeze(0).permute(1, 2, 3, 0).contiguous()

    return call


def accumulated_products(weight: Tensor) -> Prepared:
    """A 2-D convolution for each frame that the kernel sees, one added to the other and rounded."""
    slices = [part.contiguous(memory_format=torch.channels_last) for part in weight.unbind(2)]
    padding = (weight.shape[3] // 2, weight.shape[4] // 2)

    def call(frames: Tensor, /) -> Tensor:
        new = len(frames) - len(slices) + 1
        out = convolve_pictures(frames[:new], slices[0], padding)
        for first, part in enumerate(slices[1:], start=1):
            out.add_(convolve_pictures(frames[first : first + new], part, padding))
        return out

    return call


def upsample_convolution(weight: Tensor) -> Prepared:
    """Doubles every pixel each way, then convolves the large pictures."""
    laid_out = weight.squeeze(2).contiguous(memory_format=torch.channels_last)
    padding = (weight.shape[3] // 2, weight.shape[4] // 2)

    def call(frames: Tensor, /) -> Tensor:
        count, height, width, channels = frames.shape
        large = frames.new_empty(count, height, 2, width, 2, channels)
        large.copy_(frames[:, :, None, :, None, :].expand_as(large))
        pictures = large.view(count, 2 * height, 2 * width, channels)
        return convolve_pictures(pictures, laid_out, padding)

    return call


def subpixel_convolution(weight: Tensor) -> Prepared:
    """The same without the large pictures, at four ninths of the products: see :func:`subpixel_weights`.

    One convolution gives the four phases as channels, one copy puts them in their places.
    """
    out_channels = len(weight)
    laid_out = subpixel_weights(weight.squeeze(2)).flatten(0, 1).permute(0, 3, 1, 2)  # channels-last

    def call(frames: Tensor, /) -> Tensor:
        count, height, width, _ = frames.shape
        # Pixel (i, j) sees the small pixels (i-1, j-1) to (i, j), so even pixels are found at i, odd ones at i + 1.
        seen = convolve_pictures(frames, laid_out, (1, 1))
        frame, row, column, _ = seen.stride()
        phases = seen.as_strided(
            (count, height, 2, width, 2, out_channels),
            (frame, row, row + 2 * out_channels, column, column + out_channels, 1),
        )
        out = frames.new_empty(count, height, 2, width, 2, out_channels)
        out.copy_(phases)
        return out.view(count, 2 * height, 2 * width, out_channels)

    return call


def subpixel_weights(weight: Tensor) -> Tensor:
    """A 3x3 convolution after nearest-neighbour upsampling as four 2x2 ones of the small picture.

    ``weight [Co, C, 3, 3]`` -> ``[4, Co, 2, 2, C]``, as :meth:`echo_rt.ops.schema.Ops.upsample_conv` wants it; phase
    2a + b is that of rows of parity a and columns of parity b.

    Twice as large, every pixel stands in two rows and two columns. Of the three rows that an output pixel of an even
    row sees, the last two are one row of the small picture, and of an odd row the first two; so with columns. The
    weights of taps that meet the same pixel add up, and of nine products four are left. Sums are float64, rounded once:
    give the weight as the checkpoint has it, and turn the result to the dtype of the model.
    """
    wide = weight.double()
    phases = []
    for rows in _MEETING:
        for columns in _MEETING:
            taps = [
                wide[:, :, row][..., column].sum((-2, -1)) for row in map(list, rows) for column in map(list, columns)
            ]
            phases.append(torch.stack(taps, 1).unflatten(1, (2, 2)))
    return torch.stack(phases).to(weight.dtype)
