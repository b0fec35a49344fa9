"""The networks of a model as files hold them: what stands around their names, which names, and files of others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from echo_rt.config import TextEncoderConfig, TransformerConfig, VaeConfig
from echo_rt.errors import WeightsError
from echo_rt.utils.wording import counted
from echo_rt.weights.files import check_tensors
from echo_rt.weights.shapes import (
    ANY_TRANSFORMER,
    MEMORY_PREFIX,
    VAE_SIZES,
    Modules,
    names_of,
    tensors_of,
    text_encoder_config_of,
    text_encoder_modules,
    transformer_config_of,
    transformer_modules,
    vae_config_of,
    vae_modules,
)
from echo_rt.weights.tensors import LazyTensors, rename, selected

Config = TypeVar("Config", TransformerConfig, VaeConfig, TextEncoderConfig)

# Modules that training wraps around others and that leave their names in the keys.
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
# Dicts and modules that a whole model lies in: PEFT's wrapper, the diffusion wrapper's attribute, Lightning's and
# ComfyUI's. One may lie in another.
HOLDERS = ("base_model.model.", "model.", "state_dict.", "module.", "diffusion_model.")
# Dicts of a training run beside the model: the state of its optimizers, and a model that is not generated with.
_TRAINING = ("optimizer", "generator_optimizer", "critic_optimizer", "optimizer_states", "lr_schedulers", "critic")
# Tensors that are no weights: a tokenizer inside ComfyUI's text encoders.
_BAGGAGE = ("spiece_model",)

_MOST_LAYERS = 1025  # one more than a config may have
# transformers' second name for the token table; older versions write both.
_TABLE, _TABLE_AGAIN = "shared.weight", "encoder.embed_tokens.weight"

# What a file is, by pieces of names of which others have none; the first that fits.
_SIGNS = {
    "a generator checkpoint, which is given as the checkpoint": ("generator.", "generator_ema."),
    "a LoRA, which is given as the LoRA": ("lora_",),
    "a Wan image-to-video transformer": ("img_emb.", "image_embedder."),
    "a Wan VACE transformer": ("vace_",),
    "weights quantized with GPTQ or AWQ: give them in 16 bits, float8 or GGUF": (".qweight",),
    "weights quantized with bitsandbytes: give them in 16 bits, float8 or GGUF": (".absmax",),
    "a Wan transformer": ("condition_embedder.", "time_projection."),
    "the VAE of Wan2.2 5B": (".downsamples.0.downsamples.",),
    "the Wan2.1 VAE": ("encoder.down_blocks.0.conv1.", "encoder.downsamples."),
    "the VAE of an image model": ("decoder.conv_in.",),
    "a memory encoder": ("query_init",),
    "a T5 text encoder": (".SelfAttention.", "enc.blk.", "token_embedding."),
    "a tiny decoder, which is given as the vae": ("decoder.1.",),
    "a CLIP image encoder": ("visual.", "vision_model."),
    "a CLIP text encoder": ("text_model.",),
    "a transformer of Flux or HunyuanVideo": ("double_blocks.",),
    "a transformer of Stable Diffusion 3": ("joint_blocks.",),
    "a UNet of Stable Diffusion": ("input_blocks.",),
    "a language model": ("layers.0.self_attn.",),
}
# Of them those that may be the very network that is looked for, under names that are not known.
_OWN = ("a Wan transformer", "the Wan2.1 VAE", "a T5 text encoder")
# Of them those of models that have all that a Wan2.1 model has, and more.
_EXTENDED = ("img_emb.", "image_embedder.", "vace_", ".downsamples.0.downsamples.", ".qweight", ".absmax")


def _any_in(tensors: Mapping[str, Tensor], signs: tuple[str, ...]) -> bool:
    return any(sign in name for name in tensors for sign in signs)


@dataclass(frozen=True)
class Part(Generic[Config]):
    """One network: what it is called, by layouts and in messages, its sizes and tensors.

    ``layouts``: names of which a file has one at least -> the number of its layout; the first that fits holds.
    ``sizes``: what sizes are read off by ``config_of``. ``widen_to``: the dtype in which quantized tensors come.
    """

    name: str
    what: str
    layouts: Mapping[tuple[str, ...], int]
    modules: Callable[[Config], Modules]
    sizes: Modules
    config_of: Callable[[Mapping[str, Tensor], str], Config]
    widen_to: torch.dtype = torch.float32


TRANSFORMER: Part[TransformerConfig] = Part(
    "transformer",
    "a Wan2.1 text-to-video transformer",
    {
        ("condition_embedder.time_proj.weight", "condition_embedder.text_embedder.linear_1.weight"): 1,
        ("patch_embedding.weight", "time_projection.1.weight"): 0,
    },
    transformer_modules,
    transformer_modules(ANY_TRANSFORMER),
    transformer_config_of,
)
VAE: Part[VaeConfig] = Part(
    "vae",
    "the Wan2.1 VAE",
    {
        ("encoder.conv1.weight", "decoder.conv1.weight"): 0,
        ("encoder.down_blocks.0.conv1.weight", "decoder.up_blocks.0.resnets.0.conv1.weight"): 1,
    },
    vae_modules,
    VAE_SIZES,
    vae_config_of,
)
TEXT_ENCODER: Part[TextEncoderConfig] = Part(
    "text_encoder",
    "a umT5 text encoder",
    {("token_embedding.weight",): 0, (_TABLE, _TABLE_AGAIN): 1, ("token_embd.weight",): 2},
    text_encoder_modules,
    text_encoder_modules(TextEncoderConfig()),
    text_encoder_config_of,
    # It is kept as it is stored or narrower: what was quantized takes no more room than the released file.
    widen_to=torch.bfloat16,
)


class PartTensors(Generic[Config]):
    """The bare tensors of one network, under whichever of its names; ``source`` is what messages call them.

    ``named``: under their original names, all that sizes are read off.

    Errors: ``WeightsError`` for tensors of something else, which is named.
    """

    def __init__(self, part: Part[Config], tensors: LazyTensors, source: str) -> None:
        fits = [layout for marks, layout in part.layouts.items() if any(mark in tensors for mark in marks)]
        if not fits or _any_in(tensors, _EXTENDED):
            listed = f"{counted(len(tensors), 'tensor')} ({', '.join(sorted(tensors)[:3]) or 'none'})"
            found = next((what for what, signs in _SIGNS.items() if _any_in(tensors, signs)), listed)
            ends = tuple(f".{mark}" for marks in part.layouts for mark in marks)
            prefixes = [name.removesuffix(end) for name in tensors for end in ends if name.endswith(end)]
            if found in _OWN and prefixes:
                found = f"one whose names begin with {f'{prefixes[0]}.'!r}: take that off them"
            raise WeightsError(f"{source}: expected {part.what}, found {found}")
        self._part: Part[Config] = part
        self._layout, self._source = fits[0], source
        self._tensors = self.named = _without_tied_table(tensors, source)
        if self._layout:
            entries = self._tensors.entries
            names = names_of(part.sizes, min(len(entries), _MOST_LAYERS), self._layout)
            self.named = LazyTensors({name: entries[other] for name, other in names.items() if other in entries})

    def config(self) -> Config:
        """Sizes of the network, read off the tensors' shapes; ``WeightsError`` where they do not say them."""
        return self._part.config_of(self.named, self._source)

    def original(self, config: Config | None = None) -> LazyTensors:
        """All tensors under the original names; ``WeightsError`` unless they are exactly those of ``config``.

        None takes the sizes from the shapes. The message has the names that the file itself uses: those are the ones
        its owner can look for.
        """
        config = config or self.config()
        expected = list(tensors_of(self._part.modules(config), getattr(config, "num_layers", 0)))
        check_tensors(self._tensors, {names[self._layout]: shape for names, shape in expected}, self._source)
        return LazyTensors({names[0]: self._tensors.entries[names[self._layout]] for names, _ in expected})


def _without_tied_table(tensors: LazyTensors, source: str) -> LazyTensors:
    """``tensors`` with a umT5's token table under one name only; anything else as it is."""
    entries = dict(tensors.entries)
    again = entries.pop(_TABLE_AGAIN, None)
    if again is None:
        return tensors
    table, other = entries.setdefault(_TABLE, again).read(), again.read()
    if table.dtype != other.dtype or not torch.equal(table, other):
        raise WeightsError(f"{source}: expected {_TABLE} and {_TABLE_AGAIN} to be one table, found two that differ")
    return LazyTensors(entries)


def bare_name(name: str, holders: tuple[str, ...] = HOLDERS) -> str:
    """The name of a tensor in the bare model: without what training wraps around modules, and without ``holders``."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    while holder := next((holder for holder in holders if name.startswith(holder)), None):
        name = name.removeprefix(holder)
    return name


def bare(tensors: LazyTensors, source: str) -> LazyTensors:
    """A whole model's tensors under their bare names, without what a training run or ComfyUI saves beside them."""

    def is_weight(name: str) -> bool:
        return name.split(".", 1)[0] not in _TRAINING and bare_name(name) not in _BAGGAGE

    return rename(selected(tensors, is_weight), bare_name, source)


def split_memory(tensors: LazyTensors, source: str) -> tuple[LazyTensors, LazyTensors]:
    """``tensors`` without the memory encoder's, and those apart, under their bare names without its prefix."""

    def is_memory(name: str) -> bool:
        return bare_name(name).startswith(MEMORY_PREFIX)

    def within(name: str) -> str:
        return bare_name(name).removeprefix(MEMORY_PREFIX)

    # Where the memory encoder is a dict of its own, its tensors may repeat the whole path to it.
    memory = rename(selected(tensors, is_memory), lambda name: within(within(name)), source)
    return selected(tensors, lambda name: not is_memory(name)), memory
