"""The shape of one convolution of the VAE's decoder, and the function an implementation makes of its weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


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
