"""Places of a model's parts in Wan2.1's own folder, diffusers' or files like ComfyUI's, and the sizes in its configs.

A part is called ``"transformer"``, ``"vae"`` or ``"text_encoder"``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echo_rt.config import TextEncoderConfig, TransformerConfig, VaeConfig
from echo_rt.errors import WeightsError
from echo_rt.utils.wording import type_of
from echo_rt.weights.files import SUFFIXES, read_object
from echo_rt.weights.shapes import configured
from echo_rt.weights.tensors import first_names

TRANSFORMER_CONFIG = "config.json"
TRANSFORMER_STEM = "diffusion_pytorch_model"
VAE_FILE = "Wan2.1_VAE.pth"
TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER_FOLDER = "google/umt5-xxl"
ORIGINAL_MARKS = (TRANSFORMER_CONFIG, VAE_FILE, TEXT_ENCODER_FILE)
DIFFUSERS_VAE_CONFIG = "vae/config.json"
DIFFUSERS_MARKS = ("transformer/config.json", DIFFUSERS_VAE_CONFIG, "text_encoder/config.json")

_DEFAULTS_KEY = "echo_rt"
_WAN_FIELD = "freq_dim"  # both Wan's and diffusers' config of the transformer have it, and no other model's


@dataclass(frozen=True)
class _Format:
    """The config of one network as one program writes it.

    ``expected``: values of fields that tell ``what`` from other networks, each of which may be left out; ``required``
    and ``optional``: the program's name of a field -> ours; ``product``: our name of a size -> the two whole numbers
    that it is the product of.
    """

    what: str
    make: type
    expected: dict[str, tuple[Any, ...]]
    required: dict[str, str]
    optional: dict[str, str]
    product: tuple[str, str, str] | None = None

    def parse(self, config: Mapping[str, Any], path: Path, **more: tuple[Any, ...]) -> Any:
        """The sizes in ``config``, the content of ``path``; ``more`` are further values as in ``expected``.

        Errors: ``WeightsError``, which names file and field, for what is no such config.
        """
        for name, allowed in (self.expected | more).items():
            if name in config and config[name] not in allowed:
                wanted = " or ".join(json.dumps(value) for value in allowed)
                raise WeightsError(
                    f"{path}: expected {self.what} ({name} {wanted}), found {name} {json.dumps(config[name])}"
                )
        names = dict.fromkeys((*self.required, *(self.product or ())[1:]))
        missing = [name for name in names if name not in config]
        if missing:
            raise WeightsError(f"{path}: expected the fields {', '.join(names)}, found no {', '.join(missing)}")
        fields = {ours: config[name] for name, ours in (self.required | self.optional).items() if name in config}
        for name, value in fields.items():
            if not all(isinstance(number, (int, float)) for number in (value if isinstance(value, list) else [value])):
                raise WeightsError(
                    f"{path}: expected {name} to be a number or a list of numbers, found {json.dumps(value)}"
                )
        sizes = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
        if self.product is not None:
            size, *factors = self.product
            sizes[size] = _positive(config, factors[0], path) * _positive(config, factors[1], path)
        try:
            return configured(self.make, path, **sizes)
        except TypeError as error:
            raise WeightsError(
                f"{path}: expected the sizes of a model, found fields of another type ({error})"
            ) from error


def _positive(config: Mapping[str, Any], name: str, path: Path) -> int:
    value = config[name]
    if not isinstance(value, int) or value < 1:
        raise WeightsError(f"{path}: expected {name} to be a positive integer, found {value!r}")
    return value


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_WAN_TRANSFORMER = _Format(
    "the config of a Wan2.1 text-to-video model",
    TransformerConfig,
    {"model_type": ("t2v",)},
    _same("dim", "ffn_dim", "freq_dim", "num_heads", "num_layers"),
    {"in_dim": "in_channels", "out_dim": "out_channels"} | _same("text_dim", "text_len", "patch_size", "eps"),
)
_DIFFUSERS_TRANSFORMER = _Format(
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
)
_DIFFUSERS_VAE = _Format(
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
    },
    _same("base_dim", "z_dim"),
    # The misspelling is diffusers' own.
    {"temperal_downsample": "temporal_downsample"} | _same("dim_mult", "num_res_blocks", "latents_mean", "latents_std"),
)
_TRANSFORMERS_UMT5 = _Format(
    "the config of a umT5 encoder",
    TextEncoderConfig,
    {"model_type": ("umt5",), "feed_forward_proj": ("gated-gelu",)},
    _same("vocab_size", "d_model", "d_ff", "num_heads", "num_layers"),
    {"layer_norm_epsilon": "eps"} | _same("relative_attention_num_buckets", "relative_attention_max_distance"),
    ("d_attn", "num_heads", "d_kv"),
)


_Parse = Callable[[dict[str, Any], Path], Any]


def _diffusers_transformer(config: dict[str, Any], path: Path) -> Any:
    # diffusers takes null for "as many as go in".
    channels = config.get("out_channels") or config.get("in_channels")
    return _DIFFUSERS_TRANSFORMER.parse({**config, "out_channels": channels}, path)


def _any_transformer(config: dict[str, Any], path: Path) -> Any:
    if "num_attention_heads" in config:
        return _diffusers_transformer(config, path)
    return _WAN_TRANSFORMER.parse(config, path, in_dim=(config.get("out_dim"),), out_dim=(config.get("in_dim"),))


def _diffusers_vae(config: dict[str, Any], path: Path) -> Any:
    return _DIFFUSERS_VAE.parse(config, path, decoder_base_dim=(None, config.get("base_dim")))


@dataclass(frozen=True)
class _Places:
    """Names of a layout's files and configs, by part; ``tokenizers``: the folders, of which one is enough."""

    files: Mapping[str, str]
    configs: Mapping[str, tuple[str, str, _Parse]]
    tokenizers: tuple[str, ...]


_ORIGINAL = _Places(
    {"transformer": TRANSFORMER_STEM, "vae": VAE_FILE, "text_encoder": TEXT_ENCODER_FILE},
    {"transformer": (TRANSFORMER_CONFIG, _WAN_TRANSFORMER.what, _any_transformer)},
    (TOKENIZER_FOLDER, "tokenizer", "umt5-xxl"),
)
_DIFFUSERS = _Places(
    {
        "transformer": "transformer/diffusion_pytorch_model",
        "vae": "vae/diffusion_pytorch_model",
        "text_encoder": "text_encoder/model",
    },
    {
        "transformer": (DIFFUSERS_MARKS[0], _DIFFUSERS_TRANSFORMER.what, _diffusers_transformer),
        "vae": (DIFFUSERS_VAE_CONFIG, _DIFFUSERS_VAE.what, _diffusers_vae),
        "text_encoder": (DIFFUSERS_MARKS[2], _TRANSFORMERS_UMT5.what, _TRANSFORMERS_UMT5.parse),
    },
    ("tokenizer",),
)

# Of Wan's config of the transformer -> ours.
WAN_FIELDS = _WAN_TRANSFORMER.required | _WAN_TRANSFORMER.optional

# ComfyUI's folders, those of its downloads (split_files) among them, and other names of the same files, in lower case.
_ROOTS = (".", "models", "split_files")
_OTHER_FILES = {
    "transformer": (re.compile(r"wan.*t2v.*1[._]3b"), ("diffusion_models", "unet")),
    "vae": (re.compile(r"wan_?(2[._]1)?_?vae"), ("vae",)),
    "text_encoder": (re.compile(r"umt5[_-]xxl"), ("text_encoders", "clip")),
}
OPTIONS = {"transformer": "model", "vae": "vae_file", "text_encoder": "text_encoder"}


class Layout:
    """The places of a model's parts in ``folder``, and their sizes where there is a config.

    ``transformer``: the transformer's file where that was named, which may be called anything.
    """

    def __init__(self, folder: Path, transformer: Path | None = None) -> None:
        self._folder, self._transformer = folder, transformer
        # The configs of a diffusers folder lie deeper; a stray config.json above them says nothing.
        self._diffusers = transformer is None and any((folder / mark).exists() for mark in DIFFUSERS_MARKS)
        self._places = _DIFFUSERS if self._diffusers else _ORIGINAL

    @property
    def present(self) -> bool:
        """Return whether there is any part of a model."""
        marked = any((self._folder / mark).exists() for mark in ORIGINAL_MARKS)
        return self._diffusers or marked or any(map(self._other_files, _OTHER_FILES))

    def file(self, part: str) -> Path:
        """The file of a part, or its stem, which need not be there: its usual name, else the only other one that fits.

        Errors: ``WeightsError`` for several that fit.
        """
        if part == "transformer" and self._transformer is not None:
            return self._transformer
        usual = self._folder / self._places.files[part]
        if self._diffusers or usual.exists() or (not usual.suffix and any(usual.parent.glob(f"{usual.name}.*"))):
            return usual
        found = self._other_files(part)
        if len(found) > 1:
            listed = first_names([str(file.relative_to(self._folder)) for file in found])
            raise WeightsError(
                f"{self._folder}: expected one file, found {listed}; give the one to use as {OPTIONS[part]}"
            )
        return found[0] if found else usual

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's folder, which need not be there."""
        places = [self._folder / name for name in self._places.tokenizers]
        return next((place for place in places if place.is_dir()), places[0])

    def config(self, part: str) -> Any:
        """The sizes that a part's config says, None where shapes have to say them; ``WeightsError`` for a wrong one."""
        found = self._read(part)
        return None if found is None else self._places.configs[part][2](*found)

    def rollout_defaults(self) -> dict[str, Any]:
        """The object ``echo_rt`` of the transformer's config: how its video is rolled out; empty without one."""
        config, path = self._read("transformer") or ({}, self._folder)
        defaults = config.get(_DEFAULTS_KEY, {})
        if not isinstance(defaults, dict):
            raise WeightsError(f'{path}: expected "{_DEFAULTS_KEY}" to be an object, found {type_of(defaults)}')
        return dict(defaults)

    def _read(self, part: str) -> tuple[dict[str, Any], Path] | None:
        if part not in self._places.configs:
            return None
        name, what, _ = self._places.configs[part]
        path = self._folder / name
        if not path.exists() and not (self._diffusers and part == "transformer"):
            return None
        config = read_object(path, what)
        # Beside a file that was named there may be the config of anything.
        return None if self._transformer is not None and _WAN_FIELD not in config else (config, path)

    def _other_files(self, part: str) -> list[Path]:
        names, subfolders = _OTHER_FILES[part]
        folders = [self._folder / root / sub for root in _ROOTS for sub in (".", *subfolders)]
        return sorted(
            file
            for folder in folders
            if folder.is_dir()
            for file in folder.iterdir()
            if file.suffix.lower() in SUFFIXES and names.search(file.name.lower())
        )
