"""The differentiable rollout that the demo model is trained with computes what the formulas say."""

from __future__ import annotations

import math

import pytest
import torch
from naive_rollout import NaiveRollout
from torch import Tensor

from echo_rt.config import MemoryConfig, ModelConfig, SamplerConfig, TransformerConfig, WindowConfig
from echo_rt.weights.shapes import MEMORY_PREFIX, memory_shapes, transformer_shapes
from training.rollout import Rollout, schedule

TEXT_LEN = 8
CONFIG = ModelConfig(
    TransformerConfig(dim=64, ffn_dim=96, freq_dim=32, num_heads=2, num_layers=3, text_dim=16, text_len=TEXT_LEN),
    latent_height=8,
    latent_width=12,
    window=WindowConfig(frames_per_block=3, sink_frames=3, local_frames=6, max_temporal_id=11),
    memory=MemoryConfig(frames=3, layers=2, normalize_k=True, rebuild_on_prompt_switch=False),
    sampler=SamplerConfig(timestep_shift=3.0),
)
BLOCKS = 9
SWITCHES = (2, 6)  # one whose recache reaches the first frame, one that does not


def random_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    memory = {f"{MEMORY_PREFIX}{name}": shape for name, shape in memory_shapes(CONFIG).items()}
    weights = {}
    for name, shape in (transformer_shapes(CONFIG.transformer) | memory).items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name.endswith("weight") and ("norm" in name or "connector_proj.3" in name):
            weights[name] = 1 + 0.1 * noise
        else:
            weights[name] = noise / math.sqrt(math.prod(shape[1:]) or 1) if name.endswith("weight") else 0.3 * noise
    return weights


@pytest.mark.parametrize("mode", ["evolve", "off"])
def test_it_is_the_rollout_with_two_prompt_switches(mode: str) -> None:
    generator = torch.Generator().manual_seed(1)
    weights = random_weights()
    naive, ours = NaiveRollout(CONFIG.to_flat(), weights, mode), Rollout(CONFIG, weights, memory=mode == "evolve")
    timesteps, sigmas = schedule(CONFIG)
    shape = (len(sigmas), CONFIG.window.frames_per_block, *CONFIG.latent_shape)
    for block in range(BLOCKS):
        if block in (0, *SWITCHES):
            prompt = torch.randn(5, CONFIG.transformer.text_dim, generator=generator, dtype=torch.float64)
            naive.set_prompt(prompt)
            ours.set_prompt(torch.nn.functional.pad(prompt, (0, 0, 0, TEXT_LEN - len(prompt)))[None])
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        expected = naive.next_block(lambda block, step, noise=noise: noise[step])
        ours.begin()
        x = noise[0][None]
        for step, (timestep, sigma) in enumerate(zip(timesteps, sigmas, strict=True)):
            clean = x - sigma * ours.flow(x, timestep, first_pass=step == 0)
            if step + 1 < len(sigmas):
                x = (1 - sigmas[step + 1]) * clean + sigmas[step + 1] * noise[step + 1]
        ours.keep(clean)
        torch.testing.assert_close(clean[0], expected, rtol=1e-10, atol=1e-10)


def test_the_memory_learns_from_later_blocks() -> None:
    weights = {name: tensor.requires_grad_() for name, tensor in random_weights().items()}
    rollout = Rollout(CONFIG, weights)
    rollout.set_prompt(torch.zeros(1, TEXT_LEN, CONFIG.transformer.text_dim, dtype=torch.float64))
    timesteps, _ = schedule(CONFIG)
    latents = torch.randn(1, CONFIG.window.frames_per_block, *CONFIG.latent_shape, dtype=torch.float64)
    for _ in range(5):
        rollout.begin()
        flow = rollout.flow(latents, timesteps[1], first_pass=False)
        rollout.keep(latents)
    flow.square().sum().backward()
    untouched = [name for name in weights if name.startswith(MEMORY_PREFIX) and weights[name].grad is None]
    assert untouched == [] and weights[f"{MEMORY_PREFIX}query_init"].grad.abs().max() > 0
