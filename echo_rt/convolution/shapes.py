"""The size of one convolution of the VAE's decoder, and what an implementation makes of its weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class ConvolutionShape:
    """Of one call: ``frames`` (past and new) of ``height x width`` pixels, and what becomes of them.

    ``kernel`` is (time, height, width): time looks back only, and the picture is padded with zeros, so that
    ``frames - kernel[0] + 1`` frames of the same size come out. With ``enlarge`` every pixel is doubled each way
    before, and the kernel is one frame deep.
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
        """``[frames, height, width, channels]`` of the result."""
        scale = 2 if self.enlarge else 1
        return (self.frames - self.kernel[0] + 1, scale * self.height, scale * self.width, self.out_channels)

    def __str__(self) -> str:
        kernel = "x".join(map(str, self.kernel))
        enlarged = " after enlarging" if self.enlarge else ""
        return (
            f"{self.frames} frames of {self.width}x{self.height}, {self.channels} to {self.out_channels} channels, "
            f"kernel {kernel}{enlarged}"
        )

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> ConvolutionShape:
        """Of what JSON keeps of one. Raises ``TypeError`` or ``ValueError`` for anything else."""
        depth, height, width = fields["kernel"]
        shape = cls(**{**fields, "kernel": (depth, height, width)})
        sizes = (shape.frames, shape.height, shape.width, shape.channels, shape.out_channels, *shape.kernel)
        if not all(type(size) is int for size in sizes) or type(shape.enlarge) is not bool:
            raise ValueError("values of other types")
        return shape


class Prepared(Protocol):
    """A convolution with its weight, for frames of any number and size. The bias is its reader's to add.

    It keeps nothing between calls, changes no input and never waits for the device once it has run in a thread, so that
    a thread that has called it with some sizes can capture it with these.
    """

    def __call__(self, frames: Tensor, /) -> Tensor:
        """Contiguous ``frames [past + T, H, W, C]`` -> contiguous ``[T, H, W, Co]``, or ``[T, 2H, 2W, Co]`` upsampled.

        Around a picture are zeros; in time there is no padding.
        """
