"""The tensors of a model, name -> shape, in the original (Wan, Echo-Infinity) naming, and sizes read back from them.

The tables are what a loaded file is held against, entry by entry, and what ``echo-rt tiny`` fills. Sizes are read off
tensors where files carry no config: only what fixes them is looked at, ``check_tensors`` says whether all fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from echo_rt.config import ModelConfig, TextEncoderConfig, TransformerConfig, VaeConfig
from echo_rt.errors import ConfigError, WeightsError
from echo_rt.utils.wording import counted
from echo_rt.weights.tensors import outline_of

T = TypeVar("T")

Shapes = dict[str, tuple[int, ...]]

MEMORY_PREFIX = "query_memory_encoder."

_MODULATION_ROWS_BLOCK = 6
_MODULATION_ROWS_HEAD = 2
_HEAD_DIM = 128  # of every Wan2.1 transformer; no shape says it


def convolution_shapes(name: str, out: int, channels: int, *kernel: int) -> Shapes:
    """Weight and bias of a convolution."""
    return {f"{name}.weight": (out, channels, *kernel), f"{name}.bias": (out,)}


_linear = convolution_shapes  # a kernel without dimensions


def transformer_shapes(config: TransformerConfig) -> Shapes:
    """The diffusion transformer."""
    dim, ffn = config.dim, config.ffn_dim
    shapes: Shapes = {
        **convolution_shapes("patch_embedding", dim, config.in_channels, *config.patch_size),
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
    for square in ("connector_proj.0", "connector_proj.2", "to_k", "to_v"):
        shapes |= _linear(square, dim, dim)
    shapes |= _linear("gate_linear", dim, 2 * dim)
    shapes["connector_proj.3.weight"] = (dim,)
    if config.memory.normalize_k:
        shapes["norm_k_out.weight"] = (dim,)
    return shapes


def _residual_block(name: str, channels: int, out: int) -> Shapes:
    shapes: Shapes = {
        f"{name}.residual.0.gamma": (channels, 1, 1, 1),
        **convolution_shapes(f"{name}.residual.2", out, channels, 3, 3, 3),
        f"{name}.residual.3.gamma": (out, 1, 1, 1),
        **convolution_shapes(f"{name}.residual.6", out, out, 3, 3, 3),
    }
    if channels != out:
        shapes |= convolution_shapes(f"{name}.shortcut", out, channels, 1, 1, 1)
    return shapes


def _middle(name: str, channels: int) -> Shapes:
    return {
        **_residual_block(f"{name}.0", channels, channels),
        f"{name}.1.norm.gamma": (channels, 1, 1),
        **convolution_shapes(f"{name}.1.to_qkv", 3 * channels, channels, 1, 1),
        **convolution_shapes(f"{name}.1.proj", channels, channels, 1, 1),
        **_residual_block(f"{name}.2", channels, channels),
    }


def vae_decoder_shapes(config: VaeConfig) -> Shapes:
    """``conv2`` and ``decoder.*`` of the VAE file."""
    top = config.base_dim * config.dim_mult[-1]
    shapes: Shapes = {
        **convolution_shapes("conv2", config.z_dim, config.z_dim, 1, 1, 1),
        **convolution_shapes("decoder.conv1", top, config.z_dim, 3, 3, 3),
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
                shapes |= convolution_shapes(f"decoder.upsamples.{index}.time_conv", 2 * channels, channels, 3, 1, 1)
            shapes |= convolution_shapes(f"decoder.upsamples.{index}.resample.1", channels // 2, channels, 3, 3)
            index, channels = index + 1, channels // 2
    shapes["decoder.head.0.gamma"] = (channels, 1, 1, 1)
    shapes |= convolution_shapes("decoder.head.2", 3, channels, 3, 3, 3)
    return shapes


def vae_encoder_shapes(config: VaeConfig) -> Shapes:
    """``conv1`` and ``encoder.*`` of the VAE file; the encoder gives mean and log-variance, hence twice ``z_dim``."""
    shapes: Shapes = {
        **convolution_shapes("conv1", 2 * config.z_dim, 2 * config.z_dim, 1, 1, 1),
        **convolution_shapes("encoder.conv1", config.base_dim, 3, 3, 3, 3),
    }
    index, channels = 0, config.base_dim
    for level, mult in enumerate(config.dim_mult):
        out = config.base_dim * mult
        for _ in range(config.num_res_blocks):
            shapes |= _residual_block(f"encoder.downsamples.{index}", channels, out)
            index, channels = index + 1, out
        if level < len(config.dim_mult) - 1:
            shapes |= convolution_shapes(f"encoder.downsamples.{index}.resample.1", channels, channels, 3, 3)
            if config.temporal_downsample[level]:
                shapes |= convolution_shapes(f"encoder.downsamples.{index}.time_conv", channels, channels, 3, 1, 1)
            index += 1
    shapes |= _middle("encoder.middle", channels)
    shapes["encoder.head.0.gamma"] = (channels, 1, 1, 1)
    shapes |= convolution_shapes("encoder.head.2", 2 * config.z_dim, channels, 3, 3, 3)
    return shapes


def vae_shapes(config: VaeConfig) -> Shapes:
    """The whole VAE file: encoder, decoder and the 1x1x1 convolutions between them."""
    return vae_encoder_shapes(config) | vae_decoder_shapes(config)


def text_encoder_shapes(config: TextEncoderConfig) -> Shapes:
    """The umT5 encoder under Wan's key names; no biases, one relative position table in each layer."""
    width, attention, ffn = config.d_model, config.d_attn, config.d_ff
    layer_shapes: Shapes = {
        "norm1": (width,),
        "norm2": (width,),
        **dict.fromkeys(("attn.q", "attn.k", "attn.v"), (attention, width)),
        "attn.o": (width, attention),
        **dict.fromkeys(("ffn.gate.0", "ffn.fc1"), (ffn, width)),
        "ffn.fc2": (width, ffn),
        "pos_embedding.embedding": (config.relative_attention_num_buckets, config.num_heads),
    }
    return {
        "token_embedding.weight": (config.vocab_size, width),
        "norm.weight": (width,),
        **{f"blocks.{i}.{name}.weight": size for i in range(config.num_layers) for name, size in layer_shapes.items()},
    }


def shape_of(tensors: Mapping[str, Tensor], name: str, dims: int, source: str, what: str) -> tuple[int, ...]:
    """Shape of a tensor that ``what`` must have; ``WeightsError`` where it is missing, of another rank or empty."""
    if name not in tensors:
        raise WeightsError(f"{source}: expected {what}, found no {name} among its {counted(len(tensors), 'tensor')}")
    shape = outline_of(tensors, name).shape
    if len(shape) != dims or 0 in shape:
        raise WeightsError(f"{source}: expected {what} with a {dims}-dimensional {name}, found shape {list(shape)}")
    return shape


def count_layers(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Count the different numbers right behind ``prefix`` in the names.

    Where the numbers have gaps this is no layer count, and the check of every tensor that follows finds it out.
    """
    numbers = (name.removeprefix(prefix).split(".", 1)[0] for name in tensors if name.startswith(prefix))
    return len({number for number in numbers if number.isdecimal()})


def configured(make: Callable[..., T], source: object, **sizes: Any) -> T:
    """``make(**sizes)``, a config; what its own checks refuse is a ``WeightsError`` of ``source``."""
    try:
        return make(**sizes)
    except ConfigError as error:
        raise WeightsError(f"{source}: {error}") from error


def transformer_config_of(tensors: Mapping[str, Tensor], source: str) -> TransformerConfig:
    """The config of a Wan2.1 transformer; the width of a head and the length of the text are those of all of them."""
    what = "a Wan2.1 transformer"
    shape = partial(shape_of, tensors, source=source, what=what)
    dim, in_channels, *patch_size = shape("patch_embedding.weight", 5)
    rows = shape("head.head.weight", 2)[0]
    area = math.prod(patch_size)
    if dim % _HEAD_DIM or rows % area:
        raise WeightsError(
            f"{source}: expected {what}, as wide as heads of {_HEAD_DIM} and with whole patches of {area} at its end, "
            f"found one {dim} wide with {rows} rows there"
        )
    return configured(
        TransformerConfig,
        source,
        dim=dim,
        ffn_dim=shape("blocks.0.ffn.0.weight", 2)[0],
        freq_dim=shape("time_embedding.0.weight", 2)[1],
        num_heads=dim // _HEAD_DIM,
        num_layers=count_layers(tensors, "blocks."),
        text_dim=shape("text_embedding.0.weight", 2)[1],
        in_channels=in_channels,
        out_channels=rows // area,
        patch_size=tuple(patch_size),
    )


def vae_config_of(tensors: Mapping[str, Tensor], source: str) -> VaeConfig:
    """The config of Wan's VAE file: widths from its first convolutions, levels from the encoder's flat list.

    The latent statistics are in no tensor; they are Wan2.1's.
    """
    what = "the Wan2.1 VAE"
    shape = partial(shape_of, tensors, source=source, what=what)
    base_dim, z_dim = shape("encoder.conv1.weight", 5)[0], shape("conv2.weight", 5)[0]
    levels: list[list[int]] = [[]]  # the widths of each level's residual blocks
    temporal: list[bool] = []
    for index in range(count_layers(tensors, "encoder.downsamples.")):
        module = f"encoder.downsamples.{index}"
        if f"{module}.resample.1.weight" in tensors:
            temporal.append(f"{module}.time_conv.weight" in tensors)
            levels.append([])
        else:
            levels[-1].append(shape(f"{module}.residual.2.weight", 5)[0])
    blocks = [len(level) for level in levels]
    if len(set(blocks)) != 1 or not blocks[0]:
        raise WeightsError(f"{source}: expected {what}, as many residual blocks on every level, found {blocks}")
    widths = [level[0] for level in levels]
    if any(width % base_dim for width in widths):
        raise WeightsError(f"{source}: expected {what}, widths that are multiples of {base_dim}, found {widths}")
    return configured(
        VaeConfig,
        source,
        base_dim=base_dim,
        z_dim=z_dim,
        dim_mult=tuple(width // base_dim for width in widths),
        num_res_blocks=blocks[0],
        temporal_downsample=tuple(temporal),
    )


def text_encoder_config_of(tensors: Mapping[str, Tensor], source: str) -> TextEncoderConfig:
    """The config of Wan's umT5 file; the reach of the relative positions is in no tensor and is umT5's."""
    shape = partial(shape_of, tensors, source=source, what="the umT5 encoder")
    vocab_size, d_model = shape("token_embedding.weight", 2)
    layers = count_layers(tensors, "blocks.")
    first, second = (f"blocks.{layer}.pos_embedding.embedding.weight" for layer in (0, 1))
    if layers > 1 and first in tensors and second not in tensors:
        raise WeightsError(f"{source}: expected umT5, with positions in each layer, found a T5, with them in the first")
    buckets, num_heads = shape(first, 2)
    return configured(
        TextEncoderConfig,
        source,
        vocab_size=vocab_size,
        d_model=d_model,
        d_attn=shape("blocks.0.attn.q.weight", 2)[0],
        d_ff=shape("blocks.0.ffn.fc1.weight", 2)[0],
        num_heads=num_heads,
        num_layers=layers,
        relative_attention_num_buckets=buckets,
    )


class MemoryFacts(NamedTuple):
    """Sizes of a memory encoder, read off its tensors."""

    memory_tokens: int
    layers: int
    normalize_k: bool
    ffn_multiplier: int


def memory_facts(tensors: Mapping[str, Tensor], source: str = "memory encoder") -> MemoryFacts:
    """The sizes of a memory encoder (names without ``query_memory_encoder.``); ``source`` is for messages.

    ``memory_tokens`` is frames times tokens of a frame: how many frames that is depends on the video's size.

    Errors: ``WeightsError`` for tensors that are no memory encoder.
    """
    what = "a memory encoder"
    _, memory_tokens, dim = shape_of(tensors, "query_init", 3, source, what)
    rows = shape_of(tensors, "layers.0.ffn.0.weight", 2, source, what)[0]
    if rows % dim:
        raise WeightsError(f"{source}: expected {what} with an FFN of a multiple of {dim} channels, found {rows}")
    return MemoryFacts(
        memory_tokens=memory_tokens,
        layers=count_layers(tensors, "layers."),
        normalize_k="norm_k_out.weight" in tensors,
        ffn_multiplier=rows // dim,
    )
