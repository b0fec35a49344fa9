"""What is benchmarked: a model's sizes, and where its tensors come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from echo_rt.bench.model_sizes import RELEASED, BenchModel
from echo_rt.bench.random_tensors import RandomTensors
from echo_rt.config import ModelConfig, TransformerConfig, VaeConfig
from echo_rt.options import RuntimeOptions
from echo_rt.weights.load_model import load_model
from echo_rt.weights.shapes import memory_shapes, transformer_shapes, vae_shapes

_PROMPT_TOKENS = 77  # of random embeddings; how many there are changes no size


@dataclass(frozen=True)
class Model:
    """Sizes and tensors; ``memory`` is None where the weights have no memory encoder. ``source`` says what they are."""

    source: str
    config: ModelConfig
    vae_config: VaeConfig
    transformer: Mapping[str, Tensor]
    memory: Mapping[str, Tensor] | None
    vae: Mapping[str, Tensor]

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
    return Model(
        source=" with ".join(str(path) for path in (model, options.checkpoint, options.lora) if path is not None),
        config=found.config,
        vae_config=found.folder.vae_config(),
        transformer=found.transformer,
        memory=found.memory,
        vae=found.folder.vae_tensors(),
    )
