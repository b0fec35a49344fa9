"""Convolutions by torch, with what it usually takes from switches of the whole process given for each call.

Whether there is cuDNN at all remains its user's to say (``torch.backends.cudnn.enabled``).

What torch does with cuDNN's plans (aten/src/ATen/native/cudnn/Conv_v8.cpp), which decides whether a video can be made
again bit for bit:

- A plan is made at the first call with new sizes, strides, dtype or alignment of addresses, and kept for the thread.
  Without a search it is the first of cuDNN's own list that works: the same in every process on the same GPU with the
  same libraries. One whose workspace does not fit into memory is passed over without a word.
- With a search ("benchmark") up to ten plans are timed once each and the fastest is kept. Another thread or process may
  keep another one, and its sums may be rounded in another order. Nothing can read the outcome, or prescribe it.
- The search waits for the device and empties torch's memory cache. Neither may happen while a graph is captured, and
  torch does not look.
- Whether to search is no part of what a plan is kept under. So a shape that a thread asked for without a search first
  is never searched, and the other way round one would be given what a search found. Whether TF32 is allowed is part
  of it, and in 16 bits says nothing else: it keeps the two apart here.
- Only deterministic plans are asked for: others may differ from run to run of one graph.
"""

from __future__ import annotations

import torch
from torch import Tensor


def convolve(
    x: Tensor,
    weight: Tensor,
    padding: tuple[int, ...],
    *,
    stride: tuple[int, ...] | None = None,
    search: bool = False,
) -> Tensor:
    """``x [N, C, ...]`` with ``weight [Co, C, ...]``, in the layout of the weight; ``stride`` None: 1 each way.

    ``search``: cuDNN times its plans, once for the sizes and the thread; in 16 bits only.
    """
    dimensions = len(padding)
    once = (1,) * dimensions
    # The caller's switch for TF32 is not asked: float32 is float32.
    allow_tf32 = x.dtype is not torch.float32 and not search
    geometry = (stride or once, padding, once, False, (0,) * dimensions, 1)  # then dilation, and what is not transposed
    out: Tensor
    if x.device.type == "meta":
        # Of shapes alone some releases, 2.11 among them, know no convolution that is told which plans it may take.
        out = torch.ops.aten.convolution.default(x, weight, None, *geometry)
    else:
        switches = (search, True, torch.backends.cudnn.enabled, allow_tf32)  # the second: deterministic
        out = torch.ops.aten._convolution.default(x, weight, None, *geometry, *switches)
    return out


def convolve_pictures(pictures: Tensor, weight: Tensor, padding: tuple[int, int]) -> Tensor:
    """Frame by frame: ``pictures [T, H, W, C]`` to ``[T, H', W', Co]``; the weight is channels-last."""
    # A view: channels-last frames are what torch calls channels_last, so no layout changes hands.
    out = convolve(pictures.permute(0, 3, 1, 2), weight, padding)
    return out.permute(0, 2, 3, 1).contiguous()
