"""The roofline: what a call must move and compute, and what this device reaches at best.

Bytes and operations are pure functions of a call's arguments, by the formulas of docs/kernels.md. What all rows share
(angles, weights of a norm, indices) stays in the caches and is left out, as on that page. The ceilings are measured in
the same run as everything that is held against them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from echo_rt.config import ModelConfig
from echo_rt.errors import ConfigError
from echo_rt.utils.wording import plain
from echo_rt.weights.shapes import memory_shapes

# A call -> the median and the 99th percentile of its times in microseconds.
Time = Callable[[Callable[[], object]], tuple[float, float]]


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


# What limits an operation; the bytes of a call from its arguments, and its operations where arithmetic is the limit.
# The window's history goes into it, and the newest frames into the history.
_FORMULAS: dict[str, tuple[str, Callable[..., int | tuple[int, int]]]] = {
    "rope_table": ("neither", lambda frames, frequencies, out: _size(frames, out)),
    "advance": ("neither", lambda positions, *rest: _size(positions, positions, *rest[-3:])),
    "counter_noise": ("neither", lambda out, *_: _size(out)),
    "qkv_norm_rope_store": ("memory", lambda qkv, a, b, c, d, k_cache, v_cache, write_index, raw_k, *_: (
        _size(qkv)
        + len(qkv) * _size(k_cache[0])
        + len(write_index) * (_size(k_cache[0], v_cache[0]) + (0 if raw_k is None else _size(raw_k[0])))
    )),
    "merge_attention": ("memory", lambda outputs, logsumexps: _size(outputs, outputs[0], logsumexps)),
    "reanchor": ("memory", lambda kv, temporal, spatial, sink_k, memory_k, memory_v, tokens: (
        _size(sink_k, memory_k, memory_v)
        + sum(t.numel() * kv.element_size() for t in (sink_k, *[memory_k, memory_v] * len(kv)) if t is not None)
    )),
    "modulated_layer_norm": ("memory", lambda x, *_: 2 * _size(x)),
    "gated_residual_norm": ("memory", lambda x, *_: 4 * _size(x)),
    "modulated_layer_norm_quantize": ("memory", lambda x, *rest: _size(x, *rest[-3:-1])),
    "gated_residual_norm_quantize": ("memory", lambda x, *rest: 3 * _size(x) + _size(*rest[-3:-1])),
    "gelu_quantize": ("memory", _size),
    "flow_step": ("memory", lambda x, flow, sigmas, noise: 2 * _size(x) + _size(flow, noise)),
    "rms_silu_window": ("memory", lambda x, bias, residual, gamma, window, history, keep: (
        (1 + keep) * _size(x) + _size(residual, window) + 2 * _size(history)
    )),
    "frames_to_uint8": ("memory", _size),
    "memory_attention": ("arithmetic", lambda q, norm, k, v, eps: (
        2 * _size(q) + _size(k, v), 4 * q.numel() * len(k),
    )),
    "gated_update": ("arithmetic", lambda old, candidate, norm, weight, *_: (
        3 * _size(old) + _size(weight), 2 * len(old) * weight.numel(),
    )),
    "causal_conv": ("arithmetic", lambda window, weight, bias, residual, out: (
        _size(window, weight, residual, out), 2 * out.numel() * (weight.numel() // len(weight)),
    )),
    "causal_conv_hopper": ("arithmetic", lambda window, weight, out: (
        _size(window, weight, out), 2 * out.numel() * (weight.numel() // out.shape[-1]),
    )),
    "upsample_conv": ("arithmetic", lambda x, weight, bias, out: (
        _size(x, weight, out), 2 * out.numel() * weight[0, 0].numel(),
    )),
}  # fmt: skip


def work_of(op: str, args: Sequence[Any]) -> Work:
    """What one call of ``op`` with these arguments takes; :class:`ConfigError` for an op without a formula here."""
    if op not in _FORMULAS:
        raise ConfigError(f"{op} has no formula in bench/roofline.py")
    limit, formula = _FORMULAS[op]
    found = formula(*args)
    return Work(*found, limit) if isinstance(found, tuple) else Work(found, 0, limit)


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


# Bytes of each of the copy's buffers, and the side of the square matrices: on a GPU many times its cache, and matrices
# that fill it; on a CPU as little as will do to rehearse.
PROBES = {"cuda": (2**31, 8192), "cpu": (2**24, 256)}


def _ceiling(name: str, amount: float, unit: str, times: tuple[float, float], how: str) -> dict[str, Any]:
    """A row: the rate of ``amount`` in a microsecond of the unit, and the call that reached it."""
    median, p99 = times
    return {"name": name, "value": amount / median, "unit": unit, "median_us": median, "p99_us": p99, "how": how}


def copy_rate(time: Time, device: torch.device, copied: int) -> dict[str, Any]:
    """GB/s of a copy of ``copied`` bytes from one buffer to another, counting what is read and what is written."""
    # Whole numbers of 16 bytes, the widest access there is.
    source = torch.ones(max(1, copied // 16), 2, dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    times, how = time(lambda: target.copy_(source)), f"copy_ of {source.nbytes} bytes, read + written"
    return _ceiling("copy", 2 * source.nbytes / 1e3, "GB/s", times, how)


def measure_ceilings(time: Time, device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Unit -> the ceiling in it: ``GB/s`` of a large copy, ``TFLOP/s`` of a large product in ``dtype``."""
    copied, side = PROBES[device.type]
    # Random values: zeros would draw less power and run faster.
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    times, how = time(lambda: torch.mm(a, b, out=out)), f"torch.mm of two {side} x {side} matrices of normal values"
    product = _ceiling(f"product {plain(dtype)}", 2 * side**3 / 1e6, "TFLOP/s", times, how)
    return {each["unit"]: each for each in (copy_rate(time, device, copied), product)}
