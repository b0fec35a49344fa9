"""What is benchmarked: a model's sizes, and where its tensors come from."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from echo_rt.bench.settings import RELEASED, BenchModel
from echo_rt.config import ModelConfig, TransformerConfig, VaeConfig
from echo_rt.options import RuntimeOptions, lora_text
from echo_rt.weights.choice import Taken
from echo_rt.weights.load_model import load_model
from echo_rt.weights.shapes import Shapes, memory_shapes, transformer_shapes, vae_shapes

_PROMPT_TOKENS = 77  # of random embeddings; how many there are changes no size
_NORMS = ("norm", "gamma", "connector_proj.3")
_SMALL = 0.05  # spread of what is near a constant: norm weights, biases
_GATE, _GATE_BIAS = "gate_linear.bias", 2.0  # the memory's gate is trained from near "keep"


@dataclass(frozen=True)
class Model:
    """Sizes and tensors; ``memory`` is None where the weights have no memory encoder. ``source`` says what they are,
    ``taken`` by which recipe they run, None for random ones.
    """

    source: str
    config: ModelConfig
    vae_config: VaeConfig
    transformer: Mapping[str, Tensor]
    memory: Mapping[str, Tensor] | None
    vae: Mapping[str, Tensor]
    taken: Taken | None = None

    @property
    def released(self) -> bool:
        """Whether these are the sizes that the goals speak of."""
        return _sizes(self.config, self.vae_config) == _sizes(RELEASED.config, RELEASED.vae)

    def without_memory(self) -> ModelConfig:
        """The config of the same model with its memory left out."""
        return dataclasses.replace(self.config, memory=None)


def _sizes(config: ModelConfig, vae: VaeConfig) -> tuple[Any, ...]:
    return config.transformer, config.window, config.sampler, config.latent_shape, config.memory_frames, vae


def random_prompt(config: TransformerConfig, device: torch.device, seed: int) -> Tensor:
    """Embeddings ``[length, text_dim]`` of no prompt."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(min(_PROMPT_TOKENS, config.text_len), config.text_dim, generator=generator).to(device)


def random_model(sizes: BenchModel, device: torch.device, seed: int) -> Model:
    """A model of these sizes with random weights, which are drawn as they are asked for."""
    return Model(
        source=f"random weights at the {sizes.name} sizes, seed {seed}",
        config=sizes.config,
        vae_config=sizes.vae,
        transformer=RandomTensors(transformer_shapes(sizes.config.transformer), device, seed),
        memory=RandomTensors(memory_shapes(sizes.config), device, seed),
        vae=RandomTensors(vae_shapes(sizes.vae), device, seed),
    )


def folder_model(model: str | Path, options: RuntimeOptions) -> Model:
    """The model of a folder, by the rules of :meth:`echo_rt.Runtime.from_pretrained`; its errors are that one's."""
    found = load_model(model, options)
    loras = [lora_text(*lora) for lora in found.loras]
    return Model(
        source=" with ".join(str(path) for path in (model, options.checkpoint, *loras) if path is not None),
        config=found.config,
        vae_config=found.folder.vae_config(),
        transformer=found.transformer,
        memory=found.memory,
        vae=found.folder.vae_tensors(),
        taken=found.taken,
    )


class RandomTensors(Mapping[str, Tensor]):
    """Weights that are on no disk: float32 on ``device``, at scales that keep a model's amplitudes.

    A tensor depends on the seed, its name and the kind of device, and on nothing that was asked for before: two models
    made from it have the same weights, without anyone holding them in between.
    """

    def __init__(self, shapes: Shapes, device: torch.device, seed: int = 0) -> None:
        self._shapes, self._device, self._seed = shapes, device, seed

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(f"{self._seed}/{name}".encode()))
        x = torch.randn(shape, generator=generator, device=self._device, dtype=torch.float32)
        if name.endswith(".bias"):
            return x.mul_(_SMALL).add_(_GATE_BIAS if name == _GATE else 0.0)
        if any(norm in name for norm in _NORMS):
            return x.mul_(_SMALL).add_(1.0)
        if name.endswith("modulation"):
            return x.div_(math.sqrt(shape[-1]))
        if name.endswith("query_init"):
            return x
        return x.div_(math.sqrt(math.prod(shape[1:])))

    def __contains__(self, name: object) -> bool:
        return name in self._shapes  # the inherited one would draw the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)
