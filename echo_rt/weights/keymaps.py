"""Tables of tensor names: models of other programs, training checkpoints and LoRAs.

A row of a key map pairs two modules; what follows a module's name (``.weight``, ``.bias``, nothing for a bare
parameter) is the same on both sides. ``#`` stands for the first number of a name, the layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import NamedTuple

from torch import Tensor

from echo_rt.config import VaeConfig
from echo_rt.errors import WeightsError
from echo_rt.weights.tensors import RenamedTensors, rename, selected

Rows = tuple[tuple[str, str], ...]

_ATTENTION: Rows = (*((x, f"to_{x}") for x in "qkv"), ("o", "to_out.0"), ("norm_q", "norm_q"), ("norm_k", "norm_k"))
_TRANSFORMER: Rows = (
    ("patch_embedding", "patch_embedding"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("head.head", "proj_out"),
    ("head.modulation", "scale_shift_table"),
    ("blocks.#.modulation", "blocks.#.scale_shift_table"),
    *((f"blocks.#.self_attn.{a}", f"blocks.#.attn1.{b}") for a, b in _ATTENTION),
    *((f"blocks.#.cross_attn.{a}", f"blocks.#.attn2.{b}") for a, b in _ATTENTION),
    # The norm before cross-attention: third in Wan's source, second in the order it is used.
    ("blocks.#.norm3", "blocks.#.norm2"),
    ("blocks.#.ffn.0", "blocks.#.ffn.net.0.proj"),
    ("blocks.#.ffn.2", "blocks.#.ffn.net.2"),
)
_SELF_ATTENTION, _FEED_FORWARD = "encoder.block.#.layer.0", "encoder.block.#.layer.1"
# Wan, transformers, llama.cpp (whose names GGUF files have).
_UMT5 = (
    ("token_embedding", "shared", "token_embd"),
    ("norm", "encoder.final_layer_norm", "enc.output_norm"),
    ("blocks.#.norm1", f"{_SELF_ATTENTION}.layer_norm", "enc.blk.#.attn_norm"),
    *((f"blocks.#.attn.{x}", f"{_SELF_ATTENTION}.SelfAttention.{x}", f"enc.blk.#.attn_{x}") for x in "qkvo"),
    (
        "blocks.#.pos_embedding.embedding",
        f"{_SELF_ATTENTION}.SelfAttention.relative_attention_bias",
        "enc.blk.#.attn_rel_b",
    ),
    ("blocks.#.norm2", f"{_FEED_FORWARD}.layer_norm", "enc.blk.#.ffn_norm"),
    ("blocks.#.ffn.gate.0", f"{_FEED_FORWARD}.DenseReluDense.wi_0", "enc.blk.#.ffn_gate"),
    ("blocks.#.ffn.fc1", f"{_FEED_FORWARD}.DenseReluDense.wi_1", "enc.blk.#.ffn_up"),
    ("blocks.#.ffn.fc2", f"{_FEED_FORWARD}.DenseReluDense.wo", "enc.blk.#.ffn_down"),
)
_RESIDUAL: Rows = (
    ("residual.0", "norm1"),
    ("residual.2", "conv1"),
    ("residual.3", "norm2"),
    ("residual.6", "conv2"),
    ("shortcut", "conv_shortcut"),
)
_RESAMPLE: Rows = (("resample.1", "resample.1"), ("time_conv", "time_conv"))
_MIDDLE: Rows = (
    *((f"0.{a}", f"resnets.0.{b}") for a, b in _RESIDUAL),
    ("1", "attentions.0"),
    *((f"2.{a}", f"resnets.1.{b}") for a, b in _RESIDUAL),
)
_VAE: Rows = (
    ("conv1", "quant_conv"),
    ("conv2", "post_quant_conv"),
    *(
        (f"{half}.{a}", f"{half}.{b}")
        for half in ("encoder", "decoder")
        for a, b in (
            ("conv1", "conv_in"),
            *((f"middle.{a}", f"mid_block.{b}") for a, b in _MIDDLE),
            ("head.0", "norm_out"),
            ("head.2", "conv_out"),
        )
    ),
    # The encoder is one flat list on both sides.
    *((f"encoder.downsamples.#.{a}", f"encoder.down_blocks.#.{b}") for a, b in (*_RESIDUAL, *_RESAMPLE)),
)


class KeyMap:
    """The two names of every tensor of a model part, and the way from each to the other."""

    def __init__(self, rows: Iterable[tuple[str, str]]) -> None:
        self._to_other = dict(rows)
        self._to_original = {other: original for original, other in self._to_other.items()}
        assert len(self._to_other) == len(self._to_original), "two modules of one layout share a name in the other"

    def to_other(self, name: str) -> str:
        """The name in the other layout of the tensor with this original name; ``WeightsError`` if there is none."""
        return _translate(name, self._to_other)

    def to_original(self, name: str) -> str:
        """The original name of the tensor with this name in the other layout; ``WeightsError`` if there is none."""
        return _translate(name, self._to_original)

    def originals(self, tensors: Mapping[str, Tensor]) -> RenamedTensors:
        """A view of those ``tensors`` (names of the other layout) that have an original name, under it."""
        names = {}
        for name in tensors:
            with suppress(WeightsError):
                names[self.to_original(name)] = name
        return RenamedTensors(tensors, names)


def _translate(name: str, table: Mapping[str, str]) -> str:
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts))
    for end in range(len(parts), 0, -1):
        module, rest = parts[:end], "".join(f".{part}" for part in parts[end:])
        exact = table.get(".".join(module))
        if exact is not None:
            return exact + rest
        if number < end:
            generic = table.get(".".join([*module[:number], "#", *module[number + 1 :]]))
            if generic is not None:
                return generic.replace("#", parts[number]) + rest
    raise WeightsError(f"{name}: expected a tensor of the model, found a name of none")


# Wan's transformer and diffusers' WanTransformer3DModel; Wan's umT5 and UMT5EncoderModel of transformers, or GGUF's T5.
TRANSFORMER_KEYS = KeyMap(_TRANSFORMER)
UMT5_KEYS = KeyMap((wan, other) for wan, other, _ in _UMT5)
UMT5_GGUF_KEYS = KeyMap((wan, other) for wan, _, other in _UMT5)


def vae_keys(config: VaeConfig | None) -> KeyMap:
    """The VAE: Wan and diffusers' ``AutoencoderKLWan``.

    The original decoder is one flat list; diffusers groups it into levels, so their sizes decide the names. Without a
    config the decoder's levels are left out.
    """
    levels, resnets = (0, 0) if config is None else (len(config.dim_mult), config.num_res_blocks + 1)
    modules: list[tuple[str, Rows]] = []
    for level in range(levels):
        block = f"decoder.up_blocks.{level}"
        modules += ((f"{block}.resnets.{resnet}", _RESIDUAL) for resnet in range(resnets))
        if level < levels - 1:
            modules.append((f"{block}.upsamplers.0", _RESAMPLE))
    flat = [
        (f"decoder.upsamples.{index}.{a}", f"{module}.{b}")
        for index, (module, names) in enumerate(modules)
        for a, b in names
    ]
    return KeyMap((*_VAE, *flat))


# Modules that training wraps around others and that leave their names in the keys.
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
# What the trained object as a whole is called: PEFT's wrapper, then the diffusion wrapper's attribute.
_OWNERS = ("base_model.model.", "model.")
# Dicts and modules that a whole model lies in, Lightning's and ComfyUI's among them. One may lie in another.
_HOLDERS = (*_OWNERS, "state_dict.", "module.", "diffusion_model.")
# Dicts of a training run beside the model: the state of its optimizers, and a model that is not generated with.
_TRAINING = ("optimizer", "generator_optimizer", "critic_optimizer", "optimizer_states", "lr_schedulers", "critic")
# Tensors that are no weights: a tokenizer inside ComfyUI's text encoders.
_BAGGAGE = ("spiece_model",)
# What trainers of LoRAs put before a module's name, in any order and number.
_FLAT = ("lora_unet_", "lora_transformer_", "lycoris_")
_LORA_HOLDERS = (*_HOLDERS, "transformer.", "pipe.dit.", "unet.", *_FLAT)


def without_wrappers(name: str) -> str:
    """The name of a tensor in the bare model: FSDP's, PEFT's and the trainer's own prefixes taken off."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    for owner in _OWNERS:
        name = name.removeprefix(owner)
    return name


def _bare(name: str, holders: tuple[str, ...]) -> str:
    name = without_wrappers(name)
    while holder := next((holder for holder in holders if name.startswith(holder)), None):
        name = name.removeprefix(holder)
    return name


def bare(tensors: Mapping[str, Tensor], source: str) -> RenamedTensors:
    """A whole model's tensors under their bare names, without what a training run or ComfyUI saves beside them."""

    def is_weight(name: str) -> bool:
        return name.split(".", 1)[0] not in _TRAINING and _bare(name, _HOLDERS) not in _BAGGAGE

    return rename(selected(tensors, is_weight), lambda name: _bare(name, _HOLDERS), source)


DOWN, UP, UP_BIAS, ALPHA = "down", "up", "up_bias", "alpha"
# Differences are called by the tensor of the module that they change.
WEIGHT, BIAS = "weight", "bias"

_FACTORS = {
    **dict.fromkeys(("lora_A", "lora_down", "lora.down", "lora_linear_layer.down"), DOWN),
    **dict.fromkeys(("lora_B", "lora_up", "lora.up", "lora_linear_layer.up"), UP),
}
_DIFFERENCES = {"diff": WEIGHT, "w_norm": WEIGHT, "diff_b": BIAS, "b_norm": BIAS}
# Names of alpha: alone that of all modules, behind a module's name the alpha of that module.
ALPHA_FIELDS = ("lora_alpha", "network_alpha", "ss_network_alpha", "alpha")
# Other methods, which do not add a product of two factors, by how the names of their tensors begin.
OTHER_METHODS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "oft_": "OFT",
    "lora_mid": "LoCon's Tucker decomposition",
}
# Modules that only image-to-video models have, in Wan's names and those of diffusers.
IMAGE_MODULES = ("k_img", "v_img", "img_emb", "add_k_proj", "add_v_proj", "norm_added_k", "image_embedder")


def _either(names: Iterable[str]) -> str:
    return "|".join(map(re.escape, names))


# PEFT puts the adapter's name, mostly "default", between the factor and "weight", or leaves it out.
_FACTOR = re.compile(rf"(?P<module>.+?)\.(?P<part>{_either(_FACTORS)})(\.(?!bias$)[^.]+)?(\.weight|(?P<bias>\.bias))?")
_DIFFERENCE = re.compile(rf"(?P<module>.+)\.(?P<part>{_either(_DIFFERENCES)})")
_ALPHA = re.compile(rf"((?P<module>.+)\.)?({_either(ALPHA_FIELDS)})")


class LoraKey(NamedTuple):
    """A key taken apart: the module without prefixes (``""``: all modules), and the part of its change."""

    module: str
    part: str


def parse_lora_key(name: str) -> LoraKey | None:
    """Take the key ``name`` of a LoRA file apart; None for a key that is no part of a LoRA."""
    name = _bare(name, _LORA_HOLDERS)
    # LightX2V's difference of a modulation, which is a bare parameter of the module.
    if name.endswith(".diff_m"):
        name = f"{name.removesuffix('.diff_m')}.modulation.diff"
    if found := _FACTOR.fullmatch(name):
        part = _FACTORS[found["part"]]
        if found["bias"]:
            return LoraKey(found["module"], UP_BIAS) if part == UP else None
        return LoraKey(found["module"], part)
    if found := _DIFFERENCE.fullmatch(name):
        return LoraKey(found["module"], _DIFFERENCES[found["part"]])
    if found := _ALPHA.fullmatch(name):
        return LoraKey(found["module"] or "", ALPHA)
    return None


def is_factor(name: str) -> bool:
    """Return whether a tensor of this name is a LoRA's factor, in any naming."""
    key = parse_lora_key(name)
    return key is not None and key.part in (DOWN, UP)


def module_names(tensors: Iterable[str]) -> dict[str, str]:
    """Every name, with ``_`` for ``.``, of the modules of these ``tensors`` (Wan's names) -> Wan's name.

    So one table holds Wan's names, those of diffusers and the flat ones of kohya's trainers.
    """
    modules: dict[str, str] = {}
    for name in tensors:
        module = _module_of(name)
        others = (module, _module_of(TRANSFORMER_KEYS.to_other(name)))
        modules |= {other.replace(".", "_"): module for other in others}
    return modules


def _module_of(tensor: str) -> str:
    """The module that a tensor belongs to; a bare parameter, such as a modulation, is its own."""
    return tensor.removesuffix(f".{WEIGHT}").removesuffix(f".{BIAS}")
