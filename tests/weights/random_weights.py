"""Small random models, and folders and files that hold them, for the tests of weight loading."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from echo_rt.config import MemoryConfig, ModelConfig, TextEncoderConfig, TransformerConfig, VaeConfig
from echo_rt.weights.shapes import (
    Shapes,
    memory_shapes,
    names_of,
    text_encoder_modules,
    text_encoder_shapes,
    transformer_names,
    transformer_shapes,
    vae_modules,
    vae_shapes,
)

TRANSFORMER = TransformerConfig(dim=24, ffn_dim=40, freq_dim=16, num_heads=2, num_layers=2, text_dim=20, text_len=8)
MODEL = ModelConfig(transformer=TRANSFORMER, latent_height=4, latent_width=6, memory=MemoryConfig(frames=2))
VAE = VaeConfig(base_dim=4)
TEXT_ENCODER = TextEncoderConfig(vocab_size=50, d_model=20, d_attn=24, d_ff=28, num_heads=4, num_layers=2)

# Wan's names of their tensors -> those of diffusers and transformers.
TRANSFORMER_NAMES = transformer_names(TRANSFORMER.num_layers)
VAE_NAMES = names_of(vae_modules(VAE))
TEXT_ENCODER_NAMES = names_of(text_encoder_modules(TEXT_ENCODER), TEXT_ENCODER.num_layers)


def random_tensors(shapes: Shapes, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def transformer(seed: int = 0) -> dict[str, Tensor]:
    return random_tensors(transformer_shapes(TRANSFORMER), seed)


def memory(seed: int = 100) -> dict[str, Tensor]:
    return random_tensors(memory_shapes(MODEL), seed)


def vae() -> dict[str, Tensor]:
    return random_tensors(vae_shapes(VAE), 1)


def text_encoder() -> dict[str, Tensor]:
    return random_tensors(text_encoder_shapes(TEXT_ENCODER), 2)


def original_config() -> dict[str, Any]:
    """What Wan's config.json says, and the text width that its own leaves to the default."""
    return {
        "_class_name": "WanModel",
        "model_type": "t2v",
        "dim": TRANSFORMER.dim,
        "ffn_dim": TRANSFORMER.ffn_dim,
        "freq_dim": TRANSFORMER.freq_dim,
        "in_dim": 16,
        "out_dim": 16,
        "num_heads": TRANSFORMER.num_heads,
        "num_layers": TRANSFORMER.num_layers,
        "text_len": TRANSFORMER.text_len,
        "text_dim": TRANSFORMER.text_dim,
        "eps": 1e-6,
    }


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text("{}")


def write_original(folder: Path) -> Path:
    """A model in Wan's own layout."""
    write_json(folder / "config.json", original_config())
    save_file(transformer(), folder / "diffusion_pytorch_model.safetensors")
    torch.save(vae(), folder / "Wan2.1_VAE.pth")
    torch.save(text_encoder(), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    write_tokenizer(folder / "google" / "umt5-xxl")
    return folder


def write_shards(folder: Path, stem: str, tensors: Mapping[str, Tensor], count: int = 3) -> Path:
    """``tensors`` dealt out to ``count`` files with an index, as diffusers and transformers write them."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for shard in range(count):
        part = {name: tensors[name] for name in list(tensors)[shard::count]}
        file = f"{stem}-{shard + 1:05}-of-{count:05}.safetensors"
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = folder / f"{stem}.safetensors.index.json"
    write_json(index, {"metadata": {"total_size": 1}, "weight_map": weight_map})
    return index


def write_diffusers(folder: Path) -> Path:
    """The same model in the layout of diffusers, transformer and text encoder in shards."""
    write_json(folder / "model_index.json", {"_class_name": "WanPipeline"})
    diffusers_transformer = {
        "_class_name": "WanTransformer3DModel",
        "num_attention_heads": TRANSFORMER.num_heads,
        "attention_head_dim": TRANSFORMER.head_dim,
        "ffn_dim": TRANSFORMER.ffn_dim,
        "freq_dim": TRANSFORMER.freq_dim,
        "num_layers": TRANSFORMER.num_layers,
        "text_dim": TRANSFORMER.text_dim,
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": [1, 2, 2],
        "eps": 1e-6,
        "added_kv_proj_dim": None,
        "image_dim": None,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
    }
    write_json(folder / "transformer" / "config.json", diffusers_transformer)
    names = TRANSFORMER_NAMES
    write_shards(folder / "transformer", "diffusion_pytorch_model", {names[k]: v for k, v in transformer().items()})
    diffusers_vae = {
        "_class_name": "AutoencoderKLWan",
        "base_dim": VAE.base_dim,
        "z_dim": VAE.z_dim,
        "dim_mult": list(VAE.dim_mult),
        "num_res_blocks": VAE.num_res_blocks,
        "attn_scales": [],
        "temperal_downsample": list(VAE.temporal_downsample),
        "latents_mean": list(VAE.latents_mean),
        "latents_std": list(VAE.latents_std),
    }
    write_json(folder / "vae" / "config.json", diffusers_vae)
    names = VAE_NAMES
    save_file({names[k]: v for k, v in vae().items()}, folder / "vae" / "diffusion_pytorch_model.safetensors")
    transformers_umt5 = {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "feed_forward_proj": "gated-gelu",
        "vocab_size": TEXT_ENCODER.vocab_size,
        "d_model": TEXT_ENCODER.d_model,
        "d_kv": TEXT_ENCODER.d_kv,
        "d_ff": TEXT_ENCODER.d_ff,
        "num_heads": TEXT_ENCODER.num_heads,
        "num_layers": TEXT_ENCODER.num_layers,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
    }
    write_json(folder / "text_encoder" / "config.json", transformers_umt5)
    names = TEXT_ENCODER_NAMES
    write_shards(folder / "text_encoder", "model", {names[k]: v for k, v in text_encoder().items()})
    write_tokenizer(folder / "tokenizer")
    return folder


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Names and every bit of every tensor."""
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name
