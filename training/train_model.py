"""Train the transformer and its memory encoder together, on clips of one to three days, in stages.

The loss is that of flow matching at four of the sampler's noise levels. Each block is predicted once from noise, then
clean latents pass through the model, as in the runtime, and the next block sees what that pass left: keys and values of
the window and, through the memory encoder, of everything before. The memory learns from the loss of later blocks alone.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from echo_rt.config import MemoryConfig, ModelConfig, SamplerConfig, TransformerConfig, WindowConfig
from echo_rt.weights.shapes import MEMORY_PREFIX, Shapes, memory_shapes, transformer_shapes
from training.checkpoint import load, save
from training.latents import DAY_LATENTS, PATCH, World
from training.optimizer import MuonAndAdam
from training.prompts import CONFIG as TEXT
from training.prompts import TEXT_LEN, embed
from training.rollout import Rollout, Rotary, schedule
from training.world import HEIGHT, WIDTH, Scene

CONFIG = ModelConfig(
    TransformerConfig(
        dim=160, ffn_dim=480, freq_dim=64, num_heads=5, num_layers=5, text_dim=TEXT.d_model, text_len=TEXT_LEN
    ),
    HEIGHT // PATCH,
    WIDTH // PATCH,
    WindowConfig(frames_per_block=3, sink_frames=3, local_frames=6, max_temporal_id=11),
    MemoryConfig(frames=3, layers=2, normalize_k=True, rebuild_on_prompt_switch=False),
    SamplerConfig(
        denoising_steps=(1000, 750, 625, 500, 375, 250),
        timestep_shift=3.0,
        first_block_steps=(1000, 750, 625, 500, 437, 375, 312, 250),
    ),
)
TRAINED_STEPS = (1000, 750, 500, 250)  # the noise levels of training: steps between them need none


def with_steps(config: ModelConfig, denoising_steps: tuple[int, ...]) -> ModelConfig:
    """Return ``config`` with these denoising steps for all blocks but the first."""
    return replace(config, sampler=replace(config.sampler, denoising_steps=denoising_steps))


@dataclass(frozen=True)
class Stage:
    """Clips of ``blocks`` blocks, ``clips`` at once, ``steps`` times.

    ``own``: share of clean blocks that are the model's own prediction instead of the world's; ``rate``: of learning.
    ``kept``: the model is the mean of the average at the end of this stage and that at the end of all.
    """

    name: str
    blocks: int
    clips: int
    steps: int
    own: float = 0.0
    rate: float = 1.0
    kept: bool = False


STAGES = (
    Stage("layout", blocks=3, clips=12, steps=240),
    Stage("recall", blocks=7, clips=6, steps=700),
    Stage("own context", blocks=7, clips=6, steps=1300, own=0.4, rate=0.7),
    Stage("days", blocks=11, clips=4, steps=500, own=0.5, rate=0.3),
    Stage("finish", blocks=7, clips=7, steps=600, own=0.5, rate=0.5, kept=True),
    # Many prompts teach what the words mean on their own, for combinations that are never shown.
    Stage("prompts", blocks=2, clips=20, steps=300, rate=0.6),
    Stage("again", blocks=7, clips=7, steps=150, own=0.5, rate=0.5),
    Stage("days again", blocks=11, clips=4, steps=220, own=0.5),  # without it the lane is lost after 20 days
)
_FORGET = 0.15  # share of clips without memory, so that the model works with it off
_SWITCH = 0.3  # share of clips with a prompt switch
_CONTEXT_NOISE = 0.15
_EMA = 0.995
_RARE, _RARE_WEIGHT = 0.1, 4.0  # what differs from the average scene of a place weighs more
_NOT_MUON = ("patch_embedding.weight", "head.head.weight", "text_embedding.0.weight", f"{MEMORY_PREFIX}query_init")


def train(
    world: World,
    folder: Path,
    *,
    config: ModelConfig = CONFIG,
    stages: tuple[Stage, ...] = STAGES,
    seed: int = 0,
    calm: float = 0.0,
) -> dict[str, Tensor]:
    """Train through ``stages``, going on from ``folder/model.pt``; return the averaged weights (EMA, see ``kept``).

    ``calm``: share of days on which the balloon stays down.
    """
    path = folder / "model.pt"
    weights = {name: tensor.requires_grad_() for name, tensor in initial_weights(config, seed).items()}
    average = {name: tensor.detach().clone() for name, tensor in weights.items()}
    optimizer = MuonAndAdam(weights, muon_rate=0.02, adam_rate=1.5e-3, adam=_modulations(weights))
    done = load(path, weights, optimizer, average=average)
    clips = Clips(world, folder, config, calm)
    ends = accumulate(stage.steps for stage in stages)
    kept = {end: folder / f"average-{end}.pt" for stage, end in zip(stages, ends, strict=True) if stage.kept}
    began, last_save, total = time.monotonic(), time.monotonic(), sum(stage.steps for stage in stages)
    losses: list[float] = []
    for step in range(done, total):
        stage = _stage_at(stages, step)
        loss = clips.loss(weights, stage, random.Random(f"model {seed} {step}"))
        loss.backward()
        norm = optimizer.step(stage.rate * _rate(step, total))
        with torch.no_grad():
            for name, tensor in average.items():
                tensor.lerp_(weights[name], 1 - _EMA)
        if step + 1 in kept:
            torch.save(average, kept[step + 1])
        losses.append(float(loss.detach()))
        if (step + 1) % 20 == 0 or step + 1 == total:
            mean = sum(losses) / len(losses)
            elapsed = time.monotonic() - began
            print(f"{stage.name} {step + 1}/{total}  loss {mean:.4f}  norm {norm:.2f}  {elapsed:.0f} s", flush=True)
            losses.clear()
            if not math.isfinite(mean):
                raise FloatingPointError(f"step {step + 1}: expected a finite loss, found {mean}")
        if time.monotonic() - last_save > 60 or step + 1 == total:
            save(path, weights, optimizer, step + 1, average=average)
            last_save = time.monotonic()
    averages = [average, *(torch.load(path, weights_only=True) for path in kept.values())]
    return {name: torch.stack([each[name] for each in averages]).mean(0) for name in average}


def _stage_at(stages: tuple[Stage, ...], step: int) -> Stage:
    for stage in stages:
        if step < stage.steps:
            return stage
        step -= stage.steps
    raise ValueError("expected a step of one of the stages")


def _rate(step: int, total: int) -> float:
    """Warm up over the first steps, go down to nothing over the last fifth."""
    return min(1.0, (step + 1) / 50) * min(1.0, max(0.02, (total - step) / (0.2 * total)))


def _modulations(weights: Mapping[str, Tensor]) -> list[str]:
    return [name for name in weights if name.endswith("modulation") or name in _NOT_MUON]


class Clips:
    """Random clips of the world and the loss of a model on them."""

    def __init__(self, world: World, folder: Path, config: ModelConfig = CONFIG, calm: float = 0.0) -> None:
        self._world, self._config, self._calm = world, config, calm
        prompts = sorted({scene.prompt for scene in world.scenes})
        self._embeds = embed(prompts, folder / "tokenizer")
        self._prompt_row = {prompt: row for row, prompt in enumerate(prompts)}
        self._training = [index for index, scene in enumerate(world.scenes) if not scene.is_held_out]
        self._index = {scene: index for index, scene in enumerate(world.scenes)}
        self._weights = _rarity(world)
        self._timesteps, self._sigmas = schedule(with_steps(config, TRAINED_STEPS))
        self._rotary = Rotary(config)

    def embeds(self, scenes: list[Scene]) -> Tensor:
        """Embeddings of the scenes' prompts, ``[N, text_len, text_dim]``."""
        return self._embeds[[self._prompt_row[scene.prompt] for scene in scenes]]

    def loss(self, weights: Mapping[str, Tensor], stage: Stage, chance: random.Random) -> Tensor:
        """Mean flow-matching loss of one batch of clips."""
        scenes = [self._world.scenes[chance.choice(self._training)] for _ in range(stage.clips)]
        switch_at = chance.randrange(1, stage.blocks) if chance.random() < _SWITCH else None
        rollout = Rollout(self._config, weights, memory=chance.random() >= _FORGET, rotary=self._rotary)
        rollout.set_prompt(self.embeds(scenes))
        size = self._config.window.frames_per_block
        days = range(1 + stage.blocks * size // DAY_LATENTS)
        calm = [{day for day in days if self._calm and chance.random() < self._calm} for _ in scenes]
        total = torch.zeros(())
        for block in range(stage.blocks):
            if block == switch_at:
                scenes = [self._switched(scene, chance) for scene in scenes]
                rollout.set_prompt(self.embeds(scenes))
            rows = [self._index[scene] for scene in scenes]
            clips = zip(rows, calm, strict=True)
            clean = torch.stack([self._world.clip(row, block * size, size, days) for row, days in clips])
            rare = torch.stack([self._world.of(self._weights, row, block * size, size) for row in rows])
            step = chance.randrange(len(self._sigmas))
            sigma = self._sigmas[step]
            noise = torch.randn(clean.shape)
            noisy = (1 - sigma) * clean + sigma * noise
            rollout.begin()
            flow = rollout.flow(noisy, self._timesteps[step], first_pass=step == 0)
            total = total + (rare * (flow - (noise - clean)).square()).sum() / (rare.sum() * clean.shape[2])
            rollout.keep(self._context(clean, noisy - sigma * flow.detach(), sigma, stage, chance))
        return total / stage.blocks

    def _context(self, clean: Tensor, predicted: Tensor, sigma: float, stage: Stage, chance: random.Random) -> Tensor:
        """What later blocks see of this one: the truth with a little noise, or the model's own prediction."""
        kept = clean + _CONTEXT_NOISE * chance.random() * torch.randn(clean.shape)
        if sigma >= self._sigmas[1]:  # a prediction from almost nothing but noise is never kept by the runtime
            return kept
        own = torch.tensor([chance.random() < stage.own * 2 for _ in range(len(clean))])
        return torch.where(own.view(-1, 1, 1, 1, 1), predicted, kept)

    def _switched(self, scene: Scene, chance: random.Random) -> Scene:
        while True:
            other = scene.switched(self._world.scenes[chance.choice(self._training)])
            if not other.is_held_out:
                return other


def _rarity(world: World) -> Tensor:
    """Weight of each latent pixel, ``[scenes, 1 + DAY_LATENTS, 1, h, w]``."""
    weights = torch.empty(len(world.scenes), 1 + DAY_LATENTS, 1, *world.table.shape[3:])
    for place in {scene.place for scene in world.scenes}:
        rows = [index for index, scene in enumerate(world.scenes) if scene.place == place]
        latents = world.table[rows]
        distance = (latents - latents.mean(0)).square().mean(2, keepdim=True)
        weights[rows] = 1 + (_RARE_WEIGHT - 1) * (distance > _RARE).float()
    return weights


def initial_weights(config: ModelConfig = CONFIG, seed: int = 0) -> dict[str, Tensor]:
    """Draw the weights: latents pass through, and two heads look at the same place in the frames before."""
    generator = torch.Generator().manual_seed(seed)
    transformer = config.transformer
    memory: Shapes = {}
    if config.memory is not None:
        memory = {f"{MEMORY_PREFIX}{name}": shape for name, shape in memory_shapes(config).items()}
    weights: dict[str, Tensor] = {}
    for name, shape in (transformer_shapes(transformer) | memory).items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith(".bias"):
            weights[name] = torch.zeros(shape)
        elif "norm" in name or name.endswith("connector_proj.3.weight"):
            weights[name] = torch.ones(shape)
        elif name.endswith("modulation"):
            weights[name] = 0.02 * noise
        elif name.endswith("query_init"):
            weights[name] = 0.3 * noise
        else:
            weights[name] = noise / math.sqrt(math.prod(shape[1:]))
    patch = transformer.in_channels * transformer.patch_area
    basis = torch.linalg.qr(torch.randn(transformer.dim, patch, generator=generator)).Q * math.sqrt(
        transformer.dim / patch
    )
    weights["patch_embedding.weight"] = basis.reshape(weights["patch_embedding.weight"].shape).clone()
    flow = basis.T * (patch / transformer.dim)
    # The patch embedding's channels come first, the head's last.
    weights["head.head.weight"] = flow.unflatten(0, (transformer.in_channels, -1)).transpose(0, 1).flatten(0, 1).clone()
    weights["time_projection.1.weight"] *= 0.1
    if config.memory is not None:
        weights[f"{MEMORY_PREFIX}gate_linear.bias"] += 0.5
    for layer in range(transformer.num_layers):
        block = f"blocks.{layer}"
        weights[f"{block}.modulation"][:, 2] += 1.0
        weights[f"{block}.modulation"][:, 5] += 1.0
        for writer in ("self_attn.o", "cross_attn.o", "ffn.2"):
            weights[f"{block}.{writer}.weight"] *= 0.3
        for head, back in enumerate((float(config.window.frames_per_block), 1.0)):
            _look_back(weights, transformer, f"{block}.self_attn", head, back)
    return weights


def _look_back(weights: dict[str, Tensor], transformer: TransformerConfig, name: str, head: int, frames: float) -> None:
    """Have ``head`` prefer the same place ``frames`` earlier: rotary embedding turns two constants into a distance."""
    rows = slice(head * transformer.head_dim, (head + 1) * transformer.head_dim)
    angles = []
    for channels, distance in zip(transformer.rope_dims, (frames, 0.0, 0.0), strict=True):
        exponents = torch.arange(0, channels, 2) / channels
        angles.append(distance * transformer.rope_theta**-exponents)
    turn = torch.cat(angles)
    for part, angle in (("q", torch.zeros_like(turn)), ("k", turn)):
        weights[f"{name}.{part}.weight"][rows] *= 0.3
        weights[f"{name}.{part}.bias"][rows] = torch.stack((angle.cos(), angle.sin()), -1).flatten()
        weights[f"{name}.norm_{part}.weight"][rows] *= 1.4
