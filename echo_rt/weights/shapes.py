"""The networks of a model as tables: each tensor's shape and its names in every layout; sizes read back from files.

The tables are what a loaded file is held against, entry by entry, and what ``echo-rt tiny`` fills. Sizes are read off
tensors where files carry no config: only what fixes them is looked at, ``check_tensors`` says whether all fit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from echo_rt.config import MemoryConfig, ModelConfig, TextEncoderConfig, TransformerConfig, VaeConfig
from echo_rt.errors import ConfigError, WeightsError
from echo_rt.utils.wording import counted
from echo_rt.weights.tensors import lazy

T = TypeVar("T")
_Config = TypeVar("_Config")

Shapes = dict[str, tuple[int, ...]]

MEMORY_PREFIX = "query_memory_encoder."

_HEAD_DIM = 128  # of every Wan2.1 transformer; no shape says it
ANY_TRANSFORMER = TransformerConfig(dim=128, ffn_dim=1, freq_dim=2, num_heads=1, num_layers=1)  # for names
_WEIGHT, _GAMMA, _BARE = (".weight",), (".gamma",), ("",)


class Module(NamedTuple):
    """The tensors of a module, whose names end in ``tensors``; ``shape`` is that of all, a bias has its first size.

    ``names``: Wan's or Echo-Infinity's, then those of other layouts; ``#`` stands for the layer's number.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    tensors: tuple[str, ...] = (".weight", ".bias")


Modules = list[Module]


def tensors_of(modules: Iterable[Module], layers: int = 0) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    """The names of every tensor of ``modules`` and its shape; those of a layer for each of ``layers``."""
    for layered, group in itertools.groupby(modules, key=lambda module: "#" in module.names[0]):
        run = list(group)
        for layer in range(layers) if layered else (0,):
            for names, shape, tensors in run:
                for end in tensors:
                    own = tuple(f"{name}{end}".replace("#", str(layer)) for name in names)
                    yield own, shape[:1] if end == ".bias" else shape


def shapes_of(modules: Iterable[Module], layers: int = 0) -> Shapes:
    """The tensors of :func:`tensors_of` under their original names."""
    return {names[0]: shape for names, shape in tensors_of(modules, layers)}


def names_of(modules: Iterable[Module], layers: int = 0, layout: int = 1) -> dict[str, str]:
    """The original names of the tensors of :func:`tensors_of` -> those in a layout, by its number."""
    return {names[0]: names[layout] for names, _ in tensors_of(modules, layers)}


def transformer_modules(config: TransformerConfig) -> Modules:
    """The diffusion transformer under Wan's names and those of diffusers' ``WanTransformer3DModel``."""
    dim, ffn = config.dim, config.ffn_dim
    text, time = "condition_embedder.text_embedder.linear", "condition_embedder.time_embedder.linear"
    projections = (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
    modules = [
        Module(("patch_embedding", "patch_embedding"), (dim, config.in_channels, *config.patch_size)),
        Module(("text_embedding.0", f"{text}_1"), (dim, config.text_dim)),
        Module(("text_embedding.2", f"{text}_2"), (dim, dim)),
        Module(("time_embedding.0", f"{time}_1"), (dim, config.freq_dim)),
        Module(("time_embedding.2", f"{time}_2"), (dim, dim)),
        Module(("time_projection.1", "condition_embedder.time_proj"), (6 * dim, dim)),
        Module(("head.modulation", "scale_shift_table"), (1, 2, dim), _BARE),
        Module(("head.head", "proj_out"), (config.patch_area * config.out_channels, dim)),
        Module(("blocks.#.modulation", "blocks.#.scale_shift_table"), (1, 6, dim), _BARE),
    ]
    for ours, theirs in (("blocks.#.self_attn", "blocks.#.attn1"), ("blocks.#.cross_attn", "blocks.#.attn2")):
        modules += (Module((f"{ours}.{a}", f"{theirs}.{b}"), (dim, dim)) for a, b in projections)
        modules += (Module((f"{ours}.{x}", f"{theirs}.{x}"), (dim,), _WEIGHT) for x in ("norm_q", "norm_k"))
    return [
        *modules,
        # The norm before cross-attention: third in Wan's source, second in the order it is used.
        Module(("blocks.#.norm3", "blocks.#.norm2"), (dim,)),
        Module(("blocks.#.ffn.0", "blocks.#.ffn.net.0.proj"), (ffn, dim)),
        Module(("blocks.#.ffn.2", "blocks.#.ffn.net.2"), (dim, ffn)),
    ]


def memory_shapes(config: ModelConfig) -> Shapes:
    """The memory encoder, without the prefix ``query_memory_encoder.``; empty where the model has no memory."""
    if config.memory is None:
        return {}
    dim, ffn = config.transformer.dim, config.memory.ffn_multiplier * config.transformer.dim
    modules = [
        Module(("query_init",), (1, config.memory_tokens, dim), _BARE),
        *(Module((f"layers.#.{name}",), (dim, dim)) for name in "qo"),
        *(Module((f"layers.#.{name}",), (dim,), _WEIGHT) for name in ("norm_q", "norm1", "norm2")),
        Module(("layers.#.ffn.0",), (ffn, dim)),
        Module(("layers.#.ffn.2",), (dim, ffn)),
        *(Module((name,), (dim, dim)) for name in ("connector_proj.0", "connector_proj.2", "to_k", "to_v")),
        Module(("gate_linear",), (dim, 2 * dim)),
        Module(("connector_proj.3",), (dim,), _WEIGHT),
        *([Module(("norm_k_out",), (dim,), _WEIGHT)] if config.memory.normalize_k else []),
    ]
    return shapes_of(modules, config.memory.layers)


def _residual_block(ours: str, theirs: str, channels: int, out: int) -> Modules:
    modules = [
        Module((f"{ours}.residual.0", f"{theirs}.norm1"), (channels, 1, 1, 1), _GAMMA),
        Module((f"{ours}.residual.2", f"{theirs}.conv1"), (out, channels, 3, 3, 3)),
        Module((f"{ours}.residual.3", f"{theirs}.norm2"), (out, 1, 1, 1), _GAMMA),
        Module((f"{ours}.residual.6", f"{theirs}.conv2"), (out, out, 3, 3, 3)),
    ]
    shortcut = Module((f"{ours}.shortcut", f"{theirs}.conv_shortcut"), (out, channels, 1, 1, 1))
    return modules if channels == out else [*modules, shortcut]


def _middle(half: str, channels: int) -> Modules:
    ours, theirs = f"{half}.middle", f"{half}.mid_block"
    attention, their_attention = f"{ours}.1", f"{theirs}.attentions.0"
    return [
        *_residual_block(f"{ours}.0", f"{theirs}.resnets.0", channels, channels),
        Module((f"{attention}.norm", f"{their_attention}.norm"), (channels, 1, 1), _GAMMA),
        Module((f"{attention}.to_qkv", f"{their_attention}.to_qkv"), (3 * channels, channels, 1, 1)),
        Module((f"{attention}.proj", f"{their_attention}.proj"), (channels, channels, 1, 1)),
        *_residual_block(f"{ours}.2", f"{theirs}.resnets.1", channels, channels),
    ]


def _head(half: str, channels: int, out: int) -> Modules:
    return [
        Module((f"{half}.head.0", f"{half}.norm_out"), (channels, 1, 1, 1), _GAMMA),
        Module((f"{half}.head.2", f"{half}.conv_out"), (out, channels, 3, 3, 3)),
    ]


def vae_encoder_modules(config: VaeConfig) -> Modules:
    """``conv1`` and ``encoder.*`` of the VAE file; the encoder gives mean and log-variance, hence twice ``z_dim``.

    Wan's names, and those of diffusers' ``AutoencoderKLWan``; its levels are one flat list in both.
    """
    channels, statistics = config.base_dim, 2 * config.z_dim
    modules = [
        Module(("conv1", "quant_conv"), (statistics, statistics, 1, 1, 1)),
        Module(("encoder.conv1", "encoder.conv_in"), (channels, 3, 3, 3, 3)),
    ]
    names = ((f"encoder.downsamples.{index}", f"encoder.down_blocks.{index}") for index in itertools.count())
    for level, mult in enumerate(config.dim_mult):
        for _ in range(config.num_res_blocks):
            modules += _residual_block(*next(names), channels, config.base_dim * mult)
            channels = config.base_dim * mult
        if level < len(config.dim_mult) - 1:
            ours, theirs = next(names)
            modules.append(Module((f"{ours}.resample.1", f"{theirs}.resample.1"), (channels, channels, 3, 3)))
            if config.temporal_downsample[level]:
                modules.append(Module((f"{ours}.time_conv", f"{theirs}.time_conv"), (channels, channels, 3, 1, 1)))
    return [*modules, *_middle("encoder", channels), *_head("encoder", channels, statistics)]


def vae_decoder_modules(config: VaeConfig) -> Modules:
    """``conv2`` and ``decoder.*`` of the VAE file; its levels are one flat list for Wan, groups for diffusers."""
    channels = config.base_dim * config.dim_mult[-1]
    modules = [
        Module(("conv2", "post_quant_conv"), (config.z_dim, config.z_dim, 1, 1, 1)),
        Module(("decoder.conv1", "decoder.conv_in"), (channels, config.z_dim, 3, 3, 3)),
        *_middle("decoder", channels),
    ]
    names = (f"decoder.upsamples.{index}" for index in itertools.count())
    for level, mult in enumerate(reversed(config.dim_mult)):
        group = f"decoder.up_blocks.{level}"
        for block in range(config.num_res_blocks + 1):
            modules += _residual_block(next(names), f"{group}.resnets.{block}", channels, config.base_dim * mult)
            channels = config.base_dim * mult
        if level < len(config.dim_mult) - 1:
            ours, theirs, half = next(names), f"{group}.upsamplers.0", channels // 2
            if config.temporal_downsample[-1 - level]:
                modules.append(Module((f"{ours}.time_conv", f"{theirs}.time_conv"), (2 * channels, channels, 3, 1, 1)))
            modules.append(Module((f"{ours}.resample.1", f"{theirs}.resample.1"), (half, channels, 3, 3)))
            channels = half
    return [*modules, *_head("decoder", channels, 3)]


def text_encoder_modules(config: TextEncoderConfig) -> Modules:
    """The umT5 encoder under the names of Wan, transformers, and llama.cpp (which GGUF files have)."""
    width, attention, ffn = config.d_model, config.d_attn, config.d_ff
    first, second = "encoder.block.#.layer.0", "encoder.block.#.layer.1"
    positions = (config.relative_attention_num_buckets, config.num_heads)
    rows = (
        ("token_embedding", "shared", "token_embd", (config.vocab_size, width)),
        ("norm", "encoder.final_layer_norm", "enc.output_norm", (width,)),
        ("blocks.#.norm1", f"{first}.layer_norm", "enc.blk.#.attn_norm", (width,)),
        ("blocks.#.norm2", f"{second}.layer_norm", "enc.blk.#.ffn_norm", (width,)),
        *(
            (f"blocks.#.attn.{x}", f"{first}.SelfAttention.{x}", f"enc.blk.#.attn_{x}", (attention, width))
            for x in "qkv"
        ),
        ("blocks.#.attn.o", f"{first}.SelfAttention.o", "enc.blk.#.attn_o", (width, attention)),
        ("blocks.#.ffn.gate.0", f"{second}.DenseReluDense.wi_0", "enc.blk.#.ffn_gate", (ffn, width)),
        ("blocks.#.ffn.fc1", f"{second}.DenseReluDense.wi_1", "enc.blk.#.ffn_up", (ffn, width)),
        ("blocks.#.ffn.fc2", f"{second}.DenseReluDense.wo", "enc.blk.#.ffn_down", (width, ffn)),
        (
            "blocks.#.pos_embedding.embedding",
            f"{first}.SelfAttention.relative_attention_bias",
            "enc.blk.#.attn_rel_b",
            positions,
        ),
    )
    return [Module((wan, other, llama), shape, _WEIGHT) for wan, other, llama, shape in rows]


# Of the VAE what its sizes are read off; how the levels of its decoder are grouped follows from them.
VAE_SIZES = [
    Module(names, ())
    for names in (
        ("conv2", "post_quant_conv"),
        ("encoder.conv1", "encoder.conv_in"),
        ("encoder.downsamples.#.residual.2", "encoder.down_blocks.#.conv1"),
        ("encoder.downsamples.#.resample.1", "encoder.down_blocks.#.resample.1"),
        ("encoder.downsamples.#.time_conv", "encoder.down_blocks.#.time_conv"),
    )
]


def vae_modules(config: VaeConfig) -> Modules:
    """The whole VAE file: encoder, decoder and the 1x1x1 convolutions between them."""
    return [*vae_encoder_modules(config), *vae_decoder_modules(config)]


def _shapes(modules: Callable[[_Config], Modules]) -> Callable[[_Config], Shapes]:
    """From the config of a network to all its tensors."""
    return lambda config: shapes_of(modules(config), getattr(config, "num_layers", 0))


transformer_shapes, text_encoder_shapes = _shapes(transformer_modules), _shapes(text_encoder_modules)
vae_encoder_shapes, vae_decoder_shapes = _shapes(vae_encoder_modules), _shapes(vae_decoder_modules)
vae_shapes = _shapes(vae_modules)


def transformer_names(layers: int) -> dict[str, str]:
    """Wan's names of a transformer of that many blocks -> diffusers'."""
    return names_of(transformer_modules(ANY_TRANSFORMER), layers)


def shape_of(tensors: Mapping[str, Tensor], name: str, dims: int, source: str, what: str) -> tuple[int, ...]:
    """Shape of a tensor that ``what`` must have; ``WeightsError`` where it is missing, of another rank or empty."""
    if name not in tensors:
        raise WeightsError(f"{source}: expected {what}, found no {name} among its {counted(len(tensors), 'tensor')}")
    shape = lazy(tensors).entries[name].outline.shape
    if len(shape) != dims or 0 in shape:
        raise WeightsError(f"{source}: expected {what} with a {dims}-dimensional {name}, found shape {list(shape)}")
    return shape


def count_layers(tensors: Iterable[str], prefix: str) -> int:
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


def memory_config_of(tensors: Mapping[str, Tensor], source: str) -> tuple[int, MemoryConfig]:
    """The tokens and the config of a memory encoder (names without ``query_memory_encoder.``).

    The tokens are frames times tokens of a frame: how many frames that is depends on the video's size.

    Errors: ``WeightsError`` for tensors that are no memory encoder.
    """
    what = "a memory encoder"
    _, tokens, dim = shape_of(tensors, "query_init", 3, source, what)
    rows = shape_of(tensors, "layers.0.ffn.0.weight", 2, source, what)[0]
    if rows % dim:
        raise WeightsError(f"{source}: expected {what} with an FFN of a multiple of {dim} channels, found {rows}")
    return tokens, configured(
        MemoryConfig,
        source,
        layers=count_layers(tensors, "layers."),
        normalize_k="norm_k_out.weight" in tensors,
        ffn_multiplier=rows // dim,
    )
