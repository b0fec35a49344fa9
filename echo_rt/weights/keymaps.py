"""Tables of what training and other programs put around tensors' names, and of the names of LoRAs."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

from echo_rt.weights.shapes import count_layers, transformer_names
from echo_rt.weights.tensors import LazyTensors, rename, selected

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


def bare(tensors: LazyTensors, source: str) -> LazyTensors:
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


def module_names(tensors: Collection[str]) -> dict[str, str]:
    """Every name, with ``_`` for ``.``, of the modules of these ``tensors`` (Wan's names) -> Wan's name.

    So one table holds Wan's names, those of diffusers and the flat ones of kohya's trainers.
    """
    modules: dict[str, str] = {}
    others = transformer_names(count_layers(tensors, "blocks."))
    for name in tensors:
        modules |= {_module_of(other).replace(".", "_"): _module_of(name) for other in (name, others[name])}
    return modules


def _module_of(tensor: str) -> str:
    """The module that a tensor belongs to; a bare parameter, such as a modulation, is its own."""
    return tensor.removesuffix(f".{WEIGHT}").removesuffix(f".{BIAS}")
