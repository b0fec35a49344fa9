"""The keys of LoRA files, in every naming: the module of the transformer, and the part of its change.

Every naming is a row of a table. A module is looked up by its name with ``_`` for ``.``, so one table holds Wan's
names, those of diffusers and the flat ones of kohya's trainers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from echo_rt.weights.keymaps import transformer_key_map
from echo_rt.weights.tensors import without_wrappers

DOWN, UP, UP_BIAS, ALPHA = "down", "up", "up_bias", "alpha"
# Differences are called by the tensor of the module that they change.
WEIGHT, BIAS = "weight", "bias"

# What trainers put before a module's name, in any order and number.
_PREFIXES = (
    "base_model.model.",
    "diffusion_model.",
    "transformer.",
    "pipe.dit.",
    "model.",
    "unet.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)
_FACTORS = {
    "lora_A": DOWN,
    "lora_B": UP,
    "lora_down": DOWN,
    "lora_up": UP,
    "lora.down": DOWN,
    "lora.up": UP,
    "lora_linear_layer.down": DOWN,
    "lora_linear_layer.up": UP,
}
_DIFFERENCES = {"diff": WEIGHT, "w_norm": WEIGHT, "diff_b": BIAS, "b_norm": BIAS}
# Names of alpha: alone that of all modules, behind a module's name the alpha of that module.
ALPHA_FIELDS = ("lora_alpha", "network_alpha", "ss_network_alpha", "alpha")
# Other methods, which do not add a product of two factors, by how the names of their tensors begin.
_OTHER_METHODS = {
    "DoRA": ("dora_scale", "lora_magnitude_vector"),
    "LoKr": ("lokr_",),
    "LoHa": ("hada_",),
    "OFT": ("oft_",),
    "LoCon's Tucker decomposition": ("lora_mid",),
}
# Modules that only image-to-video models have, in Wan's names and those of diffusers.
_IMAGE_MODULES = ("k_img", "v_img", "img_emb", "add_k_proj", "add_v_proj", "norm_added_k", "image_embedder")


def _either(names: Iterable[str]) -> str:
    return "|".join(map(re.escape, names))


# PEFT puts the adapter's name, mostly "default", between the factor and "weight", or leaves it out.
_FACTOR = re.compile(rf"(?P<module>.+?)\.(?P<part>{_either(_FACTORS)})(\.(?!bias$)[^.]+)?(\.weight|(?P<bias>\.bias))?")
_DIFFERENCE = re.compile(rf"(?P<module>.+)\.(?P<part>{_either(_DIFFERENCES)})")
_ALPHA = re.compile(rf"((?P<module>.+)\.)?({_either(ALPHA_FIELDS)})")
_METHODS = {method: re.compile(rf"\.({_either(starts)})") for method, starts in _OTHER_METHODS.items()}
_IMAGE = re.compile(_either(_IMAGE_MODULES))


class LoraKey(NamedTuple):
    """A key taken apart: the module without prefixes (``""``: all modules), and the part of its change."""

    module: str
    part: str


def parse_key(name: str) -> LoraKey | None:
    """Take the key ``name`` of a LoRA file apart; None for a key that is no part of a LoRA."""
    name = without_wrappers(name)
    while prefix := next((prefix for prefix in _PREFIXES if name.startswith(prefix)), ""):
        name = name.removeprefix(prefix)
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
    key = parse_key(name)
    return key is not None and key.part in (DOWN, UP)


def other_method(name: str) -> str | None:
    """The method other than LoRA that has tensors of this name; None where there is none."""
    return next((method for method, pattern in _METHODS.items() if pattern.search(name)), None)


def is_of_images(module: str) -> bool:
    """Return whether only image-to-video models have a module of this name."""
    return _IMAGE.search(module) is not None


def module_names(tensors: Iterable[str]) -> dict[str, str]:
    """Every name, with ``_`` for ``.``, of the modules of these ``tensors`` (Wan's names) -> Wan's name."""
    key_map = transformer_key_map()
    modules: dict[str, str] = {}
    for name in tensors:
        module = module_of(name)
        modules |= {other.replace(".", "_"): module for other in (module, module_of(key_map.to_other(name)))}
    return modules


def known(module: str, names: Mapping[str, str]) -> str:
    """Wan's name of a file's ``module``, by :func:`module_names`; ``module`` itself where the model lacks it."""
    return names.get(module.replace(".", "_"), module)


def module_of(tensor: str) -> str:
    """The module that a tensor belongs to; a bare parameter, such as a modulation, is its own."""
    return tensor.removesuffix(f".{WEIGHT}").removesuffix(f".{BIAS}")
