"""How much arithmetic the VAE's decoder is, stage by stage: counted from the shapes of its weights.

A stage is a resolution: what enlarges pictures to it, and the blocks that follow. The lowest one also has the first
convolution and the middle; the last convolution, which makes colours, is a stage of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from echo_rt.config import VaeConfig
from echo_rt.weights.shapes import vae_decoder_shapes

HEAD = "head"
_TIME, _SPACE, _QKV = ".time_conv.weight", ".resample.1.weight", ".to_qkv.weight"


class Frames(NamedTuple):
    """Size of an activation: so many frames of so many pixels and channels."""

    frames: int
    height: int
    width: int
    channels: int


@dataclass(frozen=True)
class Product:
    """One convolution or matrix product: its weight, and how many frames of which size it makes."""

    name: str
    shape: tuple[int, ...]
    frames: int
    height: int
    width: int

    @property
    def flops(self) -> int:
        """Twice the multiply-adds."""
        return 2 * math.prod(self.shape) * self.frames * self.height * self.width

    @property
    def is_causal(self) -> bool:
        """Whether it looks back in time."""
        return len(self.shape) == 5 and self.shape[2] > 1

    @property
    def is_convolution(self) -> bool:
        """Whether it looks at more than one point."""
        return math.prod(self.shape[2:]) > 1


@dataclass
class Stage:
    """One resolution: what it is given, and what is done there; ``attention`` is FLOPs that no weight has part in."""

    name: str
    given: Frames
    products: list[Product] = field(default_factory=list)
    attention: int = 0

    @property
    def flops(self) -> int:
        return self.attention + sum(product.flops for product in self.products)

    @property
    def convolutions(self) -> list[Product]:
        return [product for product in self.products if product.is_convolution]


def decoder_stages(config: VaeConfig, latent_height: int, latent_width: int, latents: int) -> list[Stage]:
    """The stages of ``latents`` latents in mid-stream, from the lowest resolution to the head."""
    frames, height, width, channels = latents, latent_height, latent_width, config.z_dim
    stages: list[Stage] = []

    def begin(name: str) -> None:
        stages.append(Stage(name, Frames(frames, height, width, channels)))

    begin(f"{width}x{height}")
    weights = {name: shape for name, shape in vae_decoder_shapes(config).items() if name.endswith(".weight")}
    for name, shape in weights.items():
        enlarges = name.endswith(_SPACE)
        if name.endswith(_TIME) or (enlarges and name.replace(_SPACE, _TIME) not in weights):
            begin(f"{2 * width}x{2 * height}")
        elif name.startswith("decoder.head."):
            begin(HEAD)
        if enlarges:
            height, width = 2 * height, 2 * width
        stages[-1].products.append(Product(name, shape, frames, height, width))
        if name.endswith(_QKV):
            # Scores, and sums weighted by them, of each frame's pixels among themselves.
            stages[-1].attention += 2 * 2 * frames * (height * width) ** 2 * shape[1]
        elif name.endswith(_TIME):
            frames *= 2
        else:
            channels = shape[0]
    return stages
