"""Wan2.1's own folder: one file a part, a config for the transformer only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from echo_rt.config import TextEncoderConfig, TransformerConfig, VaeConfig
from echo_rt.errors import WeightsError
from echo_rt.weights.files import open_tensors
from echo_rt.weights.from_shapes import text_encoder_config_of, vae_config_of
from echo_rt.weights.json_files import build, expect, read_defaults, read_object, require

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


class OriginalLayout:
    """Where the parts of a model are in Wan2.1's own folder, and their sizes."""

    name = "original"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.transformer = folder / TRANSFORMER_STEM
        self.vae = folder / VAE_FILE
        self.text_encoder = folder / TEXT_ENCODER_FILE
        self.tokenizer = folder / TOKENIZER_FOLDER

    def transformer_config(self) -> TransformerConfig:
        config, path = self._config()
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
        return read_defaults(*self._config())

    def vae_config(self) -> VaeConfig:
        return vae_config_of(open_tensors(self.vae), str(self.vae))

    def latents_config(self) -> VaeConfig:
        return VaeConfig()

    def text_encoder_config(self) -> TextEncoderConfig:
        return text_encoder_config_of(open_tensors(self.text_encoder), str(self.text_encoder))

    def _config(self) -> tuple[dict[str, Any], Path]:
        path = self._folder / TRANSFORMER_CONFIG
        return read_object(path, _WHAT), path
