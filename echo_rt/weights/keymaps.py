"""The names of the same tensors in the original files and in those of diffusers and transformers.

A table row pairs two modules; what follows a module's name (``.weight``, ``.bias``, nothing for a bare parameter) is
the same on both sides. ``#`` stands for the first number of a name, the layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress

from torch import Tensor

from echo_rt.config import VaeConfig
from echo_rt.errors import WeightsError
from echo_rt.weights.shapes import Shapes
from echo_rt.weights.tensors import RenamedTensors

Rows = tuple[tuple[str, str], ...]

_ATTENTION: Rows = (
    ("q", "to_q"),
    ("k", "to_k"),
    ("v", "to_v"),
    ("o", "to_out.0"),
    ("norm_q", "norm_q"),
    ("norm_k", "norm_k"),
)
_TRANSFORMER: Rows = (
    ("patch_embedding", "patch_embedding"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("head.head", "proj_out"),
    ("head.modulation", "scale_shift_table"),
    ("blocks.#.modulation", "blocks.#.scale_shift_table"),
    *((f"blocks.#.self_attn.{a}", f"blocks.#.attn1.{b}") for a, b in _ATTENTION),
    *((f"blocks.#.cross_attn.{a}", f"blocks.#.attn2.{b}") for a, b in _ATTENTION),
    # The norm before cross-attention: third in Wan's source, second in the order it is used.
    ("blocks.#.norm3", "blocks.#.norm2"),
    ("blocks.#.ffn.0", "blocks.#.ffn.net.0.proj"),
    ("blocks.#.ffn.2", "blocks.#.ffn.net.2"),
)
_SELF_ATTENTION, _FEED_FORWARD = "encoder.block.#.layer.0", "encoder.block.#.layer.1"
_UMT5: Rows = (
    ("token_embedding", "shared"),
    ("norm", "encoder.final_layer_norm"),
    ("blocks.#.norm1", f"{_SELF_ATTENTION}.layer_norm"),
    *((f"blocks.#.attn.{name}", f"{_SELF_ATTENTION}.SelfAttention.{name}") for name in ("q", "k", "v", "o")),
    ("blocks.#.pos_embedding.embedding", f"{_SELF_ATTENTION}.SelfAttention.relative_attention_bias"),
    ("blocks.#.norm2", f"{_FEED_FORWARD}.layer_norm"),
    ("blocks.#.ffn.gate.0", f"{_FEED_FORWARD}.DenseReluDense.wi_0"),
    ("blocks.#.ffn.fc1", f"{_FEED_FORWARD}.DenseReluDense.wi_1"),
    ("blocks.#.ffn.fc2", f"{_FEED_FORWARD}.DenseReluDense.wo"),
)
# llama.cpp's names, which GGUF files have.
_UMT5_GGUF: Rows = (
    ("token_embedding", "token_embd"),
    ("norm", "enc.output_norm"),
    ("blocks.#.norm1", "enc.blk.#.attn_norm"),
    *((f"blocks.#.attn.{name}", f"enc.blk.#.attn_{name}") for name in ("q", "k", "v", "o")),
    ("blocks.#.pos_embedding.embedding", "enc.blk.#.attn_rel_b"),
    ("blocks.#.norm2", "enc.blk.#.ffn_norm"),
    ("blocks.#.ffn.gate.0", "enc.blk.#.ffn_gate"),
    ("blocks.#.ffn.fc1", "enc.blk.#.ffn_up"),
    ("blocks.#.ffn.fc2", "enc.blk.#.ffn_down"),
)
_RESIDUAL: Rows = (
    ("residual.0", "norm1"),
    ("residual.2", "conv1"),
    ("residual.3", "norm2"),
    ("residual.6", "conv2"),
    ("shortcut", "conv_shortcut"),
)
_RESAMPLE: Rows = (("resample.1", "resample.1"), ("time_conv", "time_conv"))
_MIDDLE: Rows = (
    *((f"0.{a}", f"resnets.0.{b}") for a, b in _RESIDUAL),
    ("1", "attentions.0"),
    *((f"2.{a}", f"resnets.1.{b}") for a, b in _RESIDUAL),
)
_VAE: Rows = (
    ("conv1", "quant_conv"),
    ("conv2", "post_quant_conv"),
    *(
        (f"{half}.{a}", f"{half}.{b}")
        for half in ("encoder", "decoder")
        for a, b in (
            ("conv1", "conv_in"),
            *((f"middle.{a}", f"mid_block.{b}") for a, b in _MIDDLE),
            ("head.0", "norm_out"),
            ("head.2", "conv_out"),
        )
    ),
    # The encoder is one flat list on both sides.
    *((f"encoder.downsamples.#.{a}", f"encoder.down_blocks.#.{b}") for a, b in (*_RESIDUAL, *_RESAMPLE)),
)


class KeyMap:
    """The two names of every tensor of a model part, and the way from each to the other."""

    def __init__(self, rows: Iterable[tuple[str, str]], layout: str) -> None:
        self._to_other = dict(rows)
        self._to_original = {other: original for original, other in self._to_other.items()}
        self._layout = layout
        assert len(self._to_other) == len(self._to_original), "two modules of one layout share a name in the other"

    def to_other(self, name: str) -> str:
        """The name in the other layout of the tensor with this original name; ``WeightsError`` if there is none."""
        return _translate(name, self._to_other, f"a tensor of the original layout with a name in {self._layout}")

    def to_original(self, name: str) -> str:
        """The original name of the tensor with this name in the other layout; ``WeightsError`` if there is none."""
        return _translate(name, self._to_original, f"a tensor of {self._layout} with a name in the original layout")

    def to_other_shapes(self, shapes: Shapes) -> Shapes:
        """``shapes`` (original names) under the names of the other layout."""
        return {self.to_other(name): shape for name, shape in shapes.items()}

    def original_view(self, tensors: Mapping[str, Tensor], shapes: Shapes) -> RenamedTensors:
        """``tensors`` of the other layout under the original names in ``shapes``."""
        return RenamedTensors(tensors, {name: self.to_other(name) for name in shapes})

    def originals(self, tensors: Mapping[str, Tensor]) -> RenamedTensors:
        """Those of ``tensors`` (names of the other layout) that have an original name, under it."""
        names = {}
        for name in tensors:
            with suppress(WeightsError):
                names[self.to_original(name)] = name
        return RenamedTensors(tensors, names)


def _translate(name: str, table: Mapping[str, str], expected: str) -> str:
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts))
    for end in range(len(parts), 0, -1):
        module, rest = parts[:end], "".join(f".{part}" for part in parts[end:])
        exact = table.get(".".join(module))
        if exact is not None:
            return exact + rest
        if number < end:
            generic = table.get(".".join([*module[:number], "#", *module[number + 1 :]]))
            if generic is not None:
                return generic.replace("#", parts[number]) + rest
    raise WeightsError(f"{name}: expected {expected}")


def transformer_key_map() -> KeyMap:
    """The diffusion transformer: Wan and diffusers' ``WanTransformer3DModel``."""
    return KeyMap(_TRANSFORMER, "diffusers")


def text_encoder_key_map() -> KeyMap:
    """The text encoder: Wan's umT5 and transformers' ``UMT5EncoderModel``."""
    return KeyMap(_UMT5, "transformers")


def gguf_text_encoder_key_map() -> KeyMap:
    """The text encoder: Wan's umT5 and llama.cpp's T5."""
    return KeyMap(_UMT5_GGUF, "GGUF")


def vae_key_map(config: VaeConfig | None) -> KeyMap:
    """The VAE: Wan and diffusers' ``AutoencoderKLWan``.

    The original decoder is one flat list; diffusers groups it into levels, so their sizes decide the names. Without a
    config the decoder's levels are left out.
    """
    rows = list(_VAE)
    levels, resnets = (0, 0) if config is None else (len(config.dim_mult), config.num_res_blocks + 1)
    index = 0
    for level in range(levels):
        block = f"decoder.up_blocks.{level}"
        for resnet in range(resnets):
            rows += ((f"decoder.upsamples.{index}.{a}", f"{block}.resnets.{resnet}.{b}") for a, b in _RESIDUAL)
            index += 1
        if level < levels - 1:
            rows += ((f"decoder.upsamples.{index}.{a}", f"{block}.upsamplers.0.{b}") for a, b in _RESAMPLE)
            index += 1
    return KeyMap(rows, "diffusers")


def umt5_to_transformers(name: str) -> str:
    """The name in ``UMT5EncoderModel`` of a tensor of Wan's umT5; ``WeightsError`` for any other name."""
    return text_encoder_key_map().to_other(name)
