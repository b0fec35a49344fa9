"""The networks of a model as files hold them: under which names, of what size, and what a file is that is none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor

from echo_rt.config import TextEncoderConfig, TransformerConfig, VaeConfig
from echo_rt.errors import WeightsError
from echo_rt.utils.wording import counted
from echo_rt.weights.files import check_tensors, open_tensors
from echo_rt.weights.from_shapes import check_depth, text_encoder_config_of, transformer_config_of, vae_config_of
from echo_rt.weights.keymaps import (
    KeyMap,
    gguf_text_encoder_key_map,
    text_encoder_key_map,
    transformer_key_map,
    vae_key_map,
)
from echo_rt.weights.shapes import Shapes, text_encoder_shapes, transformer_shapes, vae_shapes
from echo_rt.weights.tensors import RenamedTensors, bare

Config = TypeVar("Config", TransformerConfig, VaeConfig, TextEncoderConfig)

# transformers' second name for the token table; older versions write both.
_TABLE, _TABLE_AGAIN = "shared.weight", "encoder.embed_tokens.weight"

# What a file is, by a piece of a name that others have not; the first that fits.
_SIGNS = (
    ("generator.", "a generator checkpoint, which is given as the checkpoint"),
    ("generator_ema.", "a generator checkpoint, which is given as the checkpoint"),
    ("lora_", "a LoRA, which is given as the LoRA"),
    ("img_emb.", "a Wan image-to-video transformer"),
    ("image_embedder.", "a Wan image-to-video transformer"),
    ("vace_", "a Wan VACE transformer"),
    (".qweight", "weights quantized with GPTQ or AWQ: give them in 16 bits, float8 or GGUF"),
    (".absmax", "weights quantized with bitsandbytes: give them in 16 bits, float8 or GGUF"),
    ("condition_embedder.", "a Wan transformer"),
    ("time_projection.", "a Wan transformer"),
    (".downsamples.0.downsamples.", "the VAE of Wan2.2 5B"),
    ("encoder.down_blocks.0.conv1.", "the Wan2.1 VAE"),
    ("encoder.downsamples.", "the Wan2.1 VAE"),
    ("decoder.conv_in.", "the VAE of an image model"),
    ("query_init", "a memory encoder"),
    (".SelfAttention.", "a T5 text encoder"),
    ("enc.blk.", "a T5 text encoder"),
    ("token_embedding.", "a T5 text encoder"),
    ("decoder.1.", "a tiny decoder, which is given as the vae"),
    ("visual.", "a CLIP image encoder"),
    ("vision_model.", "a CLIP image encoder"),
    ("text_model.", "a CLIP text encoder"),
    ("double_blocks.", "a transformer of Flux or HunyuanVideo"),
    ("joint_blocks.", "a transformer of Stable Diffusion 3"),
    ("input_blocks.", "a UNet of Stable Diffusion"),
    ("layers.0.self_attn.", "a language model"),
)
# Of them those that may be the very network that is looked for, under names that are not known.
_OWN = ("a Wan transformer", "the Wan2.1 VAE", "a T5 text encoder")
# Of them those that have all that a Wan2.1 model has, and more.
_EXTENDED = ("img_emb.", "image_embedder.", "vace_", ".downsamples.0.downsamples.", ".qweight", ".absmax")


def what_is(tensors: Mapping[str, Tensor]) -> str:
    """What a file with these tensors is, for a message."""
    known = next((what for sign, what in _SIGNS if any(sign in name for name in tensors)), None)
    return known or f"{counted(len(tensors), 'tensor')} ({', '.join(sorted(tensors)[:3]) or 'none'})"


@dataclass(frozen=True)
class _Naming(Generic[Config]):
    """One set of names for a network: ``marks``, of which a file has one at least, and the way to the original names.

    ``key_map`` takes the config, or None where only the names that sizes are read off are wanted; None for the
    original names themselves.
    """

    marks: tuple[str, ...]
    key_map: Callable[[Config | None], KeyMap] | None = None


@dataclass(frozen=True)
class Part(Generic[Config]):
    """One network: what it is called, its namings (the first that fits a file holds), its sizes and tensors."""

    what: str
    namings: tuple[_Naming[Config], ...]
    config_of: Callable[[Mapping[str, Tensor], str], Config]
    shapes_of: Callable[[Config], Shapes]
    depth_of: Callable[[Config], int]


TRANSFORMER: Part[TransformerConfig] = Part(
    "a Wan2.1 text-to-video transformer",
    (
        _Naming(
            ("condition_embedder.time_proj.weight", "condition_embedder.text_embedder.linear_1.weight"),
            lambda _: transformer_key_map(),
        ),
        _Naming(("patch_embedding.weight", "time_projection.1.weight")),
    ),
    transformer_config_of,
    transformer_shapes,
    lambda config: config.num_layers,
)
VAE: Part[VaeConfig] = Part(
    "the Wan2.1 VAE",
    (
        _Naming(("encoder.conv1.weight", "decoder.conv1.weight")),
        _Naming(("encoder.down_blocks.0.conv1.weight", "decoder.up_blocks.0.resnets.0.conv1.weight"), vae_key_map),
    ),
    vae_config_of,
    vae_shapes,
    lambda config: len(config.dim_mult) * config.num_res_blocks,
)
TEXT_ENCODER: Part[TextEncoderConfig] = Part(
    "a umT5 text encoder",
    (
        _Naming(("token_embedding.weight",)),
        _Naming((_TABLE, _TABLE_AGAIN), lambda _: text_encoder_key_map()),
        _Naming(("token_embd.weight",), lambda _: gguf_text_encoder_key_map()),
    ),
    text_encoder_config_of,
    text_encoder_shapes,
    lambda config: config.num_layers,
)


class PartTensors(Generic[Config]):
    """The tensors of one network, under whichever of its names; ``source`` is what messages call them.

    ``named``: those that have an original name, under it; all that sizes are read off.

    Errors: ``WeightsError`` for tensors of something else, which is named.
    """

    def __init__(self, part: Part[Config], tensors: Mapping[str, Tensor], source: str) -> None:
        naming = next((n for n in part.namings if any(mark in tensors for mark in n.marks)), None)
        if naming is None or any(sign in name for name in tensors for sign in _EXTENDED):
            came = what_is(tensors)
            below = _below(part, tensors) if came in _OWN else None
            if below is not None:
                came = f"one whose names begin with {below!r}: take that off them"
            raise WeightsError(f"{source}: expected {part.what}, came {came}")
        self._part: Part[Config] = part
        self._key_map: Callable[[Config | None], KeyMap] | None = naming.key_map
        self._source, self._tensors = source, _without_tied_table(tensors, source)
        self.named = self._tensors if naming.key_map is None else naming.key_map(None).originals(self._tensors)

    def config(self) -> Config:
        """Its sizes, read off the tensors' shapes; ``WeightsError`` where they do not say them."""
        return self._part.config_of(self.named, self._source)

    def original(self, config: Config) -> Mapping[str, Tensor]:
        """All tensors under the original names; ``WeightsError`` unless they are exactly those of ``config``.

        The message has the names that the file itself uses: those are the ones its owner can look for.
        """
        check_depth(self._part.depth_of(config), self._tensors, self._source, self._part.what)
        shapes = self._part.shapes_of(config)
        if self._key_map is None:
            check_tensors(self._tensors, shapes, self._source)
            return self._tensors
        key_map = self._key_map(config)
        check_tensors(self._tensors, key_map.to_other_shapes(shapes), self._source)
        return key_map.original_view(self._tensors, shapes)


def open_part(part: Part[Config], path: Path, *, widen_to: torch.dtype = torch.float32) -> PartTensors[Config]:
    """The tensors of ``part`` in a file, without trainers' and other programs' prefixes.

    ``path`` and ``widen_to`` as for :func:`echo_rt.weights.files.open_tensors`, whose errors it raises too.
    """
    file = open_tensors(path, widen_to=widen_to)
    return PartTensors(part, bare(file, str(file.path)), str(file.path))


def _below(part: Part[Config], tensors: Mapping[str, Tensor]) -> str | None:
    """What stands before the names of ``part`` in a file that has them below another one; None where it does not."""
    marks = tuple(f".{mark}" for naming in part.namings for mark in naming.marks)
    return next((name.removesuffix(mark) + "." for name in tensors for mark in marks if name.endswith(mark)), None)


def _without_tied_table(tensors: Mapping[str, Tensor], source: str) -> Mapping[str, Tensor]:
    """``tensors`` with a umT5's token table under one name only; anything else as it is."""
    if _TABLE_AGAIN not in tensors:
        return tensors
    names = {name: name for name in tensors if name != _TABLE_AGAIN}
    again = tensors[_TABLE_AGAIN]
    table = tensors.get(_TABLE)
    if table is None:
        names[_TABLE] = _TABLE_AGAIN
    elif table.dtype != again.dtype or not torch.equal(table, again):
        raise WeightsError(f"{source}: expected {_TABLE} and {_TABLE_AGAIN} to be one table, came two that differ")
    return RenamedTensors(tensors, names)
