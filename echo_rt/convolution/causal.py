"""Ways to compute a convolution that looks back in time, by what torch has."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from echo_rt.convolution.library import convolve, convolve_pictures
from echo_rt.convolution.prepared import Prepared
from echo_rt.utils.device import capturing


def library_convolution(weight: Tensor, stride: int = 1) -> Prepared:
    """One 3-D convolution, by the plan that cuDNN thinks best; ``stride`` is in time, for the encoder."""
    return _whole(weight, stride, search=False)


def searched_convolution(weight: Tensor) -> Prepared:
    """The same by the plan that cuDNN's search finds fastest, at the first call with new sizes in each thread."""
    return _whole(weight, 1, search=True)


def _whole(weight: Tensor, stride: int, *, search: bool) -> Prepared:
    laid_out = weight.contiguous(memory_format=torch.channels_last_3d)
    padding = (0, weight.shape[3] // 2, weight.shape[4] // 2)

    def call(frames: Tensor, /) -> Tensor:
        # A view: channels-last frames are what torch calls channels_last_3d, so no layout changes hands. The batch is
        # put first: torch tells the layout by the strides, and that of a batch of one counts too.
        video = frames.unsqueeze(0).permute(0, 4, 1, 2, 3)
        # A search would spoil what another thread is capturing.
        with capturing if search else nullcontext():
            out = convolve(video, laid_out, padding, stride=(stride, 1, 1), search=search)
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
