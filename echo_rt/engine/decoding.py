"""How a VAE decoder computes its attention and its convolutions, chosen for its shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType

from echo_rt import attention, convolution
from echo_rt.convolution import ConvolutionShape
from echo_rt.errors import BackendError
from echo_rt.model.vae_decoder import VaeDecoder
from echo_rt.ops.schema import Ops
from echo_rt.snapshot.ways import VAE_ATTENTION, convolution_label

Convolutions = Mapping[ConvolutionShape, convolution.ConvolutionSelection]
"""How each of a decoder's convolutions is computed, and why; a tiny decoder has no choice."""


def fit_decoder(
    decoder: VaeDecoder,
    block: tuple[int, int, int],
    ops: Ops,
    convolution_name: str | None = None,
    attention_name: str | None = None,
    prescribed: Mapping[str, str] = MappingProxyType({}),
) -> tuple[attention.AttentionSelection, Convolutions]:
    """Choose how ``decoder`` computes its attention and each convolution, and set it so; returns the choices.

    ``block``: the latents of one call, and their height and width. ``attention_name``: what the model's user asked for,
    for the decoder where it is able; ``prescribed``: the ways of the snapshot to go on with, as
    :mod:`echo_rt.snapshot.ways` describes them. The errors are those of
    :func:`echo_rt.attention.choose_attention` and :func:`echo_rt.convolution.choose_convolutions`.
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
