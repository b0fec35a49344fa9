"""The models that are benchmarked, as configs: what every size of a benchmark is derived from."""

from __future__ import annotations

from dataclasses import dataclass

from echo_rt.config import MemoryConfig, ModelConfig, TransformerConfig, VaeConfig
from echo_rt.options import RELEASED_SIZE, latent_size


@dataclass(frozen=True)
class BenchModel:
    """A generator with its memory, and the VAE that decodes for it."""

    name: str
    config: ModelConfig
    vae: VaeConfig


@dataclass(frozen=True)
class DecoderLevel:
    """Calls of ``rms_silu_window`` that are alike: the frames of one latent, in the steady state of a stream."""

    frames: int
    height: int
    width: int
    channels: int
    calls: int


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


def decoder_levels(model: BenchModel) -> list[DecoderLevel]:
    """The norms before the decoder's convolutions, grouped by size, from the lowest resolution to the highest.

    They are looked up in the decoder's own table of weights; the norm of the attention in its middle is another op.
    """
    from echo_rt.weights.shapes import vae_decoder_shapes

    shapes = vae_decoder_shapes(model.vae)
    frames, height, width = 1, model.config.latent_height, model.config.latent_width
    calls: dict[tuple[int, int, int, int], int] = {}
    for name, shape in shapes.items():
        if name.endswith(".time_conv.weight"):
            frames *= 2
        elif name.endswith(".resample.1.weight"):
            height, width = 2 * height, 2 * width
        elif name.endswith(".gamma") and not name.endswith(".norm.gamma"):
            key = (frames, height, width, shape[0])
            calls[key] = calls.get(key, 0) + 1
    return [DecoderLevel(*key, count) for key, count in calls.items()]
