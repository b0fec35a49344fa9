"""Which tensors a model consists of: name -> shape, in the original (Wan, Echo-Infinity) naming.

These tables are what a loaded file is held against, entry by entry, and what ``echo-rt tiny`` fills.
"""

from __future__ import annotations

from echo_rt.config import ModelConfig, TextEncoderConfig, TransformerConfig, VaeConfig

Shapes = dict[str, tuple[int, ...]]

MEMORY_PREFIX = "query_memory_encoder."

_MODULATION_ROWS_BLOCK = 6
_MODULATION_ROWS_HEAD = 2


def _linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def transformer_shapes(config: TransformerConfig) -> Shapes:
    """The diffusion transformer."""
    dim, ffn = config.dim, config.ffn_dim
    shapes: Shapes = {
        "patch_embedding.weight": (dim, config.in_channels, *config.patch_size),
        "patch_embedding.bias": (dim,),
        **_linear("text_embedding.0", dim, config.text_dim),
        **_linear("text_embedding.2", dim, dim),
        **_linear("time_embedding.0", dim, config.freq_dim),
        **_linear("time_embedding.2", dim, dim),
        **_linear("time_projection.1", _MODULATION_ROWS_BLOCK * dim, dim),
        "head.modulation": (1, _MODULATION_ROWS_HEAD, dim),
        **_linear("head.head", config.patch_area * config.out_channels, dim),
    }
    for layer in range(config.num_layers):
        block = f"blocks.{layer}"
        shapes[f"{block}.modulation"] = (1, _MODULATION_ROWS_BLOCK, dim)
        for attention in ("self_attn", "cross_attn"):
            for projection in ("q", "k", "v", "o"):
                shapes |= _linear(f"{block}.{attention}.{projection}", dim, dim)
            shapes[f"{block}.{attention}.norm_q.weight"] = (dim,)
            shapes[f"{block}.{attention}.norm_k.weight"] = (dim,)
        shapes[f"{block}.norm3.weight"] = (dim,)
        shapes[f"{block}.norm3.bias"] = (dim,)
        shapes |= _linear(f"{block}.ffn.0", ffn, dim)
        shapes |= _linear(f"{block}.ffn.2", dim, ffn)
    return shapes


def memory_shapes(config: ModelConfig) -> Shapes:
    """The memory encoder, without the prefix ``query_memory_encoder.``; empty where the model has no memory."""
    if config.memory is None:
        return {}
    dim, ffn = config.transformer.dim, config.memory.ffn_multiplier * config.transformer.dim
    shapes: Shapes = {"query_init": (1, config.memory_tokens, dim)}
    for layer in range(config.memory.layers):
        shapes |= _linear(f"layers.{layer}.q", dim, dim)
        shapes |= _linear(f"layers.{layer}.o", dim, dim)
        for norm in ("norm_q", "norm1", "norm2"):
            shapes[f"layers.{layer}.{norm}.weight"] = (dim,)
        shapes |= _linear(f"layers.{layer}.ffn.0", ffn, dim)
        shapes |= _linear(f"layers.{layer}.ffn.2", dim, ffn)
    shapes |= _linear("connector_proj.0", dim, dim)
    shapes |= _linear("connector_proj.2", dim, dim)
    shapes["connector_proj.3.weight"] = (dim,)
    shapes |= _linear("gate_linear", dim, 2 * dim)
    shapes |= _linear("to_k", dim, dim)
    shapes |= _linear("to_v", dim, dim)
    if config.memory.normalize_k:
        shapes["norm_k_out.weight"] = (dim,)
    return shapes


def _conv(name: str, out: int, channels: int, *kernel: int) -> Shapes:
    return {f"{name}.weight": (out, channels, *kernel), f"{name}.bias": (out,)}


def _residual_block(name: str, channels: int, out: int) -> Shapes:
    shapes: Shapes = {
        f"{name}.residual.0.gamma": (channels, 1, 1, 1),
        **_conv(f"{name}.residual.2", out, channels, 3, 3, 3),
        f"{name}.residual.3.gamma": (out, 1, 1, 1),
        **_conv(f"{name}.residual.6", out, out, 3, 3, 3),
    }
    if channels != out:
        shapes |= _conv(f"{name}.shortcut", out, channels, 1, 1, 1)
    return shapes


def _middle(name: str, channels: int) -> Shapes:
    return {
        **_residual_block(f"{name}.0", channels, channels),
        f"{name}.1.norm.gamma": (channels, 1, 1),
        **_conv(f"{name}.1.to_qkv", 3 * channels, channels, 1, 1),
        **_conv(f"{name}.1.proj", channels, channels, 1, 1),
        **_residual_block(f"{name}.2", channels, channels),
    }


def vae_decoder_shapes(config: VaeConfig) -> Shapes:
    """``conv2`` and ``decoder.*`` of the VAE file."""
    top = config.base_dim * config.dim_mult[-1]
    shapes: Shapes = {
        **_conv("conv2", config.z_dim, config.z_dim, 1, 1, 1),
        **_conv("decoder.conv1", top, config.z_dim, 3, 3, 3),
        **_middle("decoder.middle", top),
    }
    index, channels = 0, top
    for level, mult in enumerate(reversed(config.dim_mult)):
        out = config.base_dim * mult
        for _ in range(config.num_res_blocks + 1):
            shapes |= _residual_block(f"decoder.upsamples.{index}", channels, out)
            index, channels = index + 1, out
        if level < len(config.dim_mult) - 1:
            if config.temporal_downsample[-1 - level]:
                shapes |= _conv(f"decoder.upsamples.{index}.time_conv", 2 * channels, channels, 3, 1, 1)
            shapes |= _conv(f"decoder.upsamples.{index}.resample.1", channels // 2, channels, 3, 3)
            index, channels = index + 1, channels // 2
    shapes["decoder.head.0.gamma"] = (channels, 1, 1, 1)
    shapes |= _conv("decoder.head.2", 3, channels, 3, 3, 3)
    return shapes


def vae_encoder_shapes(config: VaeConfig) -> Shapes:
    """``conv1`` and ``encoder.*`` of the VAE file; the encoder gives mean and log-variance, hence twice ``z_dim``."""
    shapes: Shapes = {
        **_conv("conv1", 2 * config.z_dim, 2 * config.z_dim, 1, 1, 1),
        **_conv("encoder.conv1", config.base_dim, 3, 3, 3, 3),
    }
    index, channels = 0, config.base_dim
    for level, mult in enumerate(config.dim_mult):
        out = config.base_dim * mult
        for _ in range(config.num_res_blocks):
            shapes |= _residual_block(f"encoder.downsamples.{index}", channels, out)
            index, channels = index + 1, out
        if level < len(config.dim_mult) - 1:
            shapes |= _conv(f"encoder.downsamples.{index}.resample.1", channels, channels, 3, 3)
            if config.temporal_downsample[level]:
                shapes |= _conv(f"encoder.downsamples.{index}.time_conv", channels, channels, 3, 1, 1)
            index += 1
    shapes |= _middle("encoder.middle", channels)
    shapes["encoder.head.0.gamma"] = (channels, 1, 1, 1)
    shapes |= _conv("encoder.head.2", 2 * config.z_dim, channels, 3, 3, 3)
    return shapes


def vae_shapes(config: VaeConfig) -> Shapes:
    """The whole VAE file: encoder, decoder and the 1x1x1 convolutions between them."""
    return vae_encoder_shapes(config) | vae_decoder_shapes(config)


def text_encoder_shapes(config: TextEncoderConfig) -> Shapes:
    """The umT5 encoder under Wan's key names; no biases, one relative position table in each layer."""
    shapes: Shapes = {
        "token_embedding.weight": (config.vocab_size, config.d_model),
        "norm.weight": (config.d_model,),
    }
    for layer in range(config.num_layers):
        block = f"blocks.{layer}"
        shapes[f"{block}.norm1.weight"] = (config.d_model,)
        shapes[f"{block}.norm2.weight"] = (config.d_model,)
        for projection in ("q", "k", "v"):
            shapes[f"{block}.attn.{projection}.weight"] = (config.d_attn, config.d_model)
        shapes[f"{block}.attn.o.weight"] = (config.d_model, config.d_attn)
        shapes[f"{block}.ffn.gate.0.weight"] = (config.d_ff, config.d_model)
        shapes[f"{block}.ffn.fc1.weight"] = (config.d_ff, config.d_model)
        shapes[f"{block}.ffn.fc2.weight"] = (config.d_model, config.d_ff)
        shapes[f"{block}.pos_embedding.embedding.weight"] = (
            config.relative_attention_num_buckets,
            config.num_heads,
        )
    return shapes
