"""Builds an engine from configs, tensors and options: the one place where a model is put together."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch

from echo_rt.attention import AttentionSelection, attention_tuner, attentions
from echo_rt.attention import cache_file as attention_cache
from echo_rt.attention import implementations as attention_candidates
from echo_rt.config import ModelConfig, VaeConfig
from echo_rt.convolution import ConvolutionSelection, ConvolutionShape, select_convolutions
from echo_rt.convolution import cache_file as convolution_cache
from echo_rt.convolution import implementations as convolution_candidates
from echo_rt.engine.engine import Engine
from echo_rt.engine.executor import Executor, SteadyCheck, make_executor
from echo_rt.engine.initial_video import InitialVideoEncoder
from echo_rt.engine.memory_budget import require_capacity
from echo_rt.engine.pipeline import Pipeline
from echo_rt.engine.prompts import PromptEncoder
from echo_rt.engine.rollout import Rollout
from echo_rt.errors import BackendError, ConfigError
from echo_rt.model.decoder_protocol import VideoDecoder
from echo_rt.model.memory import MemoryEncoder
from echo_rt.model.sampler import Schedule
from echo_rt.model.tiny_decoder import TinyDecoder
from echo_rt.model.transformer import Transformer
from echo_rt.model.vae_decoder import VaeDecoder
from echo_rt.ops.backends import Backend, choose_backend
from echo_rt.ops.schema import Ops
from echo_rt.options import WAN_VAE, MemoryMode, RuntimeOptions
from echo_rt.snapshot.fit import (
    ATTENTION,
    BACKEND,
    IMPLEMENTATIONS,
    TEXT_ATTENTION,
    VAE_ATTENTION,
    WEIGHTS,
    Chosen,
)
from echo_rt.utils.device import FLOAT8, model_context, parse_device, parse_dtype, parse_vae_dtype, working_dtype
from echo_rt.weights.choice import TAKEN
from echo_rt.weights.fingerprint import FingerprintedTensors
from echo_rt.weights.folder import ModelFolder
from echo_rt.weights.load_model import LoadedModel
from echo_rt.weights.tiny_vae import TinyVae

_logger = logging.getLogger("echo_rt.runtime")


Convolutions = Mapping[ConvolutionShape, ConvolutionSelection]
"""The implementation of each of a decoder's convolutions, and why; a tiny decoder has no choice."""


def fit_decoder(
    decoder: VaeDecoder,
    block: tuple[int, int, int],
    ops: Ops,
    convolution_name: str | None = None,
    attention_name: str | None = None,
    prescribed: Mapping[str, str] = MappingProxyType({}),
) -> tuple[AttentionSelection, Convolutions]:
    """Select the implementations of ``decoder``'s attention and convolutions, set them, and return the selections.

    ``block``: latents of one call, their height and width. ``attention_name`` is the one asked for, taken where it can
    compute the decoder's; ``prescribed``: those of the snapshot to continue, by label. The errors are those of
    :meth:`echo_rt.autotune.tuner.Tuner.select` and :func:`echo_rt.convolution.select_convolutions`.
    """
    latents, height, width = block
    device, dtype = decoder.device, decoder.dtype
    # Forgiven: an attention asked for by name is the transformer's, and need not support the decoder's larger heads.
    tuner = attention_tuner(device, dtype, decoder.attention_shapes(height, width), attention_candidates(ops))
    attended = tuner.select(
        attention_name, prescribed.get(VAE_ATTENTION), cache=attention_cache(), forgive=(BackendError,)
    )
    decoder.attend_by(attended.attention)
    shapes = decoder.convolution_shapes(height, width, latents)
    convolved = select_convolutions(
        convolution_name,
        shapes.values(),
        device=device,
        dtype=dtype,
        cache=convolution_cache(),
        candidates=convolution_candidates(ops),
        prescribed={s: prescribed[label] for s in shapes.values() if (label := _label(s)) in prescribed},
    )
    decoder.use({name: convolved[shape].kind for name, shape in shapes.items()})
    return attended, convolved


def _label(shape: ConvolutionShape) -> str:
    """Label of all convolutions of a shape, which depends on the number of the decoder's tiles."""
    return f"convolution of {shape}"


def convolutions_in_words(convolutions: Convolutions) -> str:
    """Count the shapes of each implementation, in words."""
    counts = Counter(choice.kind.name for choice in convolutions.values())
    return ", ".join(f"{name} for {count}" for name, count in counts.most_common()) + f" of {counts.total()} shapes"


@dataclass(frozen=True, eq=False)
class ModelTensors:
    """Tensors by their original names; ``memory`` and ``vae`` are empty where the model has no such part."""

    transformer: FingerprintedTensors
    memory: FingerprintedTensors = field(default_factory=lambda: FingerprintedTensors({}, ""))
    vae: FingerprintedTensors = field(default_factory=lambda: FingerprintedTensors({}, ""))


class Networks:
    """A model's networks on the device, each made at first use; engines may share them.

    Use them in a :func:`model_context`, as :func:`build_engine` does. ``vae``: the VAE of the model's latents;
    ``tiny``: the decoder in its place; without either there is no decoder. ``attention``: the selections for the cache
    and for the text, None to make them here. ``prescribed``: the implementations of the snapshot to continue, by label.
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
        self.dtype = working_dtype(self.model_dtype)  # of everything but float8 matmuls
        self.vae_dtype = parse_vae_dtype(options.vae_dtype, self.model_dtype)

    @cached_property
    def attention(self) -> tuple[AttentionSelection, AttentionSelection]:
        """The implementations of attention over the cache and over the text, and why."""
        if self._given_attention is not None:
            return self._given_attention
        return attentions(
            self.config,
            self.device,
            self.dtype,
            self.ops,
            self.options.attention,
            cache=attention_cache(),
            prescribed=(self._prescribed.get(ATTENTION), self._prescribed.get(TEXT_ATTENTION)),
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
        """Make every network of an engine of ``config``, before its buffers are."""
        _ = self.transformer, self.memory if config.memory is not None else None, self.decoder

    @property
    def decoder(self) -> VideoDecoder[Any]:
        return self._decoding[0]

    @property
    def vae_attention(self) -> AttentionSelection | None:
        """The implementation of the decoder's attention, and why; a tiny one has none."""
        return self._decoding[1]

    @property
    def convolutions(self) -> Convolutions:
        """The implementations of the decoder's convolutions, and why; empty for a tiny one."""
        return self._decoding[2]

    @property
    def vae_name(self) -> str:
        """Name of the decoder: ``"wan"``, or the kind of the tiny one."""
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
            raise ConfigError(f"vae_tiles must be 1 for a tiny decoder, got {options.vae_tiles}")
        if options.convolution is not None:
            raise ConfigError(f"convolution must be left out for a tiny decoder, got {options.convolution!r}")
        return TinyDecoder(self.tiny.config, tensors, self.vae, device=device, dtype=dtype), None, {}


def open_networks(loaded: LoadedModel, options: RuntimeOptions, prescribed: Mapping[str, str]) -> Networks:
    """Return the networks of a loaded model on the backend chosen for it; raises :class:`BackendError`."""
    device = parse_device(options.device)
    working = working_dtype(parse_dtype(options.dtype, device))
    backend = choose_backend(
        options.backend,
        device,
        memory=(working, loaded.config.transformer.head_dim) if loaded.mode is MemoryMode.EVOLVE else None,
        prescribed=prescribed.get(BACKEND),
    )
    _logger.log(logging.WARNING if backend.fallback else logging.DEBUG, "backend %s: %s", backend.name, backend.reason)
    folder, tiny = loaded.folder, loaded.tiny_vae
    if tiny is None:
        decoder = FingerprintedTensors(folder.vae_tensors(), f"{folder.vae_source} (VAE)")
    else:
        decoder = FingerprintedTensors(tiny.tensors, f"{tiny.path} (tiny decoder)")
    tensors = ModelTensors(
        transformer=FingerprintedTensors(loaded.transformer, f"{loaded.transformer_source} (transformer)"),
        memory=FingerprintedTensors(loaded.memory or {}, f"{loaded.memory_source} (memory encoder)"),
        vae=decoder,
    )
    return Networks(loaded.config, tensors, options, backend, vae=loaded.vae, tiny=tiny, prescribed=prescribed)


def build_rollout(config: ModelConfig, networks: Networks, mode: MemoryMode, executor: Executor) -> Rollout:
    """Make a rollout of ``networks``; ``config`` is theirs, or the same without its memory."""
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
    """Make an engine that is ready to stream: networks on the device, buffers allocated.

    Args:
        config: the config of ``networks``, or the same without its memory.
        options: read for ``graphs``, ``lookahead``, ``check`` and ``keep_text_encoder``.
        executor: in place of the device's usual one.
        folder: with the text encoder; without it the engine takes only embeddings.
        taken: what the model was made of, for its snapshots, in plain JSON types.

    Raises:
        ConfigError, BackendError: for options that the model cannot have, or too little memory.
    """
    vae, tiny, device = networks.vae, networks.tiny, networks.device
    assert vae is not None
    executor = executor or make_executor(device, options.graphs)
    lookahead = options.lookahead
    if lookahead is None:
        lookahead = 1 if device.type == "cuda" else 0  # a CPU computes one block at a time
    depth = 1 + lookahead
    require_capacity(
        config,
        vae,
        None if tiny is None else tiny.config,
        device=device,
        dtype=networks.dtype,
        vae_dtype=networks.vae_dtype,
        vae_tiles=networks.options.vae_tiles,
        depth=depth,
    )
    attention = networks.attention  # before the weights: its measurement takes memory that they will need
    # float32 whatever the model's dtype: LoRAs are merged in it, and must not depend on the caller's TF32 settings.
    with model_context(device, networks.dtype, networks.vae_dtype, torch.float32):
        networks.load(config)
        rollout = build_rollout(config, networks, mode, executor)
        pipeline = Pipeline(rollout, networks.decoder, vae, networks.ops, executor, device=device, depth=depth)
    implementations: dict[str, Chosen] = {
        BACKEND: networks.backend,
        ATTENTION: attention[0],
        TEXT_ATTENTION: attention[1],
        **({} if networks.vae_attention is None else {VAE_ATTENTION: networks.vae_attention}),
        **{_label(shape): selection for shape, selection in networks.convolutions.items()},
    }
    tensors = networks.tensors
    # All that a video depends on beside seed and prompts: a snapshot can be resumed only where this is the same.
    model = {
        **config.to_flat(),
        "memory_mode": mode.value,
        "vae": networks.vae_name,
        "dtype": str(networks.model_dtype),
        "vae_dtype": str(networks.vae_dtype),
        IMPLEMENTATIONS: {label: chosen.name for label, chosen in implementations.items()},
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
        implementations=implementations,
        prompts=PromptEncoder(
            folder, config.transformer, device, keep=options.keep_text_encoder, dtype=networks.model_dtype
        ),
        initial_video=InitialVideoEncoder(folder, config, vae, device, networks.vae_dtype),
        lookahead=lookahead,
        check=SteadyCheck(executor, device, pipeline.buffers) if options.check else None,
    )
