"""What is benchmarked of each operation: its arguments, as the tests make them, at the sizes of a model."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import cases
import torch
from torch import Tensor

from echo_rt.bench.settings import BenchModel
from echo_rt.convolution import ConvolutionCandidate, ConvolutionShape
from echo_rt.convolution.backends import hopper_limit
from echo_rt.model.vae_decoder import VaeDecoder
from echo_rt.ops.schema import Ops
from echo_rt.weights.shapes import vae_decoder_shapes

OPS = cases.OPS
IN8 = "in float8"  # at the end of the name of a call that has a counterpart in 16 bits
# Values of a latent frame for each of its tokens, in the shape that cases.py gives to noise and latents.
_VALUES_A_TOKEN = 16


@dataclass(frozen=True)
class Variant:
    """One way in which the model calls ``op``; ``calls`` that are alike are made for each block."""

    op: str
    name: str
    calls: int
    sizes: cases.Sizes
    without: tuple[int, ...] = ()

    def arguments(self, dtype: torch.dtype, device: torch.device) -> list[Any]:
        """Fresh arguments; those at the places ``without`` are None, or False where they are flags."""
        args = list(cases.MAKERS[self.op](self.sizes, _DeviceMaker(dtype, device)))
        for place in self.without:
            args[place] = False if isinstance(args[place], bool) else None
        return args


class _DeviceMaker(cases.Maker):
    """Draws on the device itself, as the released sizes take minutes on a host. ``meta`` makes shapes alone."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(dtype, str(device), seed=0)
        self._drawn = None if device.type == "meta" else torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        out = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        return out.normal_(0.0, scale, generator=self._drawn)


def _sizes(model: BenchModel) -> cases.Sizes:
    config, transformer, window = model.config, model.config.transformer, model.config.window
    return cases.Sizes(
        frames=window.frames_per_block,
        tokens=config.tokens_per_frame,
        heads=transformer.num_heads,
        head_dim=transformer.head_dim,
        layers=transformer.num_layers,
        sink_frames=window.sink_frames,
        local_frames=window.local_frames,
        memory_frames=config.memory_frames,
        ffn_dim=transformer.ffn_dim,
    )


def passes(model: BenchModel) -> int:
    """Passes through the transformer for a block: the denoising steps, and the one that fills the cache."""
    return len(model.config.sampler.denoising_steps) + 1


class LinearLayer(NamedTuple):
    """A linear layer of the transformer, ``calls`` a block; ``float8``: where the dtype is, it is too."""

    name: str
    outputs: int
    inputs: int
    calls: int
    float8: bool = True


def linear_layers(model: BenchModel) -> list[LinearLayer]:
    """The large ones, in the order of a layer."""
    dim, ffn = model.config.transformer.dim, model.config.transformer.ffn_dim
    # The context pass ends where its last layer has stored its keys.
    calls = model.config.transformer.num_layers * passes(model) - 1
    return [
        LinearLayer("q, k, v", 3 * dim, dim, calls + 1),
        LinearLayer("self_out", dim, dim, calls, float8=False),
        LinearLayer("cross_q", dim, dim, calls),
        LinearLayer("cross_out", dim, dim, calls, float8=False),
        LinearLayer("ffn_in", ffn, dim, calls),
        LinearLayer("ffn_out", dim, ffn, calls),
    ]


def decoder_order(model: BenchModel) -> list[tuple[Any, ...] | ConvolutionShape]:
    """A block in the steady state as the decoder makes it, of tensors that have shapes and nothing else.

    Its norms and convolutions in their order: the arguments of ``rms_silu_window``, the shape of a convolution.
    """
    order: list[tuple[Any, ...] | ConvolutionShape] = []

    def convolve(shape: ConvolutionShape, frames: Tensor) -> Tensor:
        shape = dataclasses.replace(shape, frames=len(frames))
        order.append(shape)
        return frames.new_empty(shape.out_size)

    ops = SimpleNamespace(name="recorded", rms_silu_window=lambda *arguments: order.append(arguments))
    weights = {name: torch.empty(shape, device="meta") for name, shape in vae_decoder_shapes(model.vae).items()}
    decoder = VaeDecoder(model.vae, weights, cast("Ops", ops), device="meta", dtype=torch.bfloat16)
    latents = torch.empty(model.config.window.frames_per_block, *model.config.latent_shape, device="meta")
    block = (*model.config.latent_shape[1:], len(latents))

    def candidate(shape: ConvolutionShape) -> ConvolutionCandidate:
        return ConvolutionCandidate("recorded", lambda weight: partial(convolve, shape))

    decoder.use({name: candidate(shape) for name, shape in decoder.convolution_shapes(*block).items()})
    decoder.decode_next(latents, decoder.new_state(*block), is_start=False)
    return order


def _windows(model: BenchModel) -> list[Variant]:
    """The norms of the decoder, from the lowest resolution up."""
    norms = (each for each in decoder_order(model) if isinstance(each, tuple))
    calls = Counter((tuple(x.shape), residual is not None, keep) for x, _, residual, _, _, _, keep in norms)
    found = []
    for (vae, residual, keep), count in calls.items():
        name = "x".join(map(str, vae)) + " residual" * residual + " kept" * keep
        without = (2,) * (not residual) + (6,) * (not keep)
        found.append(Variant("rms_silu_window", name, count, dataclasses.replace(_sizes(model), vae=vae), without))
    return found


# Arguments of convolutions that are left out.
_ADDED = {"causal_conv": (2, 3), "causal_conv_hopper": (), "upsample_conv": (2,)}


def _convolutions(op: str, model: BenchModel) -> list[Variant]:
    """Without bias and residual, which the next norm adds: what the decoder asks of torch. One where it has none."""
    found = []
    shapes = Counter(each for each in decoder_order(model) if isinstance(each, ConvolutionShape))
    for shape, calls in shapes.items():  # from the lowest resolution up
        if shape.enlarge != (op == "upsample_conv") or (op == "causal_conv_hopper" and hopper_limit(shape)):
            continue
        frames, height, width, channels = shape.out_size
        kernel = "x".join(map(str, shape.kernel))
        vae = (frames, shape.height, shape.width, shape.channels)
        sizes = dataclasses.replace(_sizes(model), vae=vae, convolution=(channels, *shape.kernel))
        name = f"{frames}x{height}x{width} {shape.channels}-{channels} {kernel}"
        found.append(Variant(op, name, calls, sizes, _ADDED[op]))
    return found or [Variant(op, "", 0, _sizes(model))]


def variants(op: str, model: BenchModel) -> list[Variant]:
    """The ways in which the model calls ``op``; one at the model's own sizes where none is named here."""
    if op in _ADDED:
        return _convolutions(op, model)
    if op == "rms_silu_window":
        return _windows(model)
    config, vae, sizes, steps = model.config, model.vae, _sizes(model), passes(model) - 1
    layers = config.transformer.num_layers
    # The context pass ends where its last layer has stored its keys, and has no head.
    whole, stored = layers * passes(model) - 1, (layers - 1) * passes(model)
    # The KV buffer of the layers that attend in float8, which are all but the last.
    in8 = dataclasses.replace(sizes, float8=True, layers=layers - 1)
    latents = dataclasses.replace(sizes, tokens=math.prod(config.latent_shape) // _VALUES_A_TOKEN)
    frames, stride = sizes.frames * vae.temporal_stride, vae.spatial_stride
    pixels = (frames, config.latent_height * stride, config.latent_width * stride, 3)
    ways: dict[str, list[tuple[str, int, cases.Sizes, tuple[int, ...]]]] = {
        "qkv_norm_rope_store": [
            ("", stored, sizes, (8,)), ("last layer", passes(model), sizes, ()), (IN8, stored, in8, (8,)),
        ],
        "reanchor": [
            ("block begins", 1, sizes, (5,)), ("memory changed", 1, sizes, (3,)),
            (f"block begins, {IN8}", 1, in8, (5,)), (f"memory changed, {IN8}", 1, in8, (3,)),
        ],
        "counter_noise": [("", steps, latents, ())],
        "flow_step": [("", steps, latents, ())],
        "frames_to_uint8": [("", 1, dataclasses.replace(sizes, vae=pixels), ())],
    }  # fmt: skip
    calls = {
        "advance": 1,
        "memory_attention": config.memory.layers if config.memory else 0,
        "gated_update": 1,
        "modulated_layer_norm": passes(model),
        "gated_residual_norm": 3 * whole,
        "modulated_layer_norm_quantize": passes(model),
        # What the head reads stays in 16 bits.
        "gated_residual_norm_quantize": 3 * whole - steps,
        "gelu_quantize": whole,
    }
    return [Variant(op, *way) for way in ways.get(op, [("", calls.get(op, 0), sizes, ())])]
