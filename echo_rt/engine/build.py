"""From what was loaded, and what its user chose, to an engine that is ready to stream."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from echo_rt.attention import AttentionSelection, attentions, cache_file
from echo_rt.engine.decoding import Convolutions, DecoderOptions, make_decoder
from echo_rt.engine.engine import Engine
from echo_rt.engine.executor import make_executor
from echo_rt.engine.memory_budget import require_room
from echo_rt.engine.pipeline import Pipeline
from echo_rt.engine.prompts import PromptEncoder
from echo_rt.engine.rollout import Rollout
from echo_rt.engine.steady_state import SteadyCheck
from echo_rt.errors import ConfigError
from echo_rt.model.memory import MemoryEncoder
from echo_rt.model.sampler import Schedule
from echo_rt.model.transformer import Transformer
from echo_rt.ops.backends import Backend, choose_backend
from echo_rt.options import WAN_VAE, MemoryMode
from echo_rt.snapshot.fit import WEIGHTS
from echo_rt.snapshot.ways import ATTENTION, BACKEND, TEXT_ATTENTION, WAYS, Ways
from echo_rt.utils.device import FLOAT8, model_context, working_dtype
from echo_rt.weights.fingerprint import FingerprintedTensors
from echo_rt.weights.load_model import LoadedModel

_logger = logging.getLogger("echo_rt.runtime")


@dataclass(frozen=True)
class Options:
    """What a user chose of how a model runs, as :meth:`echo_rt.Runtime.from_pretrained` explains it.

    ``like``: the ways of the snapshot to go on with, by their labels.
    """

    device: torch.device
    dtype: torch.dtype
    decoding: DecoderOptions
    backend: str | None
    attention: str | None
    graphs: bool | None
    lookahead: int | None
    check: bool
    keep_text_encoder: bool
    float8_except: Sequence[str]
    like: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Assembly:
    """An engine, and what was chosen on the way to it: the decoder's name, libraries and kernels, and why these."""

    engine: Engine
    backend: Backend
    vae: str
    attention: AttentionSelection
    text_attention: AttentionSelection
    vae_attention: AttentionSelection | None
    convolutions: Convolutions


def assemble(loaded: LoadedModel, options: Options) -> Assembly:
    """Weights go to the device, buffers are made. Raises :class:`ConfigError` and :class:`BackendError`."""
    folder, config, tiny_vae = loaded.folder, loaded.config, loaded.tiny_vae
    device, dtype, working = options.device, options.dtype, working_dtype(options.dtype)
    vae_config = loaded.vae
    vae = WAN_VAE if tiny_vae is None else tiny_vae.kind.name
    backend = choose_backend(
        options.backend,
        device,
        memory=(working, config.transformer.head_dim) if loaded.mode is MemoryMode.EVOLVE else None,
        prescribed=options.like.get(BACKEND),
    )
    _logger.log(logging.WARNING if backend.fallback else logging.INFO, "backend %s: %s", backend.name, backend.reason)
    ops = backend.ops
    if vae_config.z_dim != config.transformer.in_channels:
        raise ConfigError(
            f"the VAE has {vae_config.z_dim} latent channels, the transformer {config.transformer.in_channels}"
        )
    executor = make_executor(device, options.graphs)
    lookahead = _check_lookahead(options.lookahead, device)
    require_room(
        config,
        vae_config,
        None if tiny_vae is None else tiny_vae.config,
        options.decoding,
        device=device,
        dtype=working,
        depth=1 + lookahead,
    )
    prescribed = (options.like.get(ATTENTION), options.like.get(TEXT_ATTENTION))
    attention, text_attention = attentions(
        config, device, working, ops, options.attention, cache=cache_file(), prescribed=prescribed
    )
    schedule = Schedule(config.sampler, device)
    transformer_weights, memory_weights, vae_weights = (
        FingerprintedTensors(part, f"{source} ({name})")
        for name, part, source in (
            ("transformer", loaded.transformer, loaded.transformer_source),
            ("memory encoder", loaded.memory or {}, loaded.memory_source),
            ("VAE", folder.vae_tensors(), str(folder.path))
            if tiny_vae is None
            else ("tiny decoder", tiny_vae.tensors, str(tiny_vae.path)),
        )
    )
    # float32 whatever the model's dtype: a LoRA is merged in it, and what comes out must not depend on the caller.
    with model_context(device, working, options.decoding.dtype, torch.float32):
        transformer = Transformer(
            config.transformer,
            transformer_weights,
            schedule.timesteps,
            ops,
            text_attention.attention,
            device=device,
            dtype=dtype,
            float8_except=options.float8_except,
        )
        encoder = None
        if config.memory is not None:
            encoder = MemoryEncoder(config, memory_weights, ops, device=device, dtype=working)
        decoder, vae_attention, convolutions = make_decoder(
            loaded,
            vae_weights,
            ops,
            options.decoding,
            device=device,
            attention_name=options.attention,
            prescribed=options.like,
        )
        rollout = Rollout(config, transformer, encoder, schedule, ops, attention.attention, loaded.mode, executor)
        pipeline = Pipeline(rollout, decoder, vae_config, ops, executor, device=device, depth=1 + lookahead)
    ways = Ways.chosen(backend, attention, text_attention, vae_attention, convolutions)
    # A snapshot goes on with the same model alone: all that its video depends on, beside seed and prompts.
    model = {
        **config.to_flat(),
        "memory_mode": loaded.mode.value,
        "vae": vae,
        "dtype": str(dtype),
        "vae_dtype": str(options.decoding.dtype),
        WAYS: dict(ways.names),
        WEIGHTS: [part.digest() for part in (transformer_weights, memory_weights, vae_weights)],
    }
    if dtype == FLOAT8:
        model["float8_except"] = sorted(transformer.kept_from_float8)
    engine = Engine(
        device=device,
        dtype=working,
        vae_dtype=options.decoding.dtype,
        rollout=rollout,
        pipeline=pipeline,
        executor=executor,
        vae=vae_config,
        model=model,
        ways=ways,
        prompts=PromptEncoder(folder, config.transformer, device, keep=options.keep_text_encoder),
        lookahead=lookahead,
        check=SteadyCheck(executor, device, pipeline.buffers) if options.check else None,
    )
    return Assembly(engine, backend, vae, attention, text_attention, vae_attention, convolutions)


def _check_lookahead(lookahead: int | None, device: torch.device) -> int:
    if lookahead is None:
        return 1 if device.type == "cuda" else 0  # on a CPU there is nothing to be busy beside
    if isinstance(lookahead, bool) or not isinstance(lookahead, int) or lookahead < 0:
        raise ConfigError(f"lookahead must be a number of blocks, 0 or more, got {lookahead!r}")
    return lookahead
