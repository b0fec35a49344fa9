"""The two names of every tensor, held against the real classes of diffusers and transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from closeness import relative_error
from random_weights import TEXT_ENCODER, TEXT_ENCODER_NAMES, TRANSFORMER, TRANSFORMER_NAMES, VAE, VAE_NAMES
from safetensors.torch import load_file
from torch import Tensor

from echo_rt.config import TextEncoderConfig, TransformerConfig, VaeConfig
from echo_rt.weights.shapes import (
    Shapes,
    names_of,
    text_encoder_modules,
    text_encoder_shapes,
    transformer_names,
    transformer_shapes,
    vae_modules,
    vae_shapes,
)

WIDE_VAE = VaeConfig(base_dim=4, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(True, False))
WIDE_VAE_NAMES = names_of(vae_modules(WIDE_VAE))
PARTS = {
    "transformer": (TRANSFORMER_NAMES, transformer_shapes(TRANSFORMER)),
    "vae": (VAE_NAMES, vae_shapes(VAE)),
    "vae of other depths": (WIDE_VAE_NAMES, vae_shapes(WIDE_VAE)),
    "text encoder": (TEXT_ENCODER_NAMES, text_encoder_shapes(TEXT_ENCODER)),
}


def shapes_of(module: torch.nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def as_other(tensors: dict[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    return {names[name]: tensor.float() for name, tensor in tensors.items()}


def transformer_of_diffusers(config: TransformerConfig) -> torch.nn.Module:
    diffusers = pytest.importorskip("diffusers")
    model: torch.nn.Module = diffusers.WanTransformer3DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        ffn_dim=config.ffn_dim,
        freq_dim=config.freq_dim,
        num_layers=config.num_layers,
        text_dim=config.text_dim,
    )
    return model


@pytest.mark.parametrize("part", PARTS)
def test_each_tensor_has_a_name_of_its_own(part: str) -> None:
    names, shapes = PARTS[part]
    assert list(names) == list(shapes) and len(set(names.values())) == len(shapes)


def test_transformer_is_that_of_diffusers() -> None:
    model = transformer_of_diffusers(TRANSFORMER)
    names, shapes = PARTS["transformer"]
    assert {names[name]: shape for name, shape in shapes.items()} == shapes_of(model)


def test_vae_is_that_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    for config in (VAE, WIDE_VAE):
        model = diffusers.AutoencoderKLWan(
            base_dim=config.base_dim,
            z_dim=config.z_dim,
            dim_mult=list(config.dim_mult),
            num_res_blocks=config.num_res_blocks,
            temperal_downsample=list(config.temporal_downsample),
        )
        names = names_of(vae_modules(config))
        assert {names[name]: shape for name, shape in vae_shapes(config).items()} == shapes_of(model)


def test_mapped_transformer_computes_the_golden_flow(golden_dir: Path) -> None:
    """Equal shapes do not tell q from k; the published model's first pass, which has no past to look at, does."""
    bundle = golden_dir / "rollout_small"
    config = TransformerConfig(dim=128, ffn_dim=192, freq_dim=64, num_heads=1, num_layers=2, text_dim=32, text_len=16)
    model = transformer_of_diffusers(config).eval()
    weights = load_file(bundle / "weights.safetensors")
    own = {name: weights[name] for name in transformer_shapes(config)}
    model.load_state_dict(as_other(own, transformer_names(config.num_layers)), strict=True)
    inputs = load_file(bundle / "inputs.safetensors")
    text = inputs["prompt_embeds.0"]
    padded = torch.nn.functional.pad(text, (0, 0, 0, config.text_len - len(text)))
    with torch.no_grad():
        flow = model(
            hidden_states=inputs["noise.0"].transpose(0, 1)[None],
            timestep=torch.tensor([1000]),
            encoder_hidden_states=padded[None],
        ).sample
    assert relative_error(flow[0].transpose(0, 1), load_file(bundle / "expected.safetensors")["flow.0.0"]) < 1e-5


def test_mapped_vae_computes_the_golden_video_and_latents(golden_dir: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    bundle = golden_dir / "vae"
    config = VaeConfig(base_dim=8)
    model = diffusers.AutoencoderKLWan(base_dim=config.base_dim).eval()
    model.load_state_dict(
        as_other(load_file(bundle / "weights.safetensors"), names_of(vae_modules(config))), strict=True
    )
    inputs, expected = load_file(bundle / "inputs.safetensors"), load_file(bundle / "expected.safetensors")
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
    with torch.no_grad():
        latents = inputs["latents"].transpose(0, 1)[None] * std + mean
        video = model.decode(latents).sample[0].transpose(0, 1)
        encoded = model.encode(inputs["video"].transpose(0, 1)[None]).latent_dist.mode()
    # diffusers clamps its video to [-1, 1]; the bundle's is as computed.
    assert relative_error(video, expected["video"].clamp(-1, 1)) < 1e-5
    assert relative_error(((encoded - mean) / std)[0].transpose(0, 1), expected["encoded"]) < 1e-5


def test_mapped_text_encoder_computes_the_golden_embeddings(golden_dir: Path) -> None:
    from transformers import UMT5Config, UMT5EncoderModel

    bundle = golden_dir / "text_encoder"
    config = TextEncoderConfig(vocab_size=300, d_model=64, d_attn=64, d_ff=96, num_heads=4, num_layers=3)
    with torch.random.fork_rng():
        model = UMT5EncoderModel(
            UMT5Config(
                vocab_size=config.vocab_size,
                d_model=config.d_model,
                d_kv=config.d_kv,
                d_ff=config.d_ff,
                num_heads=config.num_heads,
                num_layers=config.num_layers,
                feed_forward_proj="gated-gelu",
            )
        ).eval()
    weights = as_other(
        load_file(bundle / "weights.safetensors"), names_of(text_encoder_modules(config), config.num_layers)
    )
    # The library calls the one token table by two names.
    assert set(shapes_of(model)) - set(weights) == {"encoder.embed_tokens.weight"}
    model.load_state_dict(weights | {"encoder.embed_tokens.weight": weights["shared.weight"]}, strict=True)
    inputs = load_file(bundle / "inputs.safetensors")
    with torch.no_grad():
        embeds = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    masked = embeds * inputs["attention_mask"].unsqueeze(-1)
    assert relative_error(masked, load_file(bundle / "expected.safetensors")["prompt_embeds"]) < 1e-5


def test_umt5_name_alone() -> None:
    assert names_of(text_encoder_modules(TEXT_ENCODER), 12)["blocks.11.ffn.gate.0.weight"] == (
        "encoder.block.11.layer.1.DenseReluDense.wi_0.weight"
    )
