"""Which decoder makes pictures of a model's latents, and how it goes about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from echo_rt import attention, convolution
from echo_rt.convolution import ConvolutionShape
from echo_rt.errors import BackendError, ConfigError
from echo_rt.model.decoder_protocol import VideoDecoder
from echo_rt.model.tiny_decoder import TinyDecoder
from echo_rt.model.vae_decoder import VaeDecoder
from echo_rt.ops.schema import Ops
from echo_rt.snapshot.ways import VAE_ATTENTION, convolution_label
from echo_rt.weights.load_model import LoadedModel

Convolutions = Mapping[ConvolutionShape, convolution.ConvolutionSelection]
"""How each of a decoder's convolutions is computed, and why; a tiny decoder has no choice."""


@dataclass(frozen=True)
class DecoderOptions:
    """What a user may choose of the decoder; checked when made.

    ``dtype``: what it decodes in. ``tiles``: in how many bands of rows the VAE decodes its two highest resolutions.
    ``convolution``: the name of how its convolutions are computed, or of several ways; None for a trial.
    """

    dtype: torch.dtype
    tiles: int = 1
    convolution: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.tiles, bool) or not isinstance(self.tiles, int) or self.tiles < 1:
            raise ConfigError(f"vae_tiles must be an integer of 1 or more, got {self.tiles!r}")
        if not isinstance(self.convolution, str | None):
            raise ConfigError(
                f"convolution must be text, names with commas between, or left out; got {self.convolution!r}"
            )


def make_decoder(
    loaded: LoadedModel,
    tensors: Mapping[str, Tensor],
    ops: Ops,
    options: DecoderOptions,
    *,
    device: torch.device,
    attention_name: str | None,
    prescribed: Mapping[str, str],
) -> tuple[VideoDecoder[Any], attention.AttentionSelection | None, Convolutions]:
    """The decoder of a loaded model, of its ``tensors``, and how its attention and its convolutions are computed.

    ``attention_name``: what the model's user asked for, for the decoder where it is able; ``prescribed``: the ways of
    the snapshot to go on with, as :mod:`echo_rt.snapshot.ways` describes them.
    Raises :class:`ConfigError` for options that it does not have, :class:`BackendError` for a convolution that is not
    to be had.
    """
    vae = loaded.vae
    if loaded.tiny_vae is None:
        decoder = VaeDecoder(vae, tensors, ops, device=device, dtype=options.dtype, tiles=options.tiles)
        model = loaded.config
        block = (model.window.frames_per_block, model.latent_height, model.latent_width)
        return decoder, *fit_decoder(decoder, block, ops, options.convolution, attention_name, prescribed)
    if options.tiles != 1:
        raise ConfigError(f"vae_tiles must be 1 for a tiny decoder, which needs little memory; got {options.tiles}")
    if options.convolution is not None:
        raise ConfigError(
            f"convolution must be left out for a tiny decoder, which has one way; got {options.convolution!r}"
        )
    return TinyDecoder(loaded.tiny_vae.config, tensors, vae, device=device, dtype=options.dtype), None, {}


def fit_decoder(
    decoder: VaeDecoder,
    block: tuple[int, int, int],
    ops: Ops,
    convolution_name: str | None = None,
    attention_name: str | None = None,
    prescribed: Mapping[str, str] = MappingProxyType({}),
) -> tuple[attention.AttentionSelection, Convolutions]:
    """Has ``decoder`` compute its attention and each convolution in the way that is found for it.

    ``block``: the latents of one call, and their height and width; the rest as above. The errors are those of
    :meth:`echo_rt.autotune.tuner.Tuner.select` and :func:`echo_rt.convolution.select_convolutions`.
    """
    latents, height, width = block
    device, dtype = decoder.device, decoder.dtype
    # An attention asked for by name is the transformer's: of its heads, and not of larger ones, a library is expected
    # to be able.
    shapes_attended = decoder.attention_shapes(height, width)
    attended = attention.attention_tuner(device, dtype, shapes_attended, attention.implementations(ops)).select(
        attention_name, prescribed.get(VAE_ATTENTION), cache=attention.cache_file(), forgive=(BackendError,)
    )
    decoder.attend_by(attended.attention)
    shapes = decoder.convolution_shapes(height, width, latents)
    labels = {shape: convolution_label(shape) for shape in shapes.values()}
    convolved = convolution.select_convolutions(
        convolution_name,
        shapes.values(),
        device=device,
        dtype=dtype,
        cache=convolution.cache_file(),
        candidates=convolution.implementations(ops),
        prescribed={shape: prescribed[label] for shape, label in labels.items() if label in prescribed},
    )
    decoder.use({name: convolved[shape].kind for name, shape in shapes.items()})
    return attended, convolved


def convolutions_in_words(convolutions: Convolutions) -> str:
    """How many of the shapes are computed in which way."""
    counts = Counter(choice.kind.name for choice in convolutions.values())
    return ", ".join(f"{name} for {count}" for name, count in counts.most_common()) + f" of {counts.total()} shapes"
