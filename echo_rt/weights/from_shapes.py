"""Sizes of a model whose files carry no config: read off the shapes of its tensors.

Only what fixes the sizes is looked at here; that every tensor fits is then for ``check_tensors``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from echo_rt.config import TextEncoderConfig, TransformerConfig, VaeConfig
from echo_rt.errors import ConfigError, WeightsError
from echo_rt.utils.wording import counted
from echo_rt.weights.tensors import outline_of

_HEAD_DIM = 128  # of every Wan2.1 transformer; no shape says it
_TENSORS_OF_A_LAYER = 4  # every network has more in each layer


def shape_of(tensors: Mapping[str, Tensor], name: str, dims: int, source: str, what: str) -> tuple[int, ...]:
    """Shape of a tensor that ``what`` must have; ``WeightsError`` where it is missing, of another rank or empty."""
    if name not in tensors:
        raise WeightsError(f"{source}: expected {what}, found no {name} among its {counted(len(tensors), 'tensor')}")
    shape = outline_of(tensors, name).shape
    if len(shape) != dims or 0 in shape:
        raise WeightsError(f"{source}: expected {what} with a {dims}-dimensional {name}, came shape {list(shape)}")
    return shape


def count_layers(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many different numbers stand right behind ``prefix`` in the names; 0 where there is none.

    Where the numbers have gaps this is no layer count, and the check of every tensor that follows finds it out.
    """
    numbers = (name.removeprefix(prefix).split(".", 1)[0] for name in tensors if name.startswith(prefix))
    return len({number for number in numbers if number.isdecimal()})


def check_depth(layers: int, tensors: Mapping[str, Tensor], source: str, what: str) -> None:
    """Raises ``WeightsError`` for more layers than ``tensors`` can be, before any name of theirs is made."""
    if layers * _TENSORS_OF_A_LAYER > len(tensors):
        raise WeightsError(
            f"{source}: expected {what} with {counted(layers, 'layer')}, came {counted(len(tensors), 'tensor')}"
        )


def transformer_config_of(tensors: Mapping[str, Tensor], source: str) -> TransformerConfig:
    """The config of a Wan2.1 transformer; the width of a head and the length of the text are those of all of them."""
    what = "a Wan2.1 transformer"
    dim, in_channels, *patch_size = shape_of(tensors, "patch_embedding.weight", 5, source, what)
    rows = shape_of(tensors, "head.head.weight", 2, source, what)[0]
    area = math.prod(patch_size)
    if dim % _HEAD_DIM or rows % area:
        raise WeightsError(
            f"{source}: expected {what}, as wide as heads of {_HEAD_DIM} and with whole patches of {area} at its end, "
            f"came one {dim} wide with {rows} rows there"
        )
    try:
        return TransformerConfig(
            dim=dim,
            ffn_dim=shape_of(tensors, "blocks.0.ffn.0.weight", 2, source, what)[0],
            freq_dim=shape_of(tensors, "time_embedding.0.weight", 2, source, what)[1],
            num_heads=dim // _HEAD_DIM,
            num_layers=count_layers(tensors, "blocks."),
            text_dim=shape_of(tensors, "text_embedding.0.weight", 2, source, what)[1],
            in_channels=in_channels,
            out_channels=rows // area,
            patch_size=(patch_size[0], patch_size[1], patch_size[2]),
        )
    except ConfigError as error:
        raise WeightsError(f"{source}: {error}") from error


def vae_config_of(tensors: Mapping[str, Tensor], source: str) -> VaeConfig:
    """The config of Wan's VAE file: widths from its first convolutions, levels from the encoder's flat list.

    The latent statistics are in no tensor; they are Wan2.1's.
    """
    what = "the Wan2.1 VAE"
    base_dim = shape_of(tensors, "encoder.conv1.weight", 5, source, what)[0]
    z_dim = shape_of(tensors, "conv2.weight", 5, source, what)[0]
    widths: list[int] = []
    blocks: list[int] = [0]
    temporal: list[bool] = []
    for index in range(count_layers(tensors, "encoder.downsamples.")):
        module = f"encoder.downsamples.{index}"
        if f"{module}.resample.1.weight" in tensors:
            temporal.append(f"{module}.time_conv.weight" in tensors)
            blocks.append(0)
            continue
        width = shape_of(tensors, f"{module}.residual.2.weight", 5, source, what)[0]
        blocks[-1] += 1
        if len(widths) < len(blocks):
            widths.append(width)
    if len(set(blocks)) != 1 or len(widths) != len(blocks):
        raise WeightsError(f"{source}: expected {what}, as many residual blocks on every level, came {blocks}")
    if any(width % base_dim for width in widths):
        raise WeightsError(f"{source}: expected {what}, widths that are multiples of {base_dim}, came {widths}")
    try:
        return VaeConfig(
            base_dim=base_dim,
            z_dim=z_dim,
            dim_mult=tuple(width // base_dim for width in widths),
            num_res_blocks=blocks[0],
            temporal_downsample=tuple(temporal),
        )
    except ConfigError as error:
        raise WeightsError(f"{source}: {error}") from error


def text_encoder_config_of(tensors: Mapping[str, Tensor], source: str) -> TextEncoderConfig:
    """The config of Wan's umT5 file; the reach of the relative positions is in no tensor and is umT5's."""
    what = "the umT5 encoder"
    vocab_size, d_model = shape_of(tensors, "token_embedding.weight", 2, source, what)
    layers = count_layers(tensors, "blocks.")
    table = "blocks.{}.pos_embedding.embedding.weight"
    if layers > 1 and table.format(0) in tensors and table.format(1) not in tensors:
        raise WeightsError(f"{source}: expected umT5, with positions in each layer, came a T5, with them in the first")
    buckets, num_heads = shape_of(tensors, "blocks.0.pos_embedding.embedding.weight", 2, source, what)
    try:
        return TextEncoderConfig(
            vocab_size=vocab_size,
            d_model=d_model,
            d_attn=shape_of(tensors, "blocks.0.attn.q.weight", 2, source, what)[0],
            d_ff=shape_of(tensors, "blocks.0.ffn.fc1.weight", 2, source, what)[0],
            num_heads=num_heads,
            num_layers=layers,
            relative_attention_num_buckets=buckets,
        )
    except ConfigError as error:
        raise WeightsError(f"{source}: {error}") from error


class MemoryFacts(NamedTuple):
    """What the tensors of a memory encoder say of it."""

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
        raise WeightsError(f"{source}: expected {what} with an FFN of a multiple of {dim} channels, came {rows}")
    return MemoryFacts(
        memory_tokens=memory_tokens,
        layers=count_layers(tensors, "layers."),
        normalize_k="norm_k_out.weight" in tensors,
        ffn_multiplier=rows // dim,
    )
