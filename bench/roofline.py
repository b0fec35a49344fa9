"""The roofline: what a call must move and compute, and what this device reaches at best.

Bytes and operations are pure functions of a call's arguments, by the formulas of docs/kernels.md. What all rows share
(angles, weights of a norm, indices) stays in the caches and is left out, as on that page. The ceilings are measured in
the same run as everything that is held against them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timing import Timer
from torch import Tensor

from echo_rt.config import ModelConfig
from echo_rt.errors import ConfigError
from echo_rt.utils.wording import plain
from echo_rt.weights.shapes import memory_shapes


class Work(NamedTuple):
    """Bytes that a call reads and writes, its floating-point operations (multiply and add are two), and its ``limit``.

    ``limit``: ``memory``, ``arithmetic`` (of the tensor cores), or ``neither``: too small for either, or bound by
    arithmetic that is no matrix product.
    """

    bytes: int
    flops: int
    limit: str


def _size(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


class _Formulas:
    """The work of a call of each operation, of its arguments."""

    @staticmethod
    def rope_table(frames: Tensor, inverse_frequencies: Tensor, out: Tensor) -> Work:
        return Work(_size(frames, out), 0, "neither")

    @staticmethod
    def advance(positions: Tensor, *rest: Any) -> Work:
        *_, temporal_block, temporal_anchor, write_index = rest
        return Work(_size(positions, positions, temporal_block, temporal_anchor, write_index), 0, "neither")

    @staticmethod
    def qkv_norm_rope_store(qkv: Tensor, *rest: Any) -> Work:
        write_index, raw_k = rest[6], rest[7]
        tokens, triple = qkv.shape
        row = triple // 3 * qkv.element_size()
        stored = 2 if raw_k is None else 3
        return Work((4 * tokens + stored * write_index.shape[0]) * row, 0, "memory")

    @staticmethod
    def merge_attention(outputs: Tensor, logsumexps: Tensor) -> Work:
        return Work(_size(outputs, outputs[0], logsumexps), 0, "memory")

    @staticmethod
    def reanchor(
        kv: Tensor, temporal: Tensor, spatial: Tensor, sink_k: Any, memory_k: Any, memory_v: Any, _: int
    ) -> Work:
        sink = 2 * _size(sink_k)
        memory = (1 + kv.shape[0]) * _size(memory_k, memory_v)
        return Work(sink + memory, 0, "memory")

    @staticmethod
    def memory_attention(q: Tensor, norm_q: Tensor, k: Tensor, v: Tensor, eps: float) -> Work:
        return Work(2 * _size(q) + _size(k, v), 4 * q.shape[0] * k.shape[0] * q.shape[1], "arithmetic")

    @staticmethod
    def gated_update(old: Tensor, candidate: Tensor, norm: Tensor, weight: Tensor, *rest: Any) -> Work:
        return Work(3 * _size(old) + _size(weight), 2 * old.shape[0] * weight.numel(), "arithmetic")

    @staticmethod
    def modulated_layer_norm(x: Tensor, *rest: Any) -> Work:
        return Work(2 * _size(x), 0, "memory")

    @staticmethod
    def gated_residual_norm(x: Tensor, y: Tensor, *rest: Any) -> Work:
        return Work(4 * _size(x), 0, "memory")

    @staticmethod
    def modulated_layer_norm_quantize(x: Tensor, *rest: Any) -> Work:
        *_, out, out_scale, _ = rest
        return Work(_size(x, out, out_scale), 0, "memory")

    @staticmethod
    def gated_residual_norm_quantize(x: Tensor, *rest: Any) -> Work:
        *_, out, out_scale, _ = rest
        return Work(3 * _size(x) + _size(out, out_scale), 0, "memory")

    @staticmethod
    def gelu_quantize(x: Tensor, out: Tensor, out_scale: Tensor) -> Work:
        return Work(_size(x, out, out_scale), 0, "memory")

    @staticmethod
    def counter_noise(out: Tensor, *rest: Any) -> Work:
        return Work(_size(out), 0, "neither")

    @staticmethod
    def flow_step(x: Tensor, flow: Tensor, sigmas: Tensor, noise: Tensor | None) -> Work:
        return Work(2 * _size(x) + _size(flow, noise), 0, "memory")

    @staticmethod
    def rms_silu_window(
        x: Tensor, bias: Any, residual: Any, gamma: Any, window: Tensor, history: Any, keep: bool
    ) -> Work:
        # The history goes to the window, and the newest frames into it.
        return Work((1 + keep) * _size(x) + _size(residual, window) + 2 * _size(history), 0, "memory")

    @staticmethod
    def frames_to_uint8(video: Tensor, out: Tensor) -> Work:
        return Work(_size(video, out), 0, "memory")

    @staticmethod
    def causal_conv(window: Tensor, weight: Tensor, bias: Any, residual: Tensor | None, out: Tensor) -> Work:
        each = weight.numel() // weight.shape[0]
        return Work(_size(window, weight, residual, out), 2 * out.numel() * each, "arithmetic")

    @staticmethod
    def causal_conv_hopper(window: Tensor, weight: Tensor, out: Tensor) -> Work:
        return Work(_size(window, weight, out), 2 * out.numel() * (weight.numel() // out.shape[-1]), "arithmetic")

    @staticmethod
    def upsample_conv(x: Tensor, weight: Tensor, bias: Any, out: Tensor) -> Work:
        each = weight.numel() // weight.shape[0] // weight.shape[1]
        return Work(_size(x, weight, out), 2 * out.numel() * each, "arithmetic")


def work_of(op: str, args: Sequence[Any]) -> Work:
    """What one call of ``op`` with these arguments takes; :class:`ConfigError` for an op without a formula here."""
    formula: Callable[..., Work] | None = getattr(_Formulas, op, None)
    if formula is None:
        raise ConfigError(f"{op} has no formula in bench/roofline.py")
    return formula(*args)


def memory_update_work(config: ModelConfig, keys: int, element_size: int) -> Work:
    """Of a whole update of the memory over ``keys`` evicted tokens, its new keys and values included."""
    assert config.memory is not None
    rows, dim = config.memory_tokens, config.transformer.dim
    matrices = [shape for name, shape in memory_shapes(config).items() if len(shape) == 2]
    weights = sum(out * into for out, into in matrices)
    attention = 4 * rows * keys * dim * config.memory.layers
    # Read: the weights, the old state, the evicted keys and values; written: the new state, its keys and values.
    moved = (weights + (1 + 3) * rows * dim + 2 * keys * dim) * element_size
    return Work(moved, 2 * rows * weights + attention, "arithmetic")


@dataclass(frozen=True)
class Ceiling:
    """A measured rate: ``value`` in ``unit``, and the call that reached it."""

    name: str
    value: float
    unit: str
    median_us: float
    p99_us: float
    how: str


# Bytes of each of the copy's buffers, and the side of the square matrices: on a GPU many times its cache, and matrices
# that fill it; on a CPU as little as will do to rehearse.
PROBES = {"cuda": (2**31, 8192), "cpu": (2**24, 256)}


def copy_rate(timer: Timer, device: torch.device, copied: int, iterations: int, warmup: int) -> Ceiling:
    """GB/s of a copy of ``copied`` bytes from one buffer to another, counting what is read and what is written."""
    # Whole numbers of 16 bytes, the widest access there is.
    source = torch.ones(max(1, copied // 16), 2, dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    times = timer.measure(lambda: target.copy_(source), iterations, warmup)
    moved = 2 * source.numel() * source.element_size()
    how = f"copy_ of {moved // 2} bytes, read + written"
    return Ceiling("copy", moved / times.median / 1e3, "GB/s", times.median, times.p99, how)


def product_rate(
    timer: Timer, device: torch.device, dtype: torch.dtype, side: int, iterations: int, warmup: int
) -> Ceiling:
    """TFLOP/s of a square matrix product of random values: zeros would draw less power and run faster."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    times = timer.measure(lambda: torch.mm(a, b, out=out), iterations, warmup)
    name = f"product {plain(dtype)}"
    how = f"torch.mm of two {side} x {side} matrices of normal values"
    return Ceiling(name, 2 * side**3 / times.median / 1e6, "TFLOP/s", times.median, times.p99, how)


def measure_ceilings(
    timer: Timer, device: torch.device, dtype: torch.dtype, iterations: int, warmup: int
) -> dict[str, Ceiling]:
    """Unit -> the ceiling in it: ``GB/s`` of a large copy, ``TFLOP/s`` of a large product in ``dtype``."""
    copied, side = PROBES[device.type]
    found = (
        copy_rate(timer, device, copied, iterations, warmup),
        product_rate(timer, device, dtype, side, iterations, warmup),
    )
    return {ceiling.unit: ceiling for ceiling in found}
