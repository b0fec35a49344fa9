"""Tiny decoders of Wan2.1's latents on disk: their files, what is in them, and which of the two kinds a file is.

Both kinds have the same names and shapes, so nothing inside a file tells them apart; yet one decodes latents as the
transformer makes them and the other wants them de-normalized first. Taking one for the other shows as a bad picture, so
the kind is told by the file's name, and a name that says neither is refused.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from echo_rt.config import VaeConfig
from echo_rt.errors import ConfigError, WeightsError, did_you_mean
from echo_rt.options import TINY_VAE, WAN_VAE
from echo_rt.weights.files import check_tensors, open_tensors
from echo_rt.weights.shapes import Module, Shapes, shape_of, shapes_of
from echo_rt.weights.tensors import selected

_SUFFIXES = (".pth", ".safetensors")
_ENCODER = "encoder."
_WHAT = "a tiny video decoder"

# The decoder is one flat list: a clamp, a convolution and a ReLU; then, for each level, the blocks, an enlargement,
# a growth in time and a convolution to the next level's width; then a ReLU and the convolution to colours.
_FIRST, _FIRST_LEVEL = 1, 3
_BLOCKS = 3
_LEVEL = _BLOCKS + 3


TAEW, LIGHTTAEW = "taew2_1", "lighttaew2_1"  # a part of the names of their files
# Whether a kind decodes latents as a transformer makes; first the one whose name the other's is a part of.
_NORMALIZED = {LIGHTTAEW: False, TAEW: True}
_FORMS = f"{{{','.join(_SUFFIXES)}}}"
_USUAL_FILES = f"{TAEW}{_FORMS} (of madebyollin's TAEHV) or {LIGHTTAEW}{_FORMS} (of LightX2V's Autoencoders)"


@dataclass(frozen=True)
class TinyVaeConfig:
    """A tiny decoder: ``widths`` are the channels of its levels, coarse to fine, and at last those at full size.

    ``growth``: frames that each level makes of one. Defaults are those of the released files.
    """

    z_dim: int = 16
    widths: tuple[int, ...] = (256, 128, 64, 64)
    growth: tuple[int, ...] = (1, 2, 2)
    normalized: bool = True

    @property
    def spatial_stride(self) -> int:
        """Pixels of the video on a side of one latent pixel: every level doubles them."""
        return 1 << len(self.growth)

    @property
    def temporal_stride(self) -> int:
        """Video frames that one latent decodes to (of a stream's first, all but the last are left out)."""
        return math.prod(self.growth)

    @property
    def head(self) -> str:
        """Name of the convolution that makes colours."""
        return f"decoder.{_FIRST_LEVEL + len(self.growth) * _LEVEL + 1}"


STEM = f"decoder.{_FIRST}"  # the convolution that latents go through first


def level_names(level: int) -> tuple[list[str], str, str]:
    """The blocks of a level, each of which sees the frame before beside its own, and two convolutions.

    The first makes several frames of each, the other leads, at twice the level's size, to the width of the next.
    """
    *blocks, _, growth, outlet = (f"decoder.{_FIRST_LEVEL + level * _LEVEL + part}" for part in range(_LEVEL))
    return blocks, f"{growth}.conv", outlet


def tiny_decoder_shapes(config: TinyVaeConfig) -> Shapes:
    """``decoder.*`` of a tiny decoder's file."""
    modules = [Module((STEM,), (config.widths[0], config.z_dim, 3, 3))]
    for level, growth in enumerate(config.growth):
        width = config.widths[level]
        blocks, growth_name, outlet = level_names(level)
        for block in blocks:
            layers = ((0, 2 * width), (2, width), (4, width))
            modules += (Module((f"{block}.conv.{layer}",), (width, channels, 3, 3)) for layer, channels in layers)
        modules.append(Module((growth_name,), (growth * width, width, 1, 1), (".weight",)))
        modules.append(Module((outlet,), (config.widths[level + 1], width, 3, 3), (".weight",)))
    return shapes_of([*modules, Module((config.head,), (3, config.widths[-1], 3, 3))])


@dataclass(frozen=True, eq=False)
class TinyVae:
    """An opened file: its kind, its sizes, and its decoder's tensors, mapped from disk."""

    path: Path
    kind: str
    config: TinyVaeConfig
    tensors: Mapping[str, Tensor]


def open_tiny_vae(vae: str | Path, folder: Path, like: VaeConfig) -> TinyVae:
    """The tiny decoder that ``vae`` means: that of the model in ``folder``, or the path of a file.

    ``like``: the VAE whose latents it decodes and whose video it makes. The file's encoder, where it has one, is left
    alone. Errors: ``WeightsError`` for no file, one of neither kind, and missing, surplus or misshapen tensors;
    ``ConfigError`` for a decoder of other latents, or of a video of another size or length.
    """
    path = _find(folder) if vae == TINY_VAE else Path(vae)
    if not os.path.exists(path):
        raise WeightsError(
            f"vae: expected {WAN_VAE!r}, {TINY_VAE!r} or the path of a tiny decoder's file, "
            f"got {str(vae)!r}, and no such file{did_you_mean(vae, (WAN_VAE, TINY_VAE))}"
        )
    kind = next((kind for kind in _NORMALIZED if kind in path.name.lower()), None)
    if kind is None:
        raise WeightsError(
            f"{path}: expected a name that says which tiny decoder it is, like {_USUAL_FILES}; "
            f"their tensors have the same names, but one wants normalized latents and the other does not"
        )
    tensors = selected(open_tensors(path), lambda name: not name.startswith(_ENCODER))
    config = _config_of(tensors, _NORMALIZED[kind], str(path))
    for what, found, expected in (
        ("channels of a latent", config.z_dim, like.z_dim),
        ("pixels on a side of a latent pixel", config.spatial_stride, like.spatial_stride),
        ("frames of a latent", config.temporal_stride, like.temporal_stride),
    ):
        if found != expected:
            raise ConfigError(f"{path}: the tiny decoder has {found} {what}, the model's own VAE {expected}")
    check_tensors(tensors, tiny_decoder_shapes(config), str(path))
    return TinyVae(path, kind, config, tensors)


def _find(folder: Path) -> Path:
    """The one tiny decoder in a model's folder."""
    paths = [folder / f"{kind}{suffix}" for kind in (TAEW, LIGHTTAEW) for suffix in _SUFFIXES]
    found = [path for path in paths if path.exists()]
    if len(found) != 1:
        wanted = f"a tiny decoder, {_USUAL_FILES}" if not found else "one tiny decoder"
        there = " and ".join(path.name for path in found) or "none of them"
        raise WeightsError(f"{folder}: expected {wanted}, found {there}: have one there, or give its path")
    return found[0]


def _config_of(tensors: Mapping[str, Tensor], normalized: bool, source: str) -> TinyVaeConfig:
    """The sizes of the decoder in ``tensors``, as far as its convolutions say; the rest is for ``check_tensors``."""

    def shape(module: str) -> tuple[int, ...]:
        return shape_of(tensors, f"{module}.weight", 4, source, _WHAT)

    width, z_dim = shape(STEM)[:2]
    widths, growth = [width], list[int]()
    for level in itertools.count():
        _, growth_name, outlet = level_names(level)
        if f"{outlet}.weight" not in tensors:
            break
        rows = shape(growth_name)[0]
        if rows % widths[-1]:
            raise WeightsError(
                f"{source}: expected {_WHAT} with a multiple of {widths[-1]} rows in {growth_name}.weight, found {rows}"
            )
        growth.append(rows // widths[-1])
        widths.append(shape(outlet)[0])
    return TinyVaeConfig(z_dim=z_dim, widths=tuple(widths), growth=tuple(growth), normalized=normalized)
