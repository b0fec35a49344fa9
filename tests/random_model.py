"""Random weights for a config, well-behaved over hundreds of blocks; shared by tests and benchmarks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from echo_rt.attention import attentions
from echo_rt.config import ModelConfig
from echo_rt.engine.build import Networks
from echo_rt.engine.build import build_rollout as build
from echo_rt.engine.executor import Executor, make_executor
from echo_rt.engine.rollout import Rollout
from echo_rt.ops.backends import choose_backend
from echo_rt.ops.noise import fill_normal, seed_words
from echo_rt.options import MemoryMode, RuntimeOptions
from echo_rt.weights.shapes import MEMORY_PREFIX, memory_shapes, transformer_shapes
from echo_rt.weights.tensors import FingerprintedTensors, ModelTensors


def flat_config(**changes: Any) -> dict[str, Any]:
    """A small model's flat config: 6 tokens a frame, two layers, the released window; ``changes`` replace entries."""
    config: dict[str, Any] = {
        "dim": 24,
        "num_heads": 2,
        "ffn_dim": 40,
        "num_layers": 2,
        "freq_dim": 16,
        "text_dim": 8,
        "text_len": 5,
        "in_channels": 4,
        "out_channels": 4,
        "patch_size": [1, 2, 2],
        "latent_height": 4,
        "latent_width": 6,
        "frames_per_block": 3,
        "sink_frames": 3,
        "local_frames": 9,
        "max_temporal_id": 20,
        "memory": {"frames": 3, "layers": 2, "normalize_k": False, "rebuild_on_prompt_switch": True},
        "denoising_steps": [1000, 750, 500, 250],
        "timestep_shift": 5.0,
        "context_timestep": 0,
    }
    return config | changes


def random_weights(flat: Mapping[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Tensors of transformer and memory under their original names, scaled by their fan-in."""
    config = ModelConfig.from_flat(flat)
    shapes = transformer_shapes(config.transformer)
    shapes |= {MEMORY_PREFIX + name: shape for name, shape in memory_shapes(config).items()}
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        tensor = torch.randn(shape, generator=generator)
        if "norm" in name or name.endswith("connector_proj.3.weight"):
            tensor = 0.1 * tensor + (1.0 if name.endswith("weight") else 0.0)
        elif name.endswith("gate_linear.bias"):
            tensor = 2.0 + 0.1 * tensor
        elif name.endswith("query_init"):
            tensor = tensor * 1.0
        elif name.endswith(".bias"):
            tensor = 0.1 * tensor
        else:
            tensor = tensor / tensor[0].numel() ** 0.5
        weights[name] = tensor
    return weights


def build_rollout(
    flat: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    mode: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str = "torch",
    executor: Executor | None = None,
) -> Rollout:
    """A rollout of echo_rt over those weights."""
    config, place = ModelConfig.from_flat(flat), torch.device(device)
    chosen = choose_backend(backend, place)
    own = {} if config.memory is None else {name: weights[MEMORY_PREFIX + name] for name in memory_shapes(config)}
    tensors = ModelTensors(FingerprintedTensors(weights, "random"), FingerprintedTensors(own, "random"))
    attention = attentions(config, place, dtype, chosen.ops, cache=None)
    networks = Networks(config, tensors, RuntimeOptions(device=place, dtype=dtype), chosen, selected=attention)
    return build(config, networks, MemoryMode(mode), executor or make_executor(place))


def drawn_noise(shape: torch.Size, seed: int, block: int) -> Tensor:
    """The noise ``[steps, B, C, h, w]`` that a rollout draws for ``block``, by the generator's own definition."""
    out = torch.empty(shape)
    for step, noise in enumerate(out):
        fill_normal(noise, block, step, seed_words(seed))
    return out
