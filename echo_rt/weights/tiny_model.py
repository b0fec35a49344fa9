"""Random tensors of any model, and a complete small model folder of them, for trying things and for tests.

They are noise at the scale of real weights, and depend on a seed and names alone.
"""

from __future__ import annotations

import io
import json
import math
import os
import zlib
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from echo_rt.config import MemoryConfig, ModelConfig, TextEncoderConfig, TransformerConfig, VaeConfig
from echo_rt.errors import OutputError, TargetError, WeightsError
from echo_rt.options import RECIPE, check_seed, latent_size
from echo_rt.utils.wording import counted
from echo_rt.weights.folder import (
    DEMO_FOLDER,
    TEXT_ENCODER_FILE,
    TOKENIZER_FOLDER,
    TRANSFORMER_CONFIG,
    TRANSFORMER_STEM,
    VAE_FILE,
    WAN_FIELDS,
)
from echo_rt.weights.reading import read_object
from echo_rt.weights.shapes import (
    MEMORY_PREFIX,
    Shapes,
    memory_shapes,
    text_encoder_shapes,
    transformer_shapes,
    vae_shapes,
)
from echo_rt.weights.tensors import LazyTensors, Stored
from echo_rt.weights.tiny_vae import TAEW, TinyVaeConfig, tiny_decoder_shapes

_NORMS = ("norm", "gamma", "connector_proj.3")
_SMALL = 0.05  # spread of what is near a constant: norm weights, biases
_GATE, _GATE_BIAS = "gate_linear.bias", 2.0  # the memory's gate begins near "keep"

CHECKPOINT_FILE = "echo_infinity.pt"
TINY_VAE_FILE = f"{TAEW}.pth"
_TRANSFORMER_FILE = f"{TRANSFORMER_STEM}.safetensors"
_TRANSFORMER = TransformerConfig(dim=128, ffn_dim=256, freq_dim=64, num_heads=2, num_layers=3, text_dim=32, text_len=64)
_MEMORY = MemoryConfig()
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_FILES = {
    TRANSFORMER_CONFIG,
    _TRANSFORMER_FILE,
    VAE_FILE,
    TEXT_ENCODER_FILE,
    CHECKPOINT_FILE,
    TINY_VAE_FILE,
    *(f"{TOKENIZER_FOLDER}/{name}" for name in _TOKENIZER_FILES),
}
_MARK = "tiny_seed"  # in config.json, tells a folder that was written here from anyone else's
_RECIPE = "echo-infinity-long"  # whose memory encoder this one is


def write_tiny_model(
    folder: str | Path, *, seed: int = 0, width: int = 128, height: int = 80, overwrite: bool = False
) -> None:
    """Write a model, with a memory encoder in ``echo_infinity.pt`` and a tiny decoder for previews, to ``folder``.

    It appears whole or not at all. The same ``seed`` (0 .. 2^64-1) gives the same bytes. ``width``, ``height``: of the
    video in pixels, which the memory is made for; multiples of 16. ``overwrite``: replace a folder that this function
    wrote and that nothing was added to.

    Errors: ``ConfigError`` for a seed or size that cannot be; ``OutputError`` for a folder that is in the way or
    cannot be written.
    """
    check_seed(seed)
    vae = VaeConfig(base_dim=4)
    config = ModelConfig(_TRANSFORMER, *latent_size(width, height, vae, _TRANSFORMER), memory=_MEMORY)
    target = Path(os.path.realpath(folder))
    try:
        _check_replaceable(target, overwrite)
    except OSError as error:
        raise TargetError(f"{target}: cannot write the model: {error.strerror or error}") from error
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as beside:
            new, old = Path(beside, "new"), Path(beside, "old")
            (new / TOKENIZER_FOLDER).mkdir(parents=True)
            _write_parts(new, config, vae, seed, width, height)
            with suppress(FileNotFoundError):
                target.rename(old)
            try:
                new.rename(target)
            except OSError:
                with suppress(FileNotFoundError):
                    old.rename(target)
                raise
    except OSError as error:
        raise OutputError(f"{folder}: cannot write the model: {error.strerror or error}") from error


def _check_replaceable(target: Path, overwrite: bool) -> None:
    """Raise ``TargetError`` unless a folder may be put at ``target``."""
    if target.exists() and not target.is_dir():
        raise TargetError(f"{target}: expected the name of a folder, got a file")
    found = {path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir()}
    if not found:
        return
    try:
        tiny = _MARK in read_object(target / TRANSFORMER_CONFIG, "a config")["echo_rt"]
    except (WeightsError, TypeError, KeyError):
        tiny = False
    if not tiny:
        raise TargetError(f"{target}: is not empty and holds no model written here; name another folder")
    if not overwrite:
        raise TargetError(f"{target}: already holds a small random model; --overwrite it, or name another")
    if added := sorted(found - _FILES):
        raise TargetError(f"{target}: not replaced, since it holds {counted(len(added), 'other file')} ({added[0]})")


def _write_parts(part: Path, config: ModelConfig, vae: VaeConfig, seed: int, width: int, height: int) -> None:
    transformer, draw = config.transformer, Draw(seed)
    facts = {_MARK: seed, "width": width, "height": height, RECIPE: _RECIPE}
    (part / TRANSFORMER_CONFIG).write_text(json.dumps(wan_config(transformer, facts), indent=2) + "\n")
    shapes = transformer_shapes(transformer)
    base = random_tensors(shapes, draw, torch.bfloat16)
    (part / _TRANSFORMER_FILE).write_bytes(safetensors.torch.save(base, {"format": "pt"}))

    shapes |= {MEMORY_PREFIX + name: shape for name, shape in memory_shapes(config).items()}
    checkpoint = {}
    for name in ("generator", "generator_ema"):
        tensors = random_tensors(shapes, Draw(f"{seed}/{name}"), torch.bfloat16)
        checkpoint[name] = {f"model.{key}": tensor for key, tensor in tensors.items()}
    save_pickle(part / CHECKPOINT_FILE, checkpoint)
    save_pickle(part / VAE_FILE, random_tensors(vae_shapes(vae), draw, torch.float32))
    tiny_vae = TinyVaeConfig(vae.z_dim, widths=(16, 12, 8, 8))
    tiny_decoder = random_tensors(tiny_decoder_shapes(tiny_vae), draw, torch.float16)
    tiny_decoder[f"{tiny_vae.head}.bias"].fill_(0.5)  # colours are in [0, 1]
    save_pickle(part / TINY_VAE_FILE, tiny_decoder)

    text_encoder = TextEncoderConfig(
        vocab_size=1024, d_model=transformer.text_dim, d_attn=32, d_ff=64, num_heads=4, num_layers=2
    )
    save_pickle(part / TEXT_ENCODER_FILE, random_tensors(text_encoder_shapes(text_encoder), draw, torch.bfloat16))
    _write_tokenizer(part / TOKENIZER_FOLDER, transformer.text_len)


def wan_config(config: TransformerConfig, facts: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json`` under Wan's own field names, and what it leaves out."""
    fields = {theirs: getattr(config, ours) for theirs, ours in sorted(WAN_FIELDS.items()) if ours != "patch_size"}
    return {"_class_name": "WanModel", "model_type": "t2v", **fields, "echo_rt": dict(facts)}


def save_pickle(path: Path, content: Mapping[str, Any]) -> None:
    """``torch.save``; by way of memory, so that its bytes do not name the file and a full disk is an ``OSError``."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.write_bytes(buffer.getvalue())


def _write_tokenizer(folder: Path, text_len: int) -> None:
    """The demo model's: a byte-level BPE, which spells any text, that ends a prompt with ``</s>``."""
    source = DEMO_FOLDER / TOKENIZER_FOLDER
    whole, config = _TOKENIZER_FILES
    (folder / whole).write_bytes((source / whole).read_bytes())
    facts = read_object(source / config, "a tokenizer's config") | {"model_max_length": text_len}
    (folder / config).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


class Draw:
    """Normal random tensors that depend on a seed, a name and the kind of device, not on the order of drawing."""

    def __init__(self, seed: int | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64) -> None:
        self._seed, self._device, self._dtype = seed, device, dtype

    def __call__(self, name: str, *shape: int) -> Tensor:
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(f"{self._seed}/{name}".encode()))
        return torch.randn(shape, generator=generator, device=self._device, dtype=self._dtype)


def random_tensor(draw: Draw, name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor at the scale that keeps amplitudes: unit gain for matrices, near 1 for norms, near 0 for biases."""
    x = draw(name, *shape)
    if name.endswith(_GATE):
        return _SMALL * x + _GATE_BIAS
    if name.endswith(".bias"):
        return _SMALL * x
    if any(norm in name for norm in _NORMS):
        return 1 + _SMALL * x
    if name.endswith("modulation"):
        return x / math.sqrt(shape[-1])
    if name.endswith("query_init"):
        return x
    return x / math.sqrt(math.prod(shape[1:]))


def random_tensors(shapes: Shapes, draw: Draw, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """All tensors of ``shapes``."""
    return {name: random_tensor(draw, name, shape).to(dtype) for name, shape in shapes.items()}


class RandomTensors(LazyTensors):
    """Random weights of these ``shapes``: float32 on ``device``, drawn anew whenever they are asked for.

    A model of any size can be made of them without anyone holding them in between.
    """

    def __init__(self, shapes: Shapes, device: torch.device, seed: int = 0) -> None:
        draw = Draw(seed, device, torch.float32)
        super().__init__({name: Stored(partial(random_tensor, draw, name, shape)) for name, shape in shapes.items()})
