"""The models that are benchmarked, as configs: what every size of a benchmark is derived from."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from echo_rt.config import MemoryConfig, ModelConfig, TransformerConfig, VaeConfig
from echo_rt.options import RELEASED_SIZE, latent_size

if TYPE_CHECKING:
    from torch import Tensor

    from echo_rt.ops import Ops


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


@dataclass(frozen=True)
class DecoderConvolution:
    """Convolutions that are alike: what comes out, channels that go in; ``kernel`` channels out, frames, rows, columns.

    Where the kernel is 1x3x3, the picture that goes in has just been enlarged twofold.
    """

    frames: int
    height: int
    width: int
    channels: int
    kernel: tuple[int, ...]
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


def _decode(model: BenchModel, rms_silu_window: Callable[..., None]) -> None:
    """A block in the steady state, by the decoder itself, of tensors that have shapes and nothing else."""
    import torch

    from echo_rt.model.vae_decoder import VaeDecoder
    from echo_rt.weights.shapes import vae_decoder_shapes

    ops = SimpleNamespace(name="recorded", rms_silu_window=rms_silu_window)
    weights = {name: torch.empty(shape, device="meta") for name, shape in vae_decoder_shapes(model.vae).items()}
    decoder = VaeDecoder(model.vae, weights, cast("Ops", ops), device="meta", dtype=torch.bfloat16)
    latents = torch.empty(model.config.window.frames_per_block, *model.config.latent_shape, device="meta")
    state = decoder.new_state(*model.config.latent_shape[1:], len(latents))
    decoder.decode_next(latents, state, is_start=False)


def decoder_norms(model: BenchModel) -> list[DecoderNorm]:
    """The calls of ``rms_silu_window`` for a block in the steady state, grouped, from the lowest resolution up."""
    calls: Counter[DecoderNorm] = Counter()

    def record(x: Tensor, bias: Any, residual: Any, gamma: Tensor, window: Any, history: Any, keep: bool) -> None:
        frames, height, width, channels = x.shape
        calls[DecoderNorm(frames, height, width, channels, residual is not None, keep)] += 1

    _decode(model, record)
    return [dataclasses.replace(norm, calls=count) for norm, count in calls.items()]


def decoder_convolutions(model: BenchModel) -> list[DecoderConvolution]:
    """The convolutions for a block in the steady state, grouped, from the lowest resolution up."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    calls: Counter[DecoderConvolution] = Counter()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.convolution.default:
                channels, *kernel = args[1].shape[1:]
                # One video [1, C, T, H, W], or frames [T, C, H, W] that a 2-D kernel takes one by one.
                frames, (height, width) = out.shape[2] if len(kernel) == 3 else len(out), out.shape[-2:]
                kernel = [1, *kernel][-3:]
                calls[DecoderConvolution(frames, height, width, channels, (out.shape[1], *kernel))] += 1
            return out

    with Recorder():  # type: ignore[no-untyped-call]
        _decode(model, lambda *arguments: None)
    return [dataclasses.replace(convolution, calls=count) for convolution, count in calls.items()]
