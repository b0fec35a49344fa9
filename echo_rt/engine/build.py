"""From configs, tensors and what a user chose to an engine: the one place where a model is put together."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from echo_rt.attention import AttentionSelection, attentions, cache_file
from echo_rt.config import ModelConfig, VaeConfig
from echo_rt.engine.decoding import Convolutions, fit_decoder
from echo_rt.engine.engine import Engine
from echo_rt.engine.executor import Executor, make_executor
from echo_rt.engine.initial_video import InitialVideoEncoder
from echo_rt.engine.memory_budget import require_room
from echo_rt.engine.pipeline import Pipeline
from echo_rt.engine.prompts import PromptEncoder
from echo_rt.engine.rollout import Rollout
from echo_rt.engine.steady_state import SteadyCheck
from echo_rt.errors import ConfigError
from echo_rt.model.decoder_protocol import VideoDecoder
from echo_rt.model.memory import MemoryEncoder
from echo_rt.model.sampler import Schedule
from echo_rt.model.tiny_decoder import TinyDecoder
from echo_rt.model.transformer import Transformer
from echo_rt.model.vae_decoder import VaeDecoder
from echo_rt.ops.backends import Backend, choose_backend
from echo_rt.options import WAN_VAE, MemoryMode, RuntimeOptions
from echo_rt.snapshot.fit import WEIGHTS
from echo_rt.snapshot.ways import ATTENTION, BACKEND, TEXT_ATTENTION, WAYS, Ways
from echo_rt.utils.device import FLOAT8, model_context, parse_device, parse_dtype, parse_vae_dtype, working_dtype
from echo_rt.weights.choice import TAKEN
from echo_rt.weights.fingerprint import FingerprintedTensors
from echo_rt.weights.folder import ModelFolder
from echo_rt.weights.load_model import LoadedModel
from echo_rt.weights.tiny_vae import TinyVae

_logger = logging.getLogger("echo_rt.runtime")


def _nothing() -> FingerprintedTensors:
    return FingerprintedTensors({}, "")


@dataclass(frozen=True, eq=False)
class ModelTensors:
    """Tensors by their original names; ``memory`` and ``vae`` are empty where the model has no such part."""

    transformer: FingerprintedTensors
    memory: FingerprintedTensors = field(default_factory=_nothing)
    vae: FingerprintedTensors = field(default_factory=_nothing)


class Networks:
    """A model's networks on the device: each is made when it is first asked for, and engines may share them.

    They are to be asked for in a :func:`model_context`, as :func:`build_engine` does. ``vae`` is the VAE whose latents
    these are, ``tiny`` the decoder in its place; without either there is no decoder. ``attention``: the choices for the
    cache and for the text, made here where it is None. ``prescribed``: the ways of the snapshot to go on with, by their
    labels.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: ModelTensors,
        options: RuntimeOptions,
        backend: Backend,
        *,
        vae: VaeConfig | None = None,
        tiny: TinyVae | None = None,
        attention: tuple[AttentionSelection, AttentionSelection] | None = None,
        prescribed: Mapping[str, str] | None = None,
    ) -> None:
        self.config, self.tensors, self.options, self.backend, self.ops = config, tensors, options, backend, backend.ops
        self.vae, self.tiny, self._given_attention, self._prescribed = vae, tiny, attention, prescribed or {}
        self.device = parse_device(options.device)
        self.model_dtype = parse_dtype(options.dtype, self.device)
        self.dtype = working_dtype(self.model_dtype)  # what all is in that is not a float8 product
        self.vae_dtype = parse_vae_dtype(options.vae_dtype, self.model_dtype)

    @cached_property
    def attention(self) -> tuple[AttentionSelection, AttentionSelection]:
        """Which libraries compute attention over the cache and over the text, and why."""
        prescribed = (self._prescribed.get(ATTENTION), self._prescribed.get(TEXT_ATTENTION))
        return self._given_attention or attentions(
            self.config,
            self.device,
            self.dtype,
            self.ops,
            self.options.attention,
            cache=cache_file(),
            prescribed=prescribed,
        )

    @cached_property
    def schedule(self) -> Schedule:
        return Schedule(self.config.sampler, self.device)

    @cached_property
    def transformer(self) -> Transformer:
        return Transformer(
            self.config.transformer,
            self.tensors.transformer,
            self.schedule.timesteps,
            self.ops,
            self.attention[1].attention,
            device=self.device,
            dtype=self.model_dtype,
            float8_except=self.options.float8_except,
        )

    @cached_property
    def memory(self) -> MemoryEncoder:
        return MemoryEncoder(self.config, self.tensors.memory, self.ops, device=self.device, dtype=self.dtype)

    def load(self, config: ModelConfig) -> None:
        """Make all that an engine of ``config`` computes with, which is to be there before its buffers."""
        _ = self.transformer, self.memory if config.memory is not None else None, self.decoder

    @property
    def decoder(self) -> VideoDecoder[Any]:
        return self._decoding[0]

    @property
    def vae_attention(self) -> AttentionSelection | None:
        """How the decoder computes attention, and why; a tiny one has none."""
        return self._decoding[1]

    @property
    def convolutions(self) -> Convolutions:
        """How the decoder computes its convolutions, and why; a tiny one has no choice."""
        return self._decoding[2]

    @property
    def vae_name(self) -> str:
        """``"wan"``, or the kind of the tiny decoder."""
        return WAN_VAE if self.tiny is None else self.tiny.kind.name

    @cached_property
    def _decoding(self) -> tuple[VideoDecoder[Any], AttentionSelection | None, Convolutions]:
        assert self.vae is not None
        tensors, options, device, dtype = self.tensors.vae, self.options, self.device, self.vae_dtype
        if self.tiny is None:
            decoder = VaeDecoder(self.vae, tensors, self.ops, device=device, dtype=dtype, tiles=options.vae_tiles)
            block = (self.config.window.frames_per_block, self.config.latent_height, self.config.latent_width)
            named = (options.convolution, options.attention)
            return decoder, *fit_decoder(decoder, block, self.ops, *named, self._prescribed)
        if options.vae_tiles != 1:
            raise ConfigError(
                f"vae_tiles must be 1 for a tiny decoder, which needs little memory; got {options.vae_tiles}"
            )
        if options.convolution is not None:
            raise ConfigError(
                f"convolution must be left out for a tiny decoder, which has one way; got {options.convolution!r}"
            )
        return TinyDecoder(self.tiny.config, tensors, self.vae, device=device, dtype=dtype), None, {}


def open_networks(loaded: LoadedModel, options: RuntimeOptions, prescribed: Mapping[str, str]) -> Networks:
    """The networks of a loaded model, on the backend chosen for it; raises :class:`BackendError`."""
    device = parse_device(options.device)
    working = working_dtype(parse_dtype(options.dtype, device))
    backend = choose_backend(
        options.backend,
        device,
        memory=(working, loaded.config.transformer.head_dim) if loaded.mode is MemoryMode.EVOLVE else None,
        prescribed=prescribed.get(BACKEND),
    )
    _logger.log(logging.WARNING if backend.fallback else logging.INFO, "backend %s: %s", backend.name, backend.reason)
    folder, tiny = loaded.folder, loaded.tiny_vae
    decoder = (
        (folder.vae_tensors(), f"{folder.vae_source} (VAE)")
        if tiny is None
        else (tiny.tensors, f"{tiny.path} (tiny decoder)")
    )
    tensors = ModelTensors(
        transformer=FingerprintedTensors(loaded.transformer, f"{loaded.transformer_source} (transformer)"),
        memory=FingerprintedTensors(loaded.memory or {}, f"{loaded.memory_source} (memory encoder)"),
        vae=FingerprintedTensors(*decoder),
    )
    return Networks(loaded.config, tensors, options, backend, vae=loaded.vae, tiny=tiny, prescribed=prescribed)


def build_rollout(config: ModelConfig, networks: Networks, mode: MemoryMode, executor: Executor) -> Rollout:
    """A rollout of ``networks``, whose config ``config`` is, or the same without its memory."""
    memory = None if config.memory is None else networks.memory
    attention = networks.attention[0].attention
    return Rollout(config, networks.transformer, memory, networks.schedule, networks.ops, attention, mode, executor)


def build_engine(
    config: ModelConfig,
    networks: Networks,
    options: RuntimeOptions,
    mode: MemoryMode,
    *,
    executor: Executor | None = None,
    folder: ModelFolder | None = None,
    taken: Mapping[str, Any] | None = None,
) -> Engine:
    """An engine ready to stream: networks on the device, buffers made.

    Args:
        config: that of ``networks``, or the same without its memory.
        options: ``graphs``, ``lookahead``, ``check`` and ``keep_text_encoder`` are this engine's own.
        executor: in place of the device's usual one.
        folder: where the text encoder is; without it the engine takes embeddings alone.
        taken: what the model was made of, in plain JSON types, as its snapshots have it.

    Raises:
        ConfigError, BackendError: for what the model cannot have, or the machine no memory for.
    """
    vae, tiny, device = networks.vae, networks.tiny, networks.device
    assert vae is not None
    executor = executor or make_executor(device, options.graphs)
    lookahead = options.lookahead
    if lookahead is None:
        lookahead = 1 if device.type == "cuda" else 0  # on a CPU there is nothing to be busy beside
    depth = 1 + lookahead
    require_room(
        config,
        vae,
        None if tiny is None else tiny.config,
        device=device,
        dtype=networks.dtype,
        vae_dtype=networks.vae_dtype,
        vae_tiles=networks.options.vae_tiles,
        depth=depth,
    )
    attention = networks.attention  # a trial of it takes memory that the weights will need
    # float32 whatever the model's dtype: a LoRA is merged in it, and what comes out must not depend on the caller.
    with model_context(device, networks.dtype, networks.vae_dtype, torch.float32):
        networks.load(config)
        rollout = build_rollout(config, networks, mode, executor)
        pipeline = Pipeline(rollout, networks.decoder, vae, networks.ops, executor, device=device, depth=depth)
    ways = Ways.chosen(networks.backend, *attention, networks.vae_attention, networks.convolutions)
    tensors = networks.tensors
    # A snapshot goes on with the same model alone: all that its video depends on, beside seed and prompts.
    model = {
        **config.to_flat(),
        "memory_mode": mode.value,
        "vae": networks.vae_name,
        "dtype": str(networks.model_dtype),
        "vae_dtype": str(networks.vae_dtype),
        WAYS: dict(ways.names),
        WEIGHTS: [part.digest() for part in (tensors.transformer, tensors.memory, tensors.vae)],
    }
    if taken is not None:
        model[TAKEN] = dict(taken)
    if networks.model_dtype == FLOAT8:
        model["float8_except"] = sorted(networks.transformer.kept_from_float8)
    return Engine(
        device=device,
        dtype=networks.dtype,
        vae_dtype=networks.vae_dtype,
        rollout=rollout,
        pipeline=pipeline,
        executor=executor,
        vae=vae,
        model=model,
        ways=ways,
        prompts=PromptEncoder(
            folder, config.transformer, device, keep=options.keep_text_encoder, dtype=networks.model_dtype
        ),
        initial_video=InitialVideoEncoder(folder, config, vae, device, networks.vae_dtype),
        lookahead=lookahead,
        check=SteadyCheck(executor, device, pipeline.buffers) if options.check else None,
    )
