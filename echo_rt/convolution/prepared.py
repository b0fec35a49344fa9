"""What a kind of convolution makes of a weight."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Prepared(Protocol):
    """A convolution with its weight, for frames of any number and size. The bias is its reader's to add.

    It keeps nothing between calls, changes no input and never waits for the device once it has run in a thread, so that
    a thread that has called it with some sizes can capture it with these.
    """

    def __call__(self, frames: Tensor, /) -> Tensor:
        """Contiguous ``frames [past + T, H, W, C]`` -> contiguous ``[T, H, W, Co]``.

        Around a picture are zeros; in time there is no padding. A kind that enlarges gives ``[T, 2H, 2W, Co]``.
        """
