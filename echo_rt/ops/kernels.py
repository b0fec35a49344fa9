"""The hand-written kernels as a backend: ``cuda`` on a GPU, ``emulated`` where the same sources run on the host.

Importing this module loads ``echo_rt._ops``, which registers ``torch.ops.echo_rt.*`` (schemas: ``bindings/ops.cpp``).
The fake kernels below tell ``torch.compile`` and ``torch.export`` what comes out of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from echo_rt import _ops
from echo_rt.errors import BackendError

# What a warp's tensor-core tiles are cut for.
HEAD_SIZES = (64, 128)

_library = torch.ops.echo_rt


class Kernels:
    """The functions of :class:`echo_rt.ops.schema.Ops`; their device is settled when the package is built."""

    name: str = _ops.BACKEND

    @staticmethod
    def rope_table(frames: Tensor, inverse_frequencies: Tensor, out: Tensor) -> None:
        _library.rope_table(frames, inverse_frequencies, out)

    @staticmethod
    def advance(
        positions: Tensor,
        frames_per_block: int,
        sink_frames: int,
        local_frames: int,
        memory_frames: int,
        max_temporal_id: int,
        inverse_frequencies: Tensor,
        temporal_block: Tensor,
        temporal_anchor: Tensor,
        write_index: Tensor,
    ) -> None:
        _library.advance(
            positions,
            frames_per_block,
            sink_frames,
            local_frames,
            memory_frames,
            max_temporal_id,
            inverse_frequencies,
            temporal_block,
            temporal_anchor,
            write_index,
        )

    @staticmethod
    def qkv_norm_rope_store(
        qkv: Tensor,
        norm_q: Tensor,
        norm_k: Tensor,
        temporal: Tensor,
        spatial: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        write_index: Tensor,
        raw_k: Tensor | None,
        raw_offset: int,
        eps: float,
    ) -> Tensor:
        q: Tensor = _library.qkv_norm_rope_store(
            qkv, norm_q, norm_k, temporal, spatial, k_cache, v_cache, write_index, raw_k, raw_offset, eps
        )
        return q

    @staticmethod
    def merge_attention(outputs: Tensor, logsumexps: Tensor) -> Tensor:
        out: Tensor = _library.merge_attention(outputs, logsumexps)
        return out

    @staticmethod
    def reanchor(
        kv: Tensor,
        temporal_anchor: Tensor,
        spatial: Tensor,
        sink_k: Tensor | None,
        memory_k: Tensor | None,
        memory_v: Tensor | None,
        memory_tokens: int,
    ) -> None:
        _library.reanchor(kv, temporal_anchor, spatial, sink_k, memory_k, memory_v, memory_tokens)

    @staticmethod
    def memory_attention(q: Tensor, norm_q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
        _needs_tensor_cores("memory_attention", q)
        if k.shape[-1] not in HEAD_SIZES:
            sizes = " or ".join(map(str, HEAD_SIZES))
            raise BackendError(f"backend {_ops.BACKEND!r}: memory_attention needs head size {sizes}, got {k.shape[-1]}")
        out: Tensor = _library.memory_attention(q, norm_q, k, v, eps)
        return out

    @staticmethod
    def gated_update(
        old: Tensor,
        candidate: Tensor,
        norm: Tensor,
        gate_weight: Tensor,
        gate_bias: Tensor,
        out: Tensor,
        eps: float,
    ) -> None:
        _needs_tensor_cores("gated_update", old)
        _library.gated_update(old, candidate, norm, gate_weight, gate_bias, out, eps)

    @staticmethod
    def modulated_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        out: Tensor = _library.modulated_layer_norm(x, shift, scale, eps)
        return out

    @staticmethod
    def gated_residual_norm(
        x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
    ) -> Tensor:
        out: Tensor = _library.gated_residual_norm(x, y, gate, shift, scale, eps)
        return out

    @staticmethod
    def modulated_layer_norm_quantize(
        x: Tensor, shift: Tensor, scale: Tensor, out: Tensor, out_scale: Tensor, eps: float
    ) -> None:
        _library.modulated_layer_norm_quantize(x, shift, scale, out, out_scale, eps)

    @staticmethod
    def gated_residual_norm_quantize(
        x: Tensor,
        y: Tensor,
        gate: Tensor | None,
        shift: Tensor,
        scale: Tensor,
        out: Tensor,
        out_scale: Tensor,
        eps: float,
    ) -> None:
        _library.gated_residual_norm_quantize(x, y, gate, shift, scale, out, out_scale, eps)

    @staticmethod
    def gelu_quantize(x: Tensor, out: Tensor, out_scale: Tensor) -> None:
        _library.gelu_quantize(x, out, out_scale)

    @staticmethod
    def counter_noise(out: Tensor, positions: Tensor, seed: Tensor, step: int) -> None:
        _library.counter_noise(out, positions, seed, step)

    @staticmethod
    def flow_step(x: Tensor, flow: Tensor, sigmas: Tensor, noise: Tensor | None) -> None:
        _library.flow_step(x, flow, sigmas, noise)

    @staticmethod
    def rms_silu_window(
        x: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        gamma: Tensor,
        window: Tensor,
        history: Tensor | None,
        keep: bool,
    ) -> None:
        _library.rms_silu_window(x, bias, residual, gamma, window, history, keep)

    @staticmethod
    def frames_to_uint8(video: Tensor, out: Tensor) -> None:
        _library.frames_to_uint8(video, out)

    @staticmethod
    def causal_conv(window: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> None:
        _needs_tensor_cores("causal_conv", window, "torch's own convolution")
        _library.causal_conv(window, weight, bias, residual, out)

    @staticmethod
    def causal_conv_hopper(window: Tensor, weight: Tensor, out: Tensor) -> None:
        _needs_tensor_cores("causal_conv_hopper", window, "torch's own convolution")
        _library.causal_conv_hopper(window, weight, out)

    @staticmethod
    def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        _needs_tensor_cores("upsample_conv", x, "torch's own convolution")
        _library.upsample_conv(x, weight, bias, out)


def _needs_tensor_cores(op: str, tensor: Tensor, instead: str = "memory off") -> None:
    if tensor.dtype == torch.float32:
        raise BackendError(
            f"backend {_ops.BACKEND!r}: {op} must be given bfloat16 or float16, got float32; "
            f"choose such a dtype, {instead}, or the torch backend"
        )


# ---- fake kernels: the shape of what is returned; what is written in place keeps its own


def _fake_nothing(*arguments: Tensor | float | None) -> None:
    """All the effect is in the arguments that the schema marks as written."""


def _fake_like_first(first: Tensor, *rest: Tensor | float | None) -> Tensor:
    return first.new_empty(first.shape)  # contiguous, whatever the strides of the rows that came


def _fake_queries(*arguments: Tensor | float | None) -> Tensor:
    qkv, k_cache = arguments[0], arguments[5]
    assert isinstance(qkv, Tensor) and isinstance(k_cache, Tensor)
    return qkv.new_empty(qkv.shape[0], *k_cache.shape[1:])


def _fake_merged(outputs: Tensor, logsumexps: Tensor) -> Tensor:
    _, tokens, heads, head_dim = outputs.shape
    return outputs.new_empty(tokens, heads * head_dim)


for _name in (
    "rope_table",
    "advance",
    "reanchor",
    "gated_update",
    "modulated_layer_norm_quantize",
    "gated_residual_norm_quantize",
    "gelu_quantize",
    "counter_noise",
    "flow_step",
    "rms_silu_window",
    "frames_to_uint8",
    "causal_conv",
    "causal_conv_hopper",
    "upsample_conv",
):
    torch.library.register_fake(f"echo_rt::{_name}", _fake_nothing)
for _name in ("memory_attention", "modulated_layer_norm", "gated_residual_norm"):
    torch.library.register_fake(f"echo_rt::{_name}", _fake_like_first)
torch.library.register_fake("echo_rt::qkv_norm_rope_store", _fake_queries)
torch.library.register_fake("echo_rt::merge_attention", _fake_merged)
