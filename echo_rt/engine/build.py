"""A model's networks on a device, made of configs, tensors and options, with the implementations that compute them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from echo_rt.attention import AttentionSelection, ByDtype, attention_in_float8, attention_tuner, attentions
from echo_rt.attention import cache_folder as attention_cache
from echo_rt.attention import implementations as attention_candidates
from echo_rt.config import ModelConfig, VaeConfig
from echo_rt.convolution import ConvolutionSelection, ConvolutionShape, select_convolutions
from echo_rt.convolution import cache_folder as convolution_cache
from echo_rt.convolution import implementations as convolution_candidates
from echo_rt.engine.executor import Executor
from echo_rt.engine.rollout import Rollout
from echo_rt.errors import BackendError, ConfigError
from echo_rt.model.decoder_protocol import VideoDecoder
from echo_rt.model.linear import float8_attention, kept_from_float8
from echo_rt.model.linear_products import LinearSelection, LinearShape, linear_shapes, select_linear
from echo_rt.model.linear_products import cache_folder as linear_cache
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
    FLOAT8_ATTENTION,
    LINEAR,
    LINEAR_BEFORE,
    TEXT_ATTENTION,
    VAE_ATTENTION,
    Selected,
)
from echo_rt.utils.device import parse_device, parse_dtype, parse_vae_dtype, working_dtype
from echo_rt.weights.load_model import LoadedModel
from echo_rt.weights.tensors import ModelTensors
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
    tuner = attention_tuner(device, dtype, decoder.attention.shapes(height, width), attention_candidates(ops))
    attended = tuner.select(
        attention_name, prescribed.get(VAE_ATTENTION), cache=attention_cache(), forgive=(BackendError,)
    )
    decoder.attention.compute = attended.implementation
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
    decoder.use({name: convolved[shape].implementation for name, shape in shapes.items()})
    return attended, convolved


def _label(shape: ConvolutionShape) -> str:
    """Label of all convolutions of a shape, which depends on the number of the decoder's tiles."""
    return f"convolution of {shape}"


def convolutions_in_words(convolutions: Convolutions) -> str:
    """Count the shapes of each implementation, in words."""
    counts = Counter(choice.name for choice in convolutions.values())
    return ", ".join(f"{name} for {count}" for name, count in counts.most_common()) + f" of {counts.total()} shapes"


@dataclass(eq=False)
class Networks:
    """A model's networks on the device, each made at first use; engines may share them.

    Use them in a :func:`model_context`, as :class:`Engine` does. ``vae``: the VAE of the model's latents;
    ``tiny``: the decoder in its place; without either there is no decoder. ``selected``: the attention over the cache
    and over the text, None to select it here. ``prescribed``: the implementations of the snapshot to continue, by
    label.
    """

    config: ModelConfig
    tensors: ModelTensors
    options: RuntimeOptions
    backend: Backend
    vae: VaeConfig | None = None
    tiny: TinyVae | None = None
    selected: tuple[AttentionSelection, AttentionSelection] | None = None
    prescribed: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ops, self.device = self.backend.ops, parse_device(self.options.device)
        self.model_dtype = parse_dtype(self.options.dtype, self.device)
        self.dtype = working_dtype(self.model_dtype)  # of everything but float8 matmuls
        self.vae_dtype = parse_vae_dtype(self.options.vae_dtype, self.model_dtype)

    @cached_property
    def attention(self) -> tuple[AttentionSelection, AttentionSelection]:
        """The implementations of attention over the cache and over the text, and why."""
        named = self.prescribed.get(ATTENTION), self.prescribed.get(TEXT_ATTENTION)
        place = self.config, self.device, self.dtype, self.ops
        return self.selected or attentions(*place, self.options.attention, cache=attention_cache(), prescribed=named)

    @cached_property
    def kept_from_float8(self) -> frozenset[str]:
        """Names of what could be float8 and is not."""
        layers, steps = self.config.transformer.num_layers, self.config.sampler.most_steps
        return kept_from_float8(layers, steps, self.model_dtype, self.options.float8_except)

    @cached_property
    def float8_attention(self) -> dict[int, frozenset[int]]:
        """Numbers of the layers that attend in float8, with the denoising steps at which they do not."""
        return float8_attention(self.config.transformer.num_layers, self.kept_from_float8)

    @property
    def float8_layers(self) -> tuple[int, ...]:
        """Numbers of the layers with a float8 cache: those that attend so at every step."""
        return tuple(layer for layer, kept in self.float8_attention.items() if not kept)

    @cached_property
    def attention_in_float8(self) -> AttentionSelection | None:
        """The implementation of attention over the cache in float8, and why; None where no layer has it."""
        if not self.float8_attention:
            return None
        return attention_in_float8(
            self.config,
            self.device,
            self.dtype,
            self.attention[0].implementation,
            cache=attention_cache() if self.selected is None else None,
            prescribed=self.prescribed.get(FLOAT8_ATTENTION),
        )

    @cached_property
    def linear(self) -> Mapping[LinearShape, LinearSelection]:
        """The implementation of each of the transformer's linear layers, and why."""
        place, cache = (self.device, self.dtype), linear_cache() if self.selected is None else None
        # Where there is a snapshot, it names those that torch does not compute.
        before = LINEAR_BEFORE if self.prescribed else None
        return {
            shape: select_linear(
                shape, *place, self.options.linear, self.prescribed.get(f"{LINEAR}{shape}", before), cache
            )
            for shape in linear_shapes(self.config, self.model_dtype)
        }

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
            self.attention[1].implementation,
            device=self.device,
            dtype=self.model_dtype,
            kept=self.kept_from_float8,
            products={shape: choice.implementation for shape, choice in self.linear.items()},
        )

    @cached_property
    def memory(self) -> MemoryEncoder:
        return MemoryEncoder(self.config, self.tensors.memory, self.ops, device=self.device, dtype=self.dtype)

    def implementations(self) -> dict[str, Selected]:
        """All that was selected for the model, by its label in snapshots."""
        over_cache, over_text = self.attention
        found: dict[str, Selected] = {BACKEND: self.backend, ATTENTION: over_cache, TEXT_ATTENTION: over_text}
        for label, selection in ((FLOAT8_ATTENTION, self.attention_in_float8), (VAE_ATTENTION, self.vae_attention)):
            if selection is not None:
                found[label] = selection
        found |= {f"{LINEAR}{shape}": selection for shape, selection in self.linear.items()}
        return found | {_label(shape): selection for shape, selection in self.convolutions.items()}

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
        return WAN_VAE if self.tiny is None else self.tiny.kind

    def make_decoder(self, tensors: Mapping[str, Tensor], ops: Ops, device: torch.device) -> VaeDecoder | TinyDecoder:
        """Make the decoder of these tensors on a device, with the implementations that work anywhere."""
        assert self.vae is not None
        dtype, tiles, convolution = self.vae_dtype, self.options.vae_tiles, self.options.convolution
        if self.tiny is None:
            return VaeDecoder(self.vae, tensors, ops, device=device, dtype=dtype, tiles=tiles)
        if tiles != 1:
            raise ConfigError(f"vae_tiles must be 1 for a tiny decoder, got {tiles}")
        if convolution is not None:
            raise ConfigError(f"convolution must be left out for a tiny decoder, got {convolution!r}")
        return TinyDecoder(self.tiny.config, tensors, self.vae, device=device, dtype=dtype)

    @cached_property
    def _decoding(self) -> tuple[VideoDecoder[Any], AttentionSelection | None, Convolutions]:
        decoder = self.make_decoder(self.tensors.vae, self.ops, self.device)
        if isinstance(decoder, TinyDecoder):
            return decoder, None, {}
        block = (self.config.window.frames_per_block, self.config.latent_height, self.config.latent_width)
        named = (self.options.convolution, self.options.attention)
        return decoder, *fit_decoder(decoder, block, self.ops, *named, self.prescribed)


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
    return Networks(loaded.config, loaded.tensors, options, backend, loaded.vae, loaded.tiny_vae, prescribed=prescribed)


def build_rollout(config: ModelConfig, networks: Networks, mode: MemoryMode, executor: Executor) -> Rollout:
    """Make a rollout of ``networks``; ``config`` is theirs, or the same without its memory."""
    memory = None if config.memory is None else networks.memory
    attention, in_float8 = networks.attention[0].implementation, networks.attention_in_float8
    if in_float8 is not None:
        attention = ByDtype(attention, in_float8.implementation)
    transformer, schedule, in_steps = networks.transformer, networks.schedule, networks.float8_attention
    return Rollout(config, transformer, memory, schedule, networks.ops, attention, mode, executor, in_steps)
