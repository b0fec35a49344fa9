"""Write the trained parts as a model folder in Wan's original layout, in 16 bits."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from echo_rt.config import ModelConfig
from echo_rt.options import CHECKPOINT, WORDS
from echo_rt.weights.folder import TEXT_ENCODER_FILE, TOKENIZER_FOLDER, TRANSFORMER_CONFIG, VAE_FILE
from echo_rt.weights.tiny_model import CHECKPOINT_FILE, save_pickle, wan_config
from training import prompts, vae
from training.tokenizer import write_tokenizer

_LITTLE = -30.0  # log-variance: the encoder is certain


def write_model(
    folder: Path,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    decoder: Mapping[str, Tensor],
    encoder: Mapping[str, Tensor],
    size: tuple[int, int],
) -> None:
    """Write generator, VAE, text encoder and tokenizer; ``size`` is the video's width and height in pixels."""
    (folder / TOKENIZER_FOLDER).mkdir(parents=True, exist_ok=True)
    facts = {"width": size[0], "height": size[1], **dataclasses.asdict(config.window)}
    sampler = config.sampler
    facts |= {"timestep_shift": sampler.timestep_shift, CHECKPOINT: CHECKPOINT_FILE}
    facts |= {"denoising_steps": sampler.denoising_steps, "first_block_steps": sampler.first_block_steps}
    facts[WORDS] = sorted({word for prompt in prompts.all_prompts() for word in prompt.split()})
    if config.memory is not None:
        facts["rebuild_on_prompt_switch"] = config.memory.rebuild_on_prompt_switch
    text = json.dumps(wan_config(config.transformer, facts), indent=2)
    (folder / TRANSFORMER_CONFIG).write_text(f"{text}\n")
    generator = {f"model.{name}": tensor for name, tensor in _half(weights).items()}
    save_pickle(folder / CHECKPOINT_FILE, {"generator": generator})
    save_pickle(folder / VAE_FILE, _half({**decoder, **encoder, **_statistics()}))
    save_pickle(folder / TEXT_ENCODER_FILE, prompts.encoder_weights())
    write_tokenizer(folder / TOKENIZER_FOLDER, prompts.CONFIG.vocab_size, prompts.TEXT_LEN)


def _half(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to(torch.float16).contiguous() for name, tensor in tensors.items()}


def _statistics() -> dict[str, Tensor]:
    """The 1x1x1 convolutions between the latents and the VAE: they undo Wan's mean and spread."""
    config = vae.CONFIG
    mean, spread = torch.tensor(config.latents_mean), torch.tensor(config.latents_std)
    point = (..., None, None, None)
    widen = torch.zeros(2 * config.z_dim, 2 * config.z_dim)
    widen[: config.z_dim, : config.z_dim] = spread.diag()
    return {
        "conv1.weight": widen[point],
        "conv1.bias": torch.cat((mean, torch.full_like(mean, _LITTLE))),
        "conv2.weight": (1 / spread).diag()[point],
        "conv2.bias": -mean / spread,
    }


def describe(folder: Path) -> dict[str, Any]:
    """Return the size in bytes of each file of a model folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
