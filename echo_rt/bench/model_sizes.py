"""The models that are benchmarked, as configs: what every size of a benchmark is derived from."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from echo_rt.config import MemoryConfig, ModelConfig, TransformerConfig, VaeConfig
from echo_rt.options import RELEASED_SIZE, latent_size

if TYPE_CHECKING:
    from torch import Tensor

    from echo_rt.convolution import ConvolutionShape
    from echo_rt.ops.schema import Ops


@dataclass(frozen=True)
class BenchModel:
    """A generator with its memory, and the VAE that decodes for it."""

    name: str
    config: ModelConfig
    vae: VaeConfig


@dataclass(frozen=True)
class DecoderNorm:
    """Calls of ``rms_silu_window`` that are alike: the shape of ``x``, what is added to it, whether the sum is kept."""

    frames: int
    height: int
    width: int
    channels: int
    residual: bool
    keep: bool
    calls: int = 0


def _model(name: str, size: tuple[int, int], transformer: TransformerConfig, vae: VaeConfig) -> BenchModel:
    height, width = latent_size(*size, vae, transformer)
    return BenchModel(name, ModelConfig(transformer, height, width, memory=MemoryConfig()), vae)


# Wan2.1-T2V-1.3B at the released size of the video; what is not named here is its default.
RELEASED = _model(
    "released",
    RELEASED_SIZE,
    TransformerConfig(dim=1536, ffn_dim=8960, freq_dim=256, num_heads=12, num_layers=30),
    VaeConfig(),
)
# The same shape of a model, small enough for kernels that run on the host one thread after the other.
TINY = _model(
    "tiny",
    (48, 32),
    TransformerConfig(dim=128, ffn_dim=256, freq_dim=32, num_heads=2, num_layers=2, text_dim=32, text_len=8),
    VaeConfig(base_dim=8),
)
MODELS = {model.name: model for model in (RELEASED, TINY)}


def _decode(
    model: BenchModel,
    rms_silu_window: Callable[..., None],
    convolve: Callable[[ConvolutionShape, Tensor], Tensor] | None = None,
) -> None:
    """A block in the steady state, by the decoder itself, of tensors that have shapes and nothing else.

    ``convolve``: what computes the decoder's convolutions of their frames; torch where it is None.
    """
    import torch

    from echo_rt.convolution import ConvolutionCandidate
    from echo_rt.model.vae_decoder import VaeDecoder
    from echo_rt.weights.shapes import vae_decoder_shapes

    ops = SimpleNamespace(name="recorded", rms_silu_window=rms_silu_window)
    weights = {name: torch.empty(shape, device="meta") for name, shape in vae_decoder_shapes(model.vae).items()}
    decoder = VaeDecoder(model.vae, weights, cast("Ops", ops), device="meta", dtype=torch.bfloat16)
    latents = torch.empty(model.config.window.frames_per_block, *model.config.latent_shape, device="meta")
    block = (*model.config.latent_shape[1:], len(latents))
    if convolve is not None:
        shapes = decoder.convolution_shapes(*block)
        ways = {name: partial(convolve, shape) for name, shape in shapes.items()}
        decoder.use(
            {name: ConvolutionCandidate("recorded", partial(_of_any_weight, way)) for name, way in ways.items()}
        )
    decoder.decode_next(latents, decoder.new_state(*block), is_start=False)


def _of_any_weight(convolve: Callable[[Tensor], Tensor], weight: Tensor) -> Callable[[Tensor], Tensor]:
    return convolve


def decoder_norms(model: BenchModel) -> list[DecoderNorm]:
    """The calls of ``rms_silu_window`` for a block in the steady state, grouped, from the lowest resolution up."""
    calls: Counter[DecoderNorm] = Counter()

    def record(x: Tensor, bias: Any, residual: Any, gamma: Tensor, window: Any, history: Any, keep: bool) -> None:
        frames, height, width, channels = x.shape
        calls[DecoderNorm(frames, height, width, channels, residual is not None, keep)] += 1

    _decode(model, record)
    return [dataclasses.replace(norm, calls=count) for norm, count in calls.items()]


def decoder_convolutions(model: BenchModel) -> Counter[ConvolutionShape]:
    """The convolutions for a block in the steady state, and how often, from the lowest resolution up."""
    calls: Counter[ConvolutionShape] = Counter()

    def record(shape: ConvolutionShape, frames: Tensor) -> Tensor:
        shape = dataclasses.replace(shape, frames=len(frames))
        calls[shape] += 1
        return frames.new_empty(shape.out_size)

    _decode(model, lambda *arguments: None, record)
    return calls
