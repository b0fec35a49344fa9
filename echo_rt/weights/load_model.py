"""A model from disk: which tensors, and what config they and the caller's choices make together."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from echo_rt.config import MemoryConfig, ModelConfig, VaeConfig
from echo_rt.errors import ConfigError
from echo_rt.options import (
    CHECKPOINT,
    FOLDER_FACTS,
    RELEASED_SIZE,
    TINY_VAE,
    WAN_VAE,
    WORDS,
    MemoryMode,
    RuntimeOptions,
    check_overrides,
    is_path,
    latent_size,
    lora_files,
    lora_text,
)
from echo_rt.recipes import find_recipe, published_as
from echo_rt.utils.checked_json import convert
from echo_rt.utils.device import parse_device
from echo_rt.weights.choice import Taken, cautions, choose_recipe, ema_reason
from echo_rt.weights.files import open_tensors
from echo_rt.weights.folder import ModelFolder
from echo_rt.weights.generator import GeneratorTensors, check_memory, load_generator
from echo_rt.weights.lora import merge_lora
from echo_rt.weights.shapes import memory_config_of
from echo_rt.weights.tensors import FingerprintedTensors, ModelTensors, TensorFile
from echo_rt.weights.tiny_vae import TinyVae, open_tiny_vae

_MEMORY_FACTS = ("memory_frames", "memory_reads", "rebuild_on_prompt_switch")
_logger = logging.getLogger("echo_rt.recipe")


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model whose ``tensors`` are on the host or mapped.

    ``vae`` is the VAE whose latents these are; ``tiny_vae`` the decoder in place of the folder's own, which is then not
    looked at, None for that one. ``taken`` says by which recipe it runs and what it was made of.
    """

    folder: ModelFolder
    config: ModelConfig
    vae: VaeConfig
    mode: MemoryMode
    tensors: ModelTensors
    tiny_vae: TinyVae | None
    taken: Taken


def load_model(model: str | Path, options: RuntimeOptions, snapshot: Mapping[str, Any] | None = None) -> LoadedModel:
    """Open what :meth:`echo_rt.Runtime.from_pretrained` makes a runtime of; its errors are explained there.

    LoRAs are merged on the device of ``options``. ``snapshot``: how the one to go on with describes its model.
    """
    checkpoint, ema, vae = options.checkpoint, options.ema, options.vae
    if ema is not None and not isinstance(ema, bool):
        raise ConfigError(f"ema must be True, False or None, got {ema!r}")
    if checkpoint is not None and not is_path(checkpoint):
        raise ConfigError(f"checkpoint must be a path or None, got {checkpoint!r}")
    if not is_path(vae):
        raise ConfigError(f"vae must be {WAN_VAE!r}, {TINY_VAE!r} or a path, got {vae!r}")
    wanted = None if options.memory is None else MemoryMode.parse(options.memory)
    folder = ModelFolder.open(
        model,
        text_encoder=options.text_encoder,
        tokenizer=options.tokenizer,
        vae_file=options.vae_file,
        downloads=_downloads(options),
    )
    transformer_config = folder.transformer.config()
    defaults = check_overrides(folder.rollout_defaults(), f"{model}: echo_rt in config.json", FOLDER_FACTS)
    convert(defaults.get(WORDS, []), list[str], f"{folder.path}: {WORDS}: expected a list of words", ConfigError)
    overrides = check_overrides(options.overrides or {}, "overrides")
    opened = _checkpoint(folder, defaults) if checkpoint is None else open_tensors(checkpoint)
    if ema is not None and opened is None:
        raise ConfigError(f"ema says which weights of a checkpoint to take: expected a checkpoint beside ema={ema}")
    choice = choose_recipe(options.recipe, defaults, snapshot, opened, lora_files(options.lora), model)
    recipe = choice.recipe
    facts = {**choice.facts(defaults), **overrides}
    of_memory = {name.removeprefix("memory_"): facts[name] for name in _MEMORY_FACTS if name in facts}
    MemoryConfig(**of_memory)  # raises for a value that no memory has, also where there is none
    own_width, own_height = facts.get("width", RELEASED_SIZE[0]), facts.get("height", RELEASED_SIZE[1])
    width = own_width if options.width is None else options.width
    height = own_height if options.height is None else options.height
    vae_config = folder.vae.config() if vae == WAN_VAE else folder.latents_config()
    if vae_config.z_dim != transformer_config.in_channels:
        raise ConfigError(
            f"the VAE has {vae_config.z_dim} latent channels, the transformer {transformer_config.in_channels}"
        )
    latent_height, latent_width = latent_size(width, height, vae_config, transformer_config)
    tiny_vae = None if vae == WAN_VAE else open_tiny_vae(vae, folder.path, vae_config)

    memory_tensors: Mapping[str, Tensor] | None = None
    source = memory_source = str(model)
    generator: GeneratorTensors | None = None
    if opened is None:
        tensors = folder.transformer.tensors()
    else:
        generator = load_generator(opened, transformer_config, ema=ema, prefer_ema=recipe is None or recipe.ema)
        tensors, memory_tensors = generator.transformer, generator.memory
        source = memory_source = str(opened.path)
    merged = merge_lora(tensors, options.lora, alpha=options.lora_alpha, device=parse_device(options.device))
    if merged.loras:
        tensors, source = merged.transformer, f"{source} with {', '.join(lora_text(*lora) for lora in merged.loras)}"
    if merged.memory is not None:
        memory_tensors, memory_source = merged.memory, str(merged.memory_path)

    if wanted is None:
        choice.check_memory(memory_tensors is not None, memory_source)
    mode = wanted or (MemoryMode.OFF if memory_tensors is None else MemoryMode.EVOLVE)
    if mode is MemoryMode.OFF:
        memory_tensors = None
    elif memory_tensors is None:
        raise ConfigError(f"memory mode {mode.value!r} needs a memory encoder, and {memory_source} has none; use 'off'")
    size = {"latent_height": latent_height, "latent_width": latent_width}
    config = ModelConfig.from_flat({**facts, **vars(transformer_config), **size, "memory": None})
    if memory_tensors is not None:
        # Frames are not what the tokens would give: a memory of 3 small frames is not one of 2 larger ones.
        tokens, sizes = memory_config_of(memory_tensors, memory_source)
        # Of the two released recipes, the long one, whose keys are not normalized, rebuilds.
        of_memory = {"rebuild_on_prompt_switch": not sizes.normalize_k, **of_memory}
        config = replace(config, memory=replace(sizes, **of_memory))
        if (width, height) != (own_width, own_height) and config.memory_tokens != tokens:
            own_rows, own_columns = latent_size(own_width, own_height, vae_config, transformer_config)
            if replace(config, latent_height=own_rows, latent_width=own_columns).memory_tokens == tokens:
                raise ConfigError(
                    f"{model}: this model makes videos of {own_width}x{own_height} pixels, as its memory has a fixed "
                    f"number of tokens ({tokens}): expected that width and height, got {width}x{height}"
                )
        check_memory(memory_tensors, config, memory_source)
    taken = Taken(
        recipe=None if recipe is None else recipe.name,
        recipe_reason=choice.reason,
        ema=None if generator is None else generator.ema,
        ema_reason=ema_reason(ema, recipe, generator),
        model=str(model),
        checkpoint=None if checkpoint is None else str(checkpoint),
        loras=tuple((str(path), strength) for path, strength in merged.loras),
        cautions=cautions(recipe, opened, bool(merged.loras), config.memory, memory_is_asked=wanted is not None),
    )
    _logger.info("%s", taken.line)
    for note in () if recipe is None else recipe.notes:
        _logger.debug("recipe %s: %s", taken.recipe, note)
    for caution in taken.cautions:
        _logger.warning("%s", caution)
    if tiny_vae is None:
        decoder = FingerprintedTensors(folder.vae.tensors(), f"{folder.vae.source} (VAE)")
    else:
        decoder = FingerprintedTensors(tiny_vae.tensors, f"{tiny_vae.path} (tiny decoder)")
    transformer = FingerprintedTensors(tensors, f"{source} (transformer)")
    memory_encoder = FingerprintedTensors(memory_tensors or {}, f"{memory_source} (memory encoder)")
    return LoadedModel(
        folder, config, vae_config, mode, ModelTensors(transformer, memory_encoder, decoder), tiny_vae, taken
    )


def _checkpoint(folder: ModelFolder, facts: Mapping[str, Any]) -> TensorFile | None:
    """The checkpoint that a folder names as its own, a file beside its config; None where it names none."""
    name = facts.get(CHECKPOINT)
    if name is None:
        return None
    if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
        raise ConfigError(f"{folder.path}: {CHECKPOINT}: expected the name of a file in the folder, found {name!r}")
    return open_tensors(folder.path / name)


def _downloads(options: RuntimeOptions) -> list[str]:
    """Commands that fetch what is not there yet of the recipe that is named, or told by the names of given files."""
    checkpoint = [] if options.checkpoint is None else [options.checkpoint]
    given: dict[str, list[Any]] = {"lora": [path for path, _ in lora_files(options.lora)], "checkpoint": checkpoint}
    published = published_as(*given["lora"], *checkpoint)
    named = None if options.recipe is None else find_recipe(options.recipe)
    recipe = named or (published[0] if published else None)
    there = {role: bool(paths) and all(map(os.path.exists, paths)) for role, paths in given.items()}
    return list(dict.fromkeys(file.download for file in (recipe.files if recipe else ()) if not there[file.role]))
