"""Generator checkpoints: a distilled transformer, with a memory encoder (Echo-Infinity) or without (Self-Forcing kin).

A training run saves a dict with ``generator``, its moving average ``generator_ema``, or both; a converted file may
hold the tensors of one of them bare. In front of a tensor's name stands what training wrapped around the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from echo_rt.config import ModelConfig, TransformerConfig
from echo_rt.errors import WeightsError
from echo_rt.utils.wording import counted
from echo_rt.weights.files import check_tensors, open_tensors
from echo_rt.weights.lora import LORA_SECTION, is_factor
from echo_rt.weights.parts import TRANSFORMER, PartTensors, bare, split_memory
from echo_rt.weights.shapes import MEMORY_PREFIX, count_layers, memory_config_of, memory_shapes, shape_of
from echo_rt.weights.tensors import LazyTensors, TensorFile, below

_GENERATOR, _GENERATOR_EMA = "generator", "generator_ema"


@dataclass(frozen=True)
class GeneratorTensors:
    """A generator checkpoint: ``transformer`` as Wan names it, ``memory`` without its prefix (``None`` without one).

    ``ema``: whether they are the averaged weights; ``None`` of a file that is no dict of dicts.
    """

    transformer: Mapping[str, Tensor]
    memory: Mapping[str, Tensor] | None
    ema: bool | None


def load_generator(
    source: str | Path | TensorFile, config: TransformerConfig, *, ema: bool | None = None, prefer_ema: bool = True
) -> GeneratorTensors:
    """The generator of a checkpoint (a weight file, opened or not), mapped, for a transformer of ``config``.

    ``ema``: ``True`` takes ``generator_ema`` and fails without it, ``False`` takes ``generator`` and fails without it;
    ``None`` takes the average or not as ``prefer_ema`` says, and the other where the file has that one alone. A memory
    encoder that the average lacks comes from ``generator``. Whether the memory encoder fits a video's size says
    :func:`check_memory`.

    Errors: ``WeightsError`` for a file that is damaged, lacks the part asked for, or holds another model.
    """
    file = source if isinstance(source, TensorFile) else open_tensors(source)
    sections = {name.split(".", 1)[0] for name in file}
    if LORA_SECTION in sections or any(map(is_factor, file)):
        raise WeightsError(f"{file.path}: expected a whole generator, found a LoRA, which is merged into one instead")
    there = [name for name in (_GENERATOR, _GENERATOR_EMA) if name in sections]
    if ema is None or (ema is False and not there):
        part = _GENERATOR_EMA if prefer_ema and _GENERATOR_EMA in there else next(iter(there), None)
    elif (part := _GENERATOR_EMA if ema else _GENERATOR) not in there:
        others = " and ".join(there) or "neither it nor generator"
        raise WeightsError(f"{file.path}: expected {part}, which was asked for, found {others}")
    transformer, memory = _split(file, part)
    if not memory and part == _GENERATOR_EMA and _GENERATOR in sections:
        memory = _split(file, _GENERATOR)[1]
    source = f"{file.path} ({part})" if part else str(file.path)
    found = PartTensors(TRANSFORMER, transformer, source)
    # Another model is one plain error, where the list of tensors would be all of them.
    dim = shape_of(found.named, "patch_embedding.weight", 5, source, "a Wan transformer")[0]
    layers = count_layers(found.named, "blocks.")
    if (dim, layers) != (config.dim, config.num_layers):
        raise WeightsError(
            f"{source}: expected a transformer {config.dim} wide with {counted(config.num_layers, 'block')}, "
            f"found one {dim} wide with {layers}: the checkpoint of another model"
        )
    return GeneratorTensors(found.original(config), memory or None, None if part is None else part == _GENERATOR_EMA)


def holds_memory(file: TensorFile) -> bool:
    """Return whether a memory encoder is in a checkpoint or LoRA file, in any of its parts."""
    return any(MEMORY_PREFIX in name for name in file)


def check_memory(tensors: Mapping[str, Tensor], config: ModelConfig, source: str) -> None:
    """Raise ``WeightsError`` unless ``tensors`` are exactly the memory encoder that ``config`` describes.

    A memory encoder is made for one video size: it has as many tokens as ``config.memory_frames`` latent frames.
    """
    tokens, _ = memory_config_of(tensors, source)
    frames, per_frame = config.memory_frames, config.tokens_per_frame
    if tokens != frames * per_frame:
        size = f"{config.latent_width}x{config.latent_height}"
        raise WeightsError(
            f"{source}: expected a memory of {counted(frames, 'frame')} x {counted(per_frame, 'token')} = "
            f"{frames * per_frame} tokens for latents of {size}, found one of {counted(tokens, 'token')}, "
            "made for another video size"
        )
    check_tensors(tensors, memory_shapes(config), source)


def _split(file: TensorFile, part: str | None) -> tuple[LazyTensors, LazyTensors]:
    source = f"{file.path} ({part})" if part else str(file.path)
    return split_memory(bare(file if part is None else below(file, f"{part}."), source), source)
