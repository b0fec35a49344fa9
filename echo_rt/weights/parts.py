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
from echo_rt.weights.keymaps import TRANSFORMER_KEYS, UMT5_GGUF_KEYS, UMT5_KEYS, KeyMap, bare, vae_keys
from echo_rt.weights.shapes import (
    Shapes,
    check_depth,
    text_encoder_config_of,
    text_encoder_shapes,
    transformer_config_of,
    transformer_shapes,
    vae_config_of,
    vae_shapes,
)
from echo_rt.weights.tensors import RenamedTensors, rename, selected

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
# Of them those that have all that a Wan2.1 model has, and more.
_EXTENDED = ("img_emb.", "image_embedder.", "vace_", ".downsamples.0.downsamples.", ".qweight", ".absmax")


def _what_is(tensors: Mapping[str, Tensor]) -> str:
    """What a file with these tensors is, for a message."""
    known = next((what for sign, what in _SIGNS if any(sign in name for name in tensors)), None)
    return known or f"{counted(len(tensors), 'tensor')} ({', '.join(sorted(tensors)[:3]) or 'none'})"


# From a config, or from None where only the names that sizes are read off are wanted, to the names of a file.
_Naming = Callable[[Config | None], KeyMap]


@dataclass(frozen=True)
class Part(Generic[Config]):
    """One network: what it is called, by layouts and in messages, its sizes and tensors.

    ``namings``: names of which a file has one at least -> its naming, None for the original names; the first that fits
    holds. ``widen_to``: the dtype in which quantized tensors come.
    """

    name: str
    what: str
    namings: Mapping[tuple[str, ...], _Naming[Config] | None]
    config_of: Callable[[Mapping[str, Tensor], str], Config]
    shapes_of: Callable[[Config], Shapes]
    depth_of: Callable[[Config], int]
    widen_to: torch.dtype = torch.float32


TRANSFORMER: Part[TransformerConfig] = Part(
    "transformer",
    "a Wan2.1 text-to-video transformer",
    {
        ("condition_embedder.time_proj.weight", "condition_embedder.text_embedder.linear_1.weight"): (
            lambda _: TRANSFORMER_KEYS
        ),
        ("patch_embedding.weight", "time_projection.1.weight"): None,
    },
    transformer_config_of,
    transformer_shapes,
    lambda config: config.num_layers,
)
VAE: Part[VaeConfig] = Part(
    "vae",
    "the Wan2.1 VAE",
    {
        ("encoder.conv1.weight", "decoder.conv1.weight"): None,
        ("encoder.down_blocks.0.conv1.weight", "decoder.up_blocks.0.resnets.0.conv1.weight"): vae_keys,
    },
    vae_config_of,
    vae_shapes,
    lambda config: len(config.dim_mult) * config.num_res_blocks,
)
TEXT_ENCODER: Part[TextEncoderConfig] = Part(
    "text_encoder",
    "a umT5 text encoder",
    {
        ("token_embedding.weight",): None,
        (_TABLE, _TABLE_AGAIN): lambda _: UMT5_KEYS,
        ("token_embd.weight",): lambda _: UMT5_GGUF_KEYS,
    },
    text_encoder_config_of,
    text_encoder_shapes,
    lambda config: config.num_layers,
    # It is kept as it is stored or narrower: what was quantized takes no more room than the released file.
    widen_to=torch.bfloat16,
)


class PartTensors(Generic[Config]):
    """The tensors of one network, under whichever of its names; ``source`` is what messages call them.

    ``named``: those that have an original name, under it; all that sizes are read off.

    Errors: ``WeightsError`` for tensors of something else, which is named.
    """

    def __init__(self, part: Part[Config], tensors: Mapping[str, Tensor], source: str) -> None:
        fits = [naming for marks, naming in part.namings.items() if any(mark in tensors for mark in marks)]
        if not fits or any(sign in name for name in tensors for sign in _EXTENDED):
            raise WeightsError(f"{source}: expected {part.what}, found {_what_is(tensors)}")
        self._part: Part[Config] = part
        self._naming: _Naming[Config] | None = fits[0]
        self._source, self._tensors = source, _without_tied_table(tensors, source)
        self.named: Mapping[str, Tensor] = (
            self._tensors if self._naming is None else self._naming(None).originals(self._tensors)
        )

    def config(self) -> Config:
        """Its sizes, read off the tensors' shapes; ``WeightsError`` where they do not say them."""
        return self._part.config_of(self.named, self._source)

    def original(self, config: Config | None = None) -> Mapping[str, Tensor]:
        """All tensors under the original names; ``WeightsError`` unless they are exactly those of ``config``.

        None takes the sizes from the shapes. The message has the names that the file itself uses: those are the ones
        its owner can look for.
        """
        if config is None:
            config = self.config()
        check_depth(self._part.depth_of(config), self._tensors, self._source, self._part.what)
        shapes = self._part.shapes_of(config)
        if self._naming is None:
            check_tensors(self._tensors, shapes, self._source)
            return self._tensors
        key_map = self._naming(config)
        others = {name: key_map.to_other(name) for name in shapes}
        check_tensors(self._tensors, {others[name]: shape for name, shape in shapes.items()}, self._source)
        return RenamedTensors(self._tensors, others)


def open_part(part: Part[Config], path: Path) -> PartTensors[Config]:
    """The tensors of ``part`` in a file, without trainers' and other programs' prefixes.

    ``path`` as for :func:`echo_rt.weights.files.open_tensors`, whose errors it raises too.
    """
    file = open_tensors(path, widen_to=part.widen_to)
    return PartTensors(part, bare(file, str(file.path)), str(file.path))


def _without_tied_table(tensors: Mapping[str, Tensor], source: str) -> Mapping[str, Tensor]:
    """``tensors`` with a umT5's token table under one name only; anything else as it is."""
    if _TABLE_AGAIN not in tensors:
        return tensors
    if _TABLE not in tensors:
        return rename(tensors, lambda name: _TABLE if name == _TABLE_AGAIN else name, source)
    table, again = tensors[_TABLE], tensors[_TABLE_AGAIN]
    if table.dtype != again.dtype or not torch.equal(table, again):
        raise WeightsError(f"{source}: expected {_TABLE} and {_TABLE_AGAIN} to be one table, found two that differ")
    return selected(tensors, lambda name: name != _TABLE_AGAIN)
