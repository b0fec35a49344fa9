"""Inputs for every operation of :class:`echo_rt.ops.schema.Ops`, made once, for tests and benchmarks alike.

``CASES[op](sizes, dtype, device, seed)`` gives the arguments in the schema's order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from echo_rt.convolution.backends import COLUMNS, DEPTH, tiled
from echo_rt.utils.device import FLOAT8


@dataclass(frozen=True)
class Sizes:
    """A model's sizes as the operations see them.

    ``vae`` is (frames, height, width, channels); ``convolution`` channels that come out, and the kernel's frames, rows
    and columns. ``float8``: whether the KV cache is.
    """

    frames: int = 3
    tokens: int = 6
    heads: int = 2
    head_dim: int = 12
    layers: int = 2
    sink_frames: int = 3
    local_frames: int = 9
    memory_frames: int = 3
    vae: tuple[int, int, int, int] = (3, 5, 4, 6)
    convolution: tuple[int, int, int, int] = (7, 3, 3, 3)
    ffn_dim: int = 40
    float8: bool = False

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def temporal_pairs(self) -> int:
        return (self.head_dim - 4 * (self.head_dim // 6)) // 2

    @property
    def spatial_pairs(self) -> int:
        return self.head_dim // 2 - self.temporal_pairs

    @property
    def rows(self) -> int:
        return (self.memory_frames + self.sink_frames + self.local_frames) * self.tokens


# Odd on purpose: nothing is a power of two, and one size has a single token, head or frame.
SIZES = {
    "small": Sizes(),
    "odd": Sizes(
        frames=1, tokens=7, heads=3, head_dim=14, layers=3, sink_frames=1, local_frames=5, memory_frames=1, ffn_dim=131
    ),
    # Wan's own width: rows that several warps share, and whole 16-byte pieces.
    "wide": Sizes(
        frames=2,
        tokens=3,
        heads=12,
        head_dim=128,
        layers=7,
        sink_frames=2,
        local_frames=4,
        memory_frames=2,
        vae=(1, 2, 3, 96),
        ffn_dim=8960,
    ),
    "one": Sizes(frames=2, tokens=1, heads=1, head_dim=64, layers=1, sink_frames=2, memory_frames=2, local_frames=2),
}
EPS = 1e-6


class Maker:
    def __init__(self, dtype: torch.dtype, device: str, seed: int) -> None:
        self.dtype, self.device = dtype, device
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        values = scale * torch.randn(shape, generator=self._generator)
        return values.to(self.device, dtype or self.dtype)

    def table(self, frames: int, pairs: int) -> Tensor:
        """Cosine and sine of random angles."""
        angles = 100 * torch.rand(frames, pairs, generator=self._generator, dtype=torch.float64)
        return torch.stack((angles.cos(), angles.sin()), -1).float().to(self.device)

    def rates(self, pairs: int) -> Tensor:
        return (10000.0 ** -(torch.arange(pairs, dtype=torch.float64) / pairs)).to(self.device)


def _rope_table(s: Sizes, m: Maker) -> tuple[Any, ...]:
    frames = torch.tensor([0, 1, 20, 325_000, 10_000_000, 2**31], device=m.device)
    return frames, m.rates(s.temporal_pairs), torch.empty(len(frames), s.temporal_pairs, 2, device=m.device)


def _advance(s: Sizes, m: Maker) -> tuple[Any, ...]:
    return (
        torch.tensor([-1, 0, 0, 0, 0], device=m.device),
        s.frames,
        s.sink_frames,
        s.local_frames,
        s.memory_frames,
        s.sink_frames + s.memory_frames + s.local_frames + 2,
        m.rates(s.temporal_pairs),
        torch.empty(s.frames, s.temporal_pairs, 2, device=m.device),
        torch.empty(s.memory_frames + s.sink_frames, s.temporal_pairs, 2, device=m.device),
        torch.empty(s.frames * s.tokens, dtype=torch.int64, device=m.device),
    )


def _cache(s: Sizes, m: Maker, *rows: int) -> Tensor:
    values = m.normal(*rows, s.heads, s.head_dim)
    return values.to(FLOAT8) if s.float8 else values


def _qkv_norm_rope_store(s: Sizes, m: Maker) -> tuple[Any, ...]:
    n, first = s.frames * s.tokens, (s.memory_frames + s.sink_frames) * s.tokens
    return (
        m.normal(n, 3 * s.dim),
        1 + m.normal(s.dim, dtype=torch.float32, scale=0.1),
        1 + m.normal(s.dim, dtype=torch.float32, scale=0.1),
        m.table(s.frames, s.temporal_pairs),
        m.table(s.tokens, s.spatial_pairs),
        _cache(s, m, s.rows),
        _cache(s, m, s.rows),
        torch.arange(first, first + n, device=m.device),
        m.normal(s.local_frames * s.tokens, s.heads, s.head_dim),
        first,
        EPS,
    )


def _merge_attention(s: Sizes, m: Maker) -> tuple[Any, ...]:
    pieces, n = 2, s.frames * s.tokens
    return m.normal(pieces, n, s.heads, s.head_dim), m.normal(pieces, s.heads, n, dtype=torch.float32, scale=3)


def _reanchor(s: Sizes, m: Maker) -> tuple[Any, ...]:
    memory = s.memory_frames * s.tokens
    return (
        _cache(s, m, s.layers, 2, s.rows),
        m.table(s.memory_frames + s.sink_frames, s.temporal_pairs),
        m.table(s.tokens, s.spatial_pairs),
        m.normal(s.layers, s.sink_frames * s.tokens, s.heads, s.head_dim),
        m.normal(memory, s.heads, s.head_dim),
        m.normal(memory, s.heads, s.head_dim),
        memory,
    )


def _memory_attention(s: Sizes, m: Maker) -> tuple[Any, ...]:
    evicted = s.frames * s.tokens
    return (
        m.normal(s.memory_frames * s.tokens, s.dim),
        1 + m.normal(s.dim, dtype=torch.float32, scale=0.1),
        m.normal(evicted, s.heads, s.head_dim),
        m.normal(evicted, s.heads, s.head_dim),
        EPS,
    )


def _gated_update(s: Sizes, m: Maker) -> tuple[Any, ...]:
    tokens = s.memory_frames * s.tokens
    return (
        m.normal(tokens, s.dim),
        m.normal(tokens, s.dim),
        1 + m.normal(s.dim, dtype=torch.float32, scale=0.1),
        m.normal(s.dim, 2 * s.dim, scale=(2 * s.dim) ** -0.5),
        2 + m.normal(s.dim, scale=0.1),
        torch.empty(tokens, s.dim, dtype=m.dtype, device=m.device),
        EPS,
    )


def _vector(s: Sizes, m: Maker, centre: float) -> Tensor:
    return centre + m.normal(s.dim, dtype=torch.float32, scale=0.3)


def _modulated_layer_norm(s: Sizes, m: Maker) -> tuple[Any, ...]:
    return m.normal(s.frames * s.tokens, s.dim), _vector(s, m, 0), _vector(s, m, 1), EPS


def _gated_residual_norm(s: Sizes, m: Maker) -> tuple[Any, ...]:
    n = s.frames * s.tokens
    gate = _vector(s, m, 0)
    return m.normal(n, s.dim), m.normal(n, s.dim), gate, _vector(s, m, 0), _vector(s, m, 1), EPS


def _quantized(rows: int, width: int, m: Maker) -> tuple[Tensor, Tensor]:
    return torch.empty(rows, width, dtype=FLOAT8, device=m.device), torch.empty(rows, device=m.device)


def _modulated_layer_norm_quantize(s: Sizes, m: Maker) -> tuple[Any, ...]:
    *inputs, eps = _modulated_layer_norm(s, m)
    return *inputs, *_quantized(s.frames * s.tokens, s.dim, m), eps


def _gated_residual_norm_quantize(s: Sizes, m: Maker) -> tuple[Any, ...]:
    *inputs, eps = _gated_residual_norm(s, m)
    return *inputs, *_quantized(s.frames * s.tokens, s.dim, m), eps


def _gelu_quantize(s: Sizes, m: Maker) -> tuple[Any, ...]:
    n = s.frames * s.tokens
    return m.normal(n, s.ffn_dim), *_quantized(n, s.ffn_dim, m)


def _counter_noise(s: Sizes, m: Maker) -> tuple[Any, ...]:
    out = torch.empty(s.frames, 4, 2, 2 * s.tokens, device=m.device)
    # A block and a seed of which both words count.
    return out, torch.tensor([5 * 2**32 + 9, 0, 0, 0, 0], device=m.device), torch.tensor([7, 3], device=m.device), 2


def _flow_step(s: Sizes, m: Maker) -> tuple[Any, ...]:
    shape = (s.frames, 4, 2, 2 * s.tokens)
    sigmas = torch.tensor([0.9375, 0.8333], dtype=torch.float64, device=m.device)
    float32 = torch.float32
    return m.normal(*shape, dtype=float32), m.normal(*shape), sigmas, m.normal(*shape, dtype=float32)


def _rms_silu_window(s: Sizes, m: Maker) -> tuple[Any, ...]:
    frames, *size = s.vae
    past, channels = 2, size[-1]
    bias, gamma = (m.normal(channels, dtype=torch.float32, scale=0.1) for _ in range(2))
    x, residual, window, history = (m.normal(n, *size) for n in (frames, frames, past + frames, past))
    return x, bias, residual, 1 + gamma, window, history, True


def _frames_to_uint8(s: Sizes, m: Maker) -> tuple[Any, ...]:
    frames, height, width, _ = s.vae
    return m.normal(frames, height, width, 3), torch.empty(frames, height, width, 3, dtype=torch.uint8, device=m.device)


def _causal_conv(s: Sizes, m: Maker) -> tuple[Any, ...]:
    frames, height, width, channels = s.vae
    out_channels, past_and_present, *_ = s.convolution
    kernel = (channels, *s.convolution[1:])
    weight = m.normal(out_channels, *kernel, scale=math.prod(kernel) ** -0.5)
    return (
        m.normal(past_and_present - 1 + frames, height, width, channels),
        weight.contiguous(memory_format=torch.channels_last_3d),
        m.normal(out_channels, dtype=torch.float32),
        m.normal(frames, height, width, out_channels),
        torch.empty(frames, height, width, out_channels, dtype=m.dtype, device=m.device),
    )


def _causal_conv_hopper(s: Sizes, m: Maker) -> tuple[Any, ...]:
    """Channels in whole tiles of its weight; where there are not enough for one, one goes in and two come out."""
    frames, height, width, wanted = s.vae
    channels, out_channels = max(1, wanted // DEPTH) * DEPTH, (s.convolution[0] // COLUMNS or 2) * COLUMNS
    kernel_frames = s.convolution[1]
    weight = m.normal(out_channels, channels, kernel_frames, 3, 3, scale=(9 * kernel_frames * channels) ** -0.5)
    return (
        m.normal(kernel_frames - 1 + frames, height, width, channels),
        tiled(weight),
        torch.empty(frames, height, width, out_channels, dtype=m.dtype, device=m.device),
    )


def _upsample_conv(s: Sizes, m: Maker) -> tuple[Any, ...]:
    frames, height, width, channels = s.vae
    out_channels = s.convolution[0]
    return (
        m.normal(*s.vae),
        m.normal(4, out_channels, 2, 2, channels, scale=(4 * channels) ** -0.5),
        m.normal(out_channels, dtype=torch.float32),
        torch.empty(frames, 2 * height, 2 * width, out_channels, dtype=m.dtype, device=m.device),
    )


MAKERS: dict[str, Callable[[Sizes, Maker], tuple[Any, ...]]] = {
    "rope_table": _rope_table,
    "advance": _advance,
    "qkv_norm_rope_store": _qkv_norm_rope_store,
    "merge_attention": _merge_attention,
    "reanchor": _reanchor,
    "memory_attention": _memory_attention,
    "gated_update": _gated_update,
    "modulated_layer_norm": _modulated_layer_norm,
    "gated_residual_norm": _gated_residual_norm,
    "modulated_layer_norm_quantize": _modulated_layer_norm_quantize,
    "gated_residual_norm_quantize": _gated_residual_norm_quantize,
    "gelu_quantize": _gelu_quantize,
    "counter_noise": _counter_noise,
    "flow_step": _flow_step,
    "rms_silu_window": _rms_silu_window,
    "frames_to_uint8": _frames_to_uint8,
    "causal_conv": _causal_conv,
    "causal_conv_hopper": _causal_conv_hopper,
    "upsample_conv": _upsample_conv,
}
OPS = tuple(MAKERS)


def make_case(op: str, sizes: Sizes, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> list[Any]:
    """The arguments of one call of ``op``, in the schema's order."""
    return list(MAKERS[op](sizes, Maker(dtype, device, seed)))
