"""How much a call must move and compute: pure functions of its arguments, by the formulas of docs/kernels.md.

What all rows share (angles, weights of a norm, indices) stays in the caches and is left out, as on that page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from echo_rt.config import ModelConfig
from echo_rt.errors import ConfigError
from echo_rt.weights.shapes import memory_shapes


@dataclass(frozen=True)
class Work:
    """Bytes that a call reads and writes, its floating-point operations (multiply and add are two), and its ``limit``.

    ``limit``: ``memory``, ``arithmetic`` (of the tensor cores), or ``neither``: too small for either, or bound by
    arithmetic that is no matrix product.
    """

    bytes: int
    flops: int
    limit: str


def _size(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _rope_table(frames: Tensor, inverse_frequencies: Tensor, out: Tensor) -> Work:
    return Work(_size(frames, out), 0, "neither")


def _advance(positions: Tensor, *rest: Any) -> Work:
    *_, temporal_block, temporal_anchor, write_index = rest
    return Work(_size(positions, positions, temporal_block, temporal_anchor, write_index), 0, "neither")


def _qkv_norm_rope_store(qkv: Tensor, *rest: Any) -> Work:
    write_index, raw_k = rest[6], rest[7]
    tokens, triple = qkv.shape
    row = triple // 3 * qkv.element_size()
    stored = 2 if raw_k is None else 3
    return Work((4 * tokens + stored * write_index.shape[0]) * row, 0, "memory")


def _merge_attention(outputs: Tensor, logsumexps: Tensor) -> Work:
    return Work(_size(outputs, outputs[0], logsumexps), 0, "memory")


def _reanchor(kv: Tensor, temporal: Tensor, spatial: Tensor, sink_k: Any, memory_k: Any, memory_v: Any, _: int) -> Work:
    sink = 2 * _size(sink_k)
    memory = (1 + kv.shape[0]) * _size(memory_k, memory_v)
    return Work(sink + memory, 0, "memory")


def _memory_attention(q: Tensor, norm_q: Tensor, k: Tensor, v: Tensor, eps: float) -> Work:
    return Work(2 * _size(q) + _size(k, v), 4 * q.shape[0] * k.shape[0] * q.shape[1], "arithmetic")


def _gated_update(old: Tensor, candidate: Tensor, norm: Tensor, weight: Tensor, *rest: Any) -> Work:
    return Work(3 * _size(old) + _size(weight), 2 * old.shape[0] * weight.numel(), "arithmetic")


def _modulated_layer_norm(x: Tensor, *rest: Any) -> Work:
    return Work(2 * _size(x), 0, "memory")


def _gated_residual_norm(x: Tensor, y: Tensor, *rest: Any) -> Work:
    return Work(4 * _size(x), 0, "memory")


def _modulated_layer_norm_quantize(x: Tensor, *rest: Any) -> Work:
    *_, out, out_scale, _ = rest
    return Work(_size(x, out, out_scale), 0, "memory")


def _gated_residual_norm_quantize(x: Tensor, *rest: Any) -> Work:
    *_, out, out_scale, _ = rest
    return Work(3 * _size(x) + _size(out, out_scale), 0, "memory")


def _gelu_quantize(x: Tensor, out: Tensor, out_scale: Tensor) -> Work:
    return Work(_size(x, out, out_scale), 0, "memory")


def _counter_noise(out: Tensor, *rest: Any) -> Work:
    return Work(_size(out), 0, "neither")


def _flow_step(x: Tensor, flow: Tensor, sigmas: Tensor, noise: Tensor | None) -> Work:
    return Work(2 * _size(x) + _size(flow, noise), 0, "memory")


def _rms_silu_window(x: Tensor, bias: Any, residual: Any, gamma: Any, window: Tensor, history: Any, keep: bool) -> Work:
    # The history goes to the window, and the newest frames into it.
    return Work((1 + keep) * _size(x) + _size(residual, window) + 2 * _size(history), 0, "memory")


def _frames_to_uint8(video: Tensor, out: Tensor) -> Work:
    return Work(_size(video, out), 0, "memory")


def _causal_conv(window: Tensor, weight: Tensor, bias: Any, residual: Tensor | None, out: Tensor) -> Work:
    each = weight.numel() // weight.shape[0]
    return Work(_size(window, weight, residual, out), 2 * out.numel() * each, "arithmetic")


def _causal_conv_hopper(window: Tensor, weight: Tensor, out: Tensor) -> Work:
    return Work(_size(window, weight, out), 2 * out.numel() * (weight.numel() // out.shape[-1]), "arithmetic")


def _upsample_conv(x: Tensor, weight: Tensor, bias: Any, out: Tensor) -> Work:
    each = weight.numel() // weight.shape[0] // weight.shape[1]
    return Work(_size(x, weight, out), 2 * out.numel() * each, "arithmetic")


_WORK: dict[str, Callable[..., Work]] = {
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


def work_of(op: str, args: Sequence[Any]) -> Work:
    """What one call of ``op`` with these arguments takes; :class:`ConfigError` for an op without a formula here."""
    if op not in _WORK:
        raise ConfigError(f"{op} has no formula in bench/work.py; it has {', '.join(_WORK)}")
    return _WORK[op](*args)


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
