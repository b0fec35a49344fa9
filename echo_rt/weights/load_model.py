"""A model from disk: which tensors, and what config they and the caller's choices make together."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from echo_rt.config import MemoryConfig, ModelConfig, TransformerConfig, VaeConfig
from echo_rt.errors import ConfigError
from echo_rt.options import (
    FOLDER_FACTS,
    RELEASED_SIZE,
    TINY_VAE,
    WAN_VAE,
    MemoryMode,
    RuntimeOptions,
    check_overrides,
    latent_size,
)
from echo_rt.utils.device import parse_device
from echo_rt.weights.folder import ModelFolder
from echo_rt.weights.from_shapes import memory_facts
from echo_rt.weights.generator import check_memory, load_generator
from echo_rt.weights.lora import merge_lora
from echo_rt.weights.tiny_vae import TinyVae, open_tiny_vae


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """Tensors by their original names, on the host or mapped; ``memory`` is None where the mode needs none.

    ``vae`` is the VAE whose latents these are; ``tiny_vae`` the decoder in place of the folder's own, which is then not
    looked at, None for that one. ``transformer_source`` and ``memory_source`` say where tensors are from.
    """

    folder: ModelFolder
    config: ModelConfig
    vae: VaeConfig
    mode: MemoryMode
    transformer: Mapping[str, Tensor]
    memory: Mapping[str, Tensor] | None
    tiny_vae: TinyVae | None
    transformer_source: str
    memory_source: str


def load_model(model: str | Path, options: RuntimeOptions) -> LoadedModel:
    """Open what :meth:`echo_rt.Runtime.from_pretrained` makes a runtime of; its errors are explained there.

    A LoRA is merged on the device of ``options``.
    """
    checkpoint, lora, ema, vae = options.checkpoint, options.lora, options.ema, options.vae
    if ema is not None and not isinstance(ema, bool):
        raise ConfigError(f"ema must be True, False or None, got {ema!r}")
    for name, path in (("checkpoint", checkpoint), ("lora", lora)):
        if path is not None and not _is_path(path):
            raise ConfigError(f"{name} must be a path or None, got {path!r}")
    if ema is not None and checkpoint is None:
        raise ConfigError(f"ema says which weights of a checkpoint to take: expected a checkpoint beside ema={ema}")
    if not _is_path(vae):
        raise ConfigError(f"vae must be {WAN_VAE!r}, {TINY_VAE!r} or a path, got {vae!r}")
    wanted = None if options.memory is None else MemoryMode.parse(options.memory)
    folder = ModelFolder.open(
        model, text_encoder=options.text_encoder, tokenizer=options.tokenizer, vae_file=options.vae_file
    )
    transformer_config = folder.transformer_config()
    defaults = check_overrides(folder.rollout_defaults(), f"{model}: echo_rt in config.json", FOLDER_FACTS)
    facts = {**defaults, **check_overrides(options.overrides or {}, "overrides")}
    width = facts.get("width", RELEASED_SIZE[0]) if options.width is None else options.width
    height = facts.get("height", RELEASED_SIZE[1]) if options.height is None else options.height
    vae_config = folder.vae_config() if vae == WAN_VAE else folder.latents_config()
    if vae_config.z_dim != transformer_config.in_channels:
        raise ConfigError(
            f"the VAE has {vae_config.z_dim} latent channels, the transformer {transformer_config.in_channels}"
        )
    latent_height, latent_width = latent_size(width, height, vae_config, transformer_config)
    tiny_vae = None if vae == WAN_VAE else open_tiny_vae(vae, folder.path, vae_config)

    memory_tensors: Mapping[str, Tensor] | None = None
    source = memory_source = str(model)
    if checkpoint is None:
        tensors = folder.transformer_tensors()
    else:
        generator = load_generator(checkpoint, transformer_config, ema=ema)
        tensors, memory_tensors = generator.transformer, generator.memory
        source = memory_source = str(checkpoint)
    if lora is not None:
        merged = merge_lora(tensors, lora, device=parse_device(options.device))
        tensors, source = merged.transformer, f"{source} with {lora}"
        if merged.memory is not None:
            memory_tensors, memory_source = merged.memory, str(lora)

    mode = wanted or (MemoryMode.OFF if memory_tensors is None else MemoryMode.EVOLVE)
    if mode is MemoryMode.OFF:
        memory_tensors = None
    elif memory_tensors is None:
        raise ConfigError(f"memory mode {mode.value!r} needs a memory encoder, and {memory_source} has none; use 'off'")
    flat = {
        **facts,
        **_transformer_facts(transformer_config),
        "latent_height": latent_height,
        "latent_width": latent_width,
        "memory": None,
    }
    config = ModelConfig.from_flat(flat)
    if memory_tensors is not None:
        config = _with_memory(flat, config, memory_tensors, memory_source)
    return LoadedModel(
        folder=folder,
        config=config,
        vae=vae_config,
        mode=mode,
        transformer=tensors,
        memory=memory_tensors,
        tiny_vae=tiny_vae,
        transformer_source=source,
        memory_source=memory_source,
    )


def _is_path(value: object) -> bool:
    return isinstance(value, (str, os.PathLike)) and bool(os.fspath(value))  # an empty one is the folder one is in


def _transformer_facts(config: TransformerConfig) -> dict[str, Any]:
    """The transformer's own entries of a flat config; no override or default may change them."""
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def _with_memory(
    flat: Mapping[str, Any], without: ModelConfig, tensors: Mapping[str, Tensor], source: str
) -> ModelConfig:
    """The config with the memory that ``tensors`` hold, checked against the video's size."""
    facts = memory_facts(tensors, source)
    memory = MemoryConfig(
        # Not what the tokens would give: a memory of 3 small frames is not one of 2 larger ones.
        frames=flat.get("memory_frames", MemoryConfig.frames),
        layers=facts.layers,
        normalize_k=facts.normalize_k,
        # Of the two released recipes, the long one, whose keys are not normalized, rebuilds.
        rebuild_on_prompt_switch=flat.get("rebuild_on_prompt_switch", not facts.normalize_k),
        ffn_multiplier=facts.ffn_multiplier,
    )
    config = ModelConfig(
        transformer=without.transformer,
        latent_height=without.latent_height,
        latent_width=without.latent_width,
        window=without.window,
        memory=memory,
        sampler=without.sampler,
    )
    check_memory(tensors, config, source)
    return config
