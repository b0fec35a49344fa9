"""Wan2.1's own folder, one file a part, and folders or files like ComfyUI's: a config for the transformer at most."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from echo_rt.config import TransformerConfig
from echo_rt.errors import WeightsError
from echo_rt.weights import layout_diffusers
from echo_rt.weights.files import SUFFIXES
from echo_rt.weights.json_files import build, expect, read_defaults, read_object, require
from echo_rt.weights.tensors import first_names

TRANSFORMER_CONFIG = "config.json"
TRANSFORMER_STEM = "diffusion_pytorch_model"
VAE_FILE = "Wan2.1_VAE.pth"
TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER_FOLDER = "google/umt5-xxl"

_WHAT = "the config of a Wan2.1 text-to-video model"
# Fields that Wan's config.json may leave out, under the names they have here.
_OPTIONAL = {"in_dim": "in_channels", "out_dim": "out_channels"} | {
    name: name for name in ("text_dim", "text_len", "patch_size", "eps")
}
_WAN_FIELD = "freq_dim"  # both Wan's and diffusers' config of the transformer have it, and no other model's

# ComfyUI's folders, those of its downloads (split_files) among them, and other names of the same files, in lower case.
_ROOTS = (".", "models", "split_files")
_TRANSFORMER_NAMES = re.compile(r"wan.*t2v.*1[._]3b"), ("diffusion_models", "unet")
_VAE_NAMES = re.compile(r"wan_?(2[._]1)?_?vae"), ("vae",)
_TEXT_ENCODER_NAMES = re.compile(r"umt5[_-]xxl"), ("text_encoders", "clip")
_TOKENIZERS = (TOKENIZER_FOLDER, "tokenizer", "umt5-xxl")


class OriginalLayout:
    """Where the parts of a model are in a folder, and its transformer's sizes where there is a config.

    A part is the file with Wan's own name, or the only one with another of its names. ``transformer``: the
    transformer's file, which need not have any of them.
    """

    def __init__(self, folder: Path, transformer: Path | None = None) -> None:
        self._folder, self._transformer = folder, transformer
        config = folder / TRANSFORMER_CONFIG
        self._marked = any((folder / mark).exists() for mark in (TRANSFORMER_CONFIG, VAE_FILE, TEXT_ENCODER_FILE))
        # Beside a file that was named there may be the config of anything.
        self._has_config = config.exists() and (transformer is None or _WAN_FIELD in read_object(config, _WHAT))

    @property
    def name(self) -> str:
        return "files" if self._transformer is not None or not self._marked else "original"

    @property
    def present(self) -> bool:
        """Whether there is any part of a model."""
        names = (_TRANSFORMER_NAMES, _VAE_NAMES, _TEXT_ENCODER_NAMES)
        return self._marked or any(self._named_like(*each) for each in names)

    @property
    def transformer(self) -> Path:
        if self._transformer is not None:
            return self._transformer
        stem = self._folder / TRANSFORMER_STEM
        return stem if any(self._folder.glob(f"{TRANSFORMER_STEM}*")) else self._find(stem, "model", _TRANSFORMER_NAMES)

    @property
    def vae(self) -> Path:
        return self._find(self._folder / VAE_FILE, "vae_file", _VAE_NAMES)

    @property
    def text_encoder(self) -> Path:
        return self._find(self._folder / TEXT_ENCODER_FILE, "text_encoder", _TEXT_ENCODER_NAMES)

    @property
    def tokenizer(self) -> Path:
        places = [self._folder / name for name in _TOKENIZERS]
        return next((place for place in places if place.is_dir()), places[0])

    def transformer_config(self) -> TransformerConfig | None:
        if not self._has_config:
            return None
        config, path = self._config()
        if "num_attention_heads" in config:
            return layout_diffusers.transformer_config_of(config, path)
        # Before the sizes: an image-to-video model has other ones, and this says why.
        expect(config, path, _WHAT, model_type=("t2v",))
        if config.get("in_dim") != config.get("out_dim"):
            raise WeightsError(
                f"{path}: expected {_WHAT} (in_dim equal to out_dim), "
                f"came in_dim {config.get('in_dim')} and out_dim {config.get('out_dim')}"
            )
        names = ("dim", "ffn_dim", "freq_dim", "num_heads", "num_layers")
        fields: dict[str, Any] = dict(zip(names, require(config, path, *names), strict=True))
        fields |= {ours: config[theirs] for theirs, ours in _OPTIONAL.items() if theirs in config}
        return build(TransformerConfig, path, **fields)

    def rollout_defaults(self) -> dict[str, Any]:
        return read_defaults(*self._config()) if self._has_config else {}

    def vae_config(self) -> None:
        return None

    def text_encoder_config(self) -> None:
        return None

    def _config(self) -> tuple[dict[str, Any], Path]:
        path = self._folder / TRANSFORMER_CONFIG
        return read_object(path, _WHAT), path

    def _named_like(self, names: re.Pattern[str], subfolders: tuple[str, ...]) -> list[Path]:
        folders = [self._folder / root / sub for root in _ROOTS for sub in (".", *subfolders)]
        return sorted(
            file
            for folder in folders
            if folder.is_dir()
            for file in folder.iterdir()
            if file.suffix.lower() in SUFFIXES and names.search(file.name.lower())
        )

    def _find(self, usual: Path, option: str, names: tuple[re.Pattern[str], tuple[str, ...]]) -> Path:
        found = [] if usual.exists() else self._named_like(*names)
        if len(found) > 1:
            listed = first_names([str(file.relative_to(self._folder)) for file in found])
            raise WeightsError(f"{self._folder}: expected one file, found {listed}; give the one to use as {option}")
        return found[0] if found else usual
