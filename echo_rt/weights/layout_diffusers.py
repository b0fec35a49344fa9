"""The diffusers folder of Wan2.1: a sub-folder with a config for every part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from echo_rt.config import TextEncoderConfig, TransformerConfig, VaeConfig
from echo_rt.errors import WeightsError
from echo_rt.weights.json_files import build, expect, read_defaults, read_object, require

TRANSFORMER_CONFIG = "transformer/config.json"
VAE_CONFIG = "vae/config.json"
TEXT_ENCODER_CONFIG = "text_encoder/config.json"

_TRANSFORMER = "the config of a Wan2.1 text-to-video transformer"
_VAE = "the config of the Wan2.1 VAE"
_TEXT_ENCODER = "the config of a umT5 encoder"


class DiffusersLayout:
    """Where the parts of a model are in a diffusers folder, and their sizes."""

    name = "diffusers"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.transformer = folder / "transformer" / "diffusion_pytorch_model"
        self.vae = folder / "vae" / "diffusion_pytorch_model"
        self.text_encoder = folder / "text_encoder" / "model"
        self.tokenizer = folder / "tokenizer"

    def transformer_config(self) -> TransformerConfig:
        return transformer_config_of(*self._read(TRANSFORMER_CONFIG, _TRANSFORMER))

    def rollout_defaults(self) -> dict[str, Any]:
        return read_defaults(*self._read(TRANSFORMER_CONFIG, _TRANSFORMER))

    def vae_config(self) -> VaeConfig | None:
        if not (self._folder / VAE_CONFIG).exists():
            return None
        config, path = self._read(VAE_CONFIG, _VAE)
        base_dim, z_dim = require(config, path, "base_dim", "z_dim")
        expect(
            config,
            path,
            _VAE,
            _class_name=("AutoencoderKLWan",),
            # What Wan2.2's VAE adds to this one.
            is_residual=(False,),
            patch_size=(None,),
            decoder_base_dim=(None, base_dim),
            attn_scales=([],),
            in_channels=(3,),
            out_channels=(3,),
        )
        optional = ("dim_mult", "num_res_blocks", "latents_mean", "latents_std")
        fields = {name: config[name] for name in optional if name in config}
        if "temperal_downsample" in config:  # diffusers' own spelling
            fields["temporal_downsample"] = config["temperal_downsample"]
        return build(VaeConfig, path, base_dim=base_dim, z_dim=z_dim, **fields)

    def text_encoder_config(self) -> TextEncoderConfig | None:
        if not (self._folder / TEXT_ENCODER_CONFIG).exists():
            return None
        config, path = self._read(TEXT_ENCODER_CONFIG, _TEXT_ENCODER)
        expect(config, path, _TEXT_ENCODER, model_type=("umt5",), feed_forward_proj=("gated-gelu",))
        names = ("vocab_size", "d_model", "d_ff", "num_heads", "num_layers", "d_kv")
        fields = dict(zip(names, require(config, path, *names), strict=True))
        d_attn = _product(path, num_heads=fields["num_heads"], d_kv=fields.pop("d_kv"))
        optional = {
            "relative_attention_num_buckets": "relative_attention_num_buckets",
            "relative_attention_max_distance": "relative_attention_max_distance",
            "layer_norm_epsilon": "eps",
        }
        fields |= {ours: config[theirs] for theirs, ours in optional.items() if theirs in config}
        return build(TextEncoderConfig, path, d_attn=d_attn, **fields)

    def _read(self, name: str, what: str) -> tuple[dict[str, Any], Path]:
        path = self._folder / name
        return read_object(path, what), path


def transformer_config_of(config: dict[str, Any], path: Path) -> TransformerConfig:
    """The sizes of a transformer whose config is that object, from ``path``."""
    expect(
        config,
        path,
        _TRANSFORMER,
        # The second is FastVideo's: the same tensors under the same names.
        _class_name=("WanTransformer3DModel", "CausalWanTransformer3DModel"),
        # Set only where images condition the video.
        image_dim=(None,),
        added_kv_proj_dim=(None,),
        cross_attn_norm=(True,),
        qk_norm=("rms_norm_across_heads",),
    )
    heads, head_dim, ffn_dim, freq_dim, layers, in_channels = require(
        config,
        path,
        *("num_attention_heads", "attention_head_dim", "ffn_dim", "freq_dim", "num_layers", "in_channels"),
    )
    optional = ("text_dim", "text_len", "patch_size", "eps")
    return build(
        TransformerConfig,
        path,
        dim=_product(path, num_attention_heads=heads, attention_head_dim=head_dim),
        num_heads=heads,
        ffn_dim=ffn_dim,
        freq_dim=freq_dim,
        num_layers=layers,
        in_channels=in_channels,
        # diffusers takes null for "as many as go in".
        out_channels=config.get("out_channels") or in_channels,
        **{name: config[name] for name in optional if name in config},
    )


def _product(path: Path, **factors: Any) -> int:
    """The product of two fields that have to be whole numbers."""
    result = 1
    for name, factor in factors.items():
        if not isinstance(factor, int) or factor < 1:
            raise WeightsError(f"{path}: expected {name} to be a positive integer, came {factor!r}")
        result *= factor
    return result
