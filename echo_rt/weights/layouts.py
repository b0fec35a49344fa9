"""Places of a model's parts in Wan2.1's own folder, in diffusers' and among files like ComfyUI's, and their configs.

A part is called ``"transformer"``, ``"vae"`` or ``"text_encoder"``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echo_rt.config import Size, TextEncoderConfig, TransformerConfig, VaeConfig
from echo_rt.errors import WeightsError
from echo_rt.utils.checked_json import convert
from echo_rt.weights.shapes import configured

TRANSFORMER_CONFIG = "config.json"
TRANSFORMER_STEM = "diffusion_pytorch_model"
VAE_FILE = "Wan2.1_VAE.pth"
TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER_FOLDER = "google/umt5-xxl"
ORIGINAL_MARKS = (TRANSFORMER_CONFIG, VAE_FILE, TEXT_ENCODER_FILE)
DIFFUSERS_VAE_CONFIG = "vae/config.json"
DIFFUSERS_MARKS = ("transformer/config.json", DIFFUSERS_VAE_CONFIG, "text_encoder/config.json")


@dataclass(frozen=True)
class Format:
    """The config of one network as one program writes it.

    ``expected``: values of fields that tell ``what`` from other networks, each of which may be left out; ``required``
    and ``optional``: the program's name of a field -> ours; ``product``: our name of a size -> the two whole numbers
    that it is the product of; ``adapted``: what else the program means by a config.
    """

    what: str
    make: type
    expected: Mapping[str, tuple[Any, ...]]
    required: Mapping[str, str]
    optional: Mapping[str, str]
    product: tuple[str, str, str] | None = None
    adapted: Callable[[dict[str, Any]], dict[str, Any]] = dict

    def parse(self, config: dict[str, Any], path: Path) -> Any:
        """The sizes in ``config``, the content of ``path``; ``WeightsError``, which names it, for no such config."""
        config = self.adapted(config)
        for name, allowed in self.expected.items():
            if name in config and config[name] not in allowed:
                wanted = " or ".join(json.dumps(value) for value in allowed)
                found = json.dumps(config[name])
                raise WeightsError(f"{path}: expected {self.what} ({name} {wanted}), found {name} {found:.80}")
        size, *factors = self.product or ("",)
        needed = dict.fromkeys((*self.required, *factors))
        missing = [name for name in needed if name not in config]
        if missing:
            raise WeightsError(f"{path}: expected the fields {', '.join(needed)}, found no {', '.join(missing)}")
        stated = {ours: config[name] for name, ours in {**self.required, **self.optional}.items() if name in config}
        sizes = {name: tuple(value) if isinstance(value, list) else value for name, value in stated.items()}
        if factors:
            one, other = (convert(config[name], Size, f"{path}: {name}", WeightsError) for name in factors)
            sizes[size] = one * other
        return configured(self.make, path, **sizes)


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_WAN_TRANSFORMER = Format(
    "the config of a Wan2.1 text-to-video model",
    TransformerConfig,
    {"model_type": ("t2v",)},
    _same("dim", "ffn_dim", "freq_dim", "num_heads", "num_layers"),
    {"in_dim": "in_channels", "out_dim": "out_channels"} | _same("text_dim", "text_len", "patch_size", "eps"),
)
_DIFFUSERS_TRANSFORMER = Format(
    "the config of a Wan2.1 text-to-video transformer",
    TransformerConfig,
    {
        # The second is FastVideo's: the same tensors under the same names.
        "_class_name": ("WanTransformer3DModel", "CausalWanTransformer3DModel"),
        # Set only where images condition the video.
        "image_dim": (None,),
        "added_kv_proj_dim": (None,),
        "cross_attn_norm": (True,),
        "qk_norm": ("rms_norm_across_heads",),
    },
    {"num_attention_heads": "num_heads"} | _same("ffn_dim", "freq_dim", "num_layers", "in_channels"),
    _same("out_channels", "text_dim", "text_len", "patch_size", "eps"),
    ("dim", "num_attention_heads", "attention_head_dim"),
    # diffusers takes null for "as many as go in".
    lambda config: {**config, "out_channels": config.get("out_channels") or config.get("in_channels")},
)
_DIFFUSERS_VAE = Format(
    "the config of the Wan2.1 VAE",
    VaeConfig,
    {
        "_class_name": ("AutoencoderKLWan",),
        # What Wan2.2's VAE adds to this one.
        "is_residual": (False,),
        "patch_size": (None,),
        "attn_scales": ([],),
        "in_channels": (3,),
        "out_channels": (3,),
        "decoder_base_dim": (None,),
    },
    _same("base_dim", "z_dim"),
    # The misspelling is diffusers' own.
    {"temperal_downsample": "temporal_downsample"} | _same("dim_mult", "num_res_blocks", "latents_mean", "latents_std"),
    adapted=lambda config: {
        name: None if name == "decoder_base_dim" and value == config.get("base_dim") else value
        for name, value in config.items()
    },
)
_TRANSFORMERS_UMT5 = Format(
    "the config of a umT5 encoder",
    TextEncoderConfig,
    {"model_type": ("umt5",), "feed_forward_proj": ("gated-gelu",)},
    _same("vocab_size", "d_model", "d_ff", "num_heads", "num_layers"),
    {"layer_norm_epsilon": "eps"} | _same("relative_attention_num_buckets", "relative_attention_max_distance"),
    ("d_attn", "num_heads", "d_kv"),
)

# Of Wan's config of the transformer -> ours.
WAN_FIELDS = {**_WAN_TRANSFORMER.required, **_WAN_TRANSFORMER.optional}


@dataclass(frozen=True)
class Place:
    """The file of a part in one layout, or its stem, and its config, which the last of ``formats`` is by a mark."""

    file: str
    config: str | None = None
    formats: tuple[Format, ...] = ()


ORIGINAL = {
    "transformer": Place(TRANSFORMER_STEM, TRANSFORMER_CONFIG, (_WAN_TRANSFORMER, _DIFFUSERS_TRANSFORMER)),
    "vae": Place(VAE_FILE),
    "text_encoder": Place(TEXT_ENCODER_FILE),
}
DIFFUSERS = {
    "transformer": Place("transformer/diffusion_pytorch_model", DIFFUSERS_MARKS[0], (_DIFFUSERS_TRANSFORMER,)),
    "vae": Place("vae/diffusion_pytorch_model", DIFFUSERS_VAE_CONFIG, (_DIFFUSERS_VAE,)),
    "text_encoder": Place("text_encoder/model", DIFFUSERS_MARKS[2], (_TRANSFORMERS_UMT5,)),
}
TOKENIZERS = (TOKENIZER_FOLDER, "tokenizer", "umt5-xxl")  # of which one is enough

# ComfyUI's folders, those of its downloads (split_files) among them, and other names of the same files, in lower case.
ROOTS = (".", "models", "split_files")
OTHER_FILES = {
    "transformer": (re.compile(r"wan.*t2v.*1[._]3b"), ("diffusion_models", "unet")),
    "vae": (re.compile(r"wan_?(2[._]1)?_?vae"), ("vae",)),
    "text_encoder": (re.compile(r"umt5[_-]xxl"), ("text_encoders", "clip")),
}
OPTIONS = {"transformer": "model", "vae": "vae_file", "text_encoder": "text_encoder"}
