"""Every operation of echo-rt in plain torch: the definition that kernels are held against, and the ``torch`` backend.

Knows torch, and of this package the counter-based generator (:mod:`echo_rt.ops.noise`) and the definition of float8
rows (:mod:`echo_rt.ops.float8`) alone. All arithmetic inside an
operation is float32 (angles, noise, the sampler's step and the gate's product: float64); results are rounded once, to
the dtype of the tensor that receives them. Signatures and shapes are documented on :class:`echo_rt.ops.schema.Ops`.

No operation here reads a tensor's value on the host, so a CUDA graph can capture each of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from echo_rt.ops.float8 import quantize_rows
from echo_rt.ops.noise import fill_normal

name = "torch"

# The VAE's norm divides by the vector's length, which is kept from being zero by this much.
_MIN_NORM = 1e-12


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """float32 RMSNorm over the last dimension."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def _rotate(x: Tensor, temporal: Tensor, spatial: Tensor) -> Tensor:
    """Turn adjacent channel pairs of ``x [F·S, heads, d]`` (float32) by the angles of their frame and place."""
    frames, (tokens, _, _) = temporal.shape[0], spatial.shape
    pairs = x.unflatten(0, (frames, tokens)).unflatten(-1, (-1, 2))
    split = temporal.shape[1]
    out = torch.empty_like(pairs)
    for part, table in (
        (slice(None, split), temporal[:, None, None]),
        (slice(split, None), spatial[None, :, None]),
    ):
        real, imaginary = pairs[..., part, 0], pairs[..., part, 1]
        cos, sin = table[..., 0], table[..., 1]
        out[..., part, 0] = real * cos - imaginary * sin
        out[..., part, 1] = real * sin + imaginary * cos
    return out.flatten(-2).flatten(0, 1)


def _layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return torch.nn.functional.layer_norm(x.float(), x.shape[-1:], eps=eps) * scale + shift


def _add_gated(x: Tensor, y: Tensor, gate: Tensor | None) -> None:
    update = y.float() if gate is None else y.float() * gate
    x.copy_(x.float() + update)


def _store_quantized(rows: Tensor, out: Tensor, out_scale: Tensor) -> None:
    values, scales = quantize_rows(rows)
    out.copy_(values)
    out_scale.copy_(scales)


def rope_table(frames: Tensor, inverse_frequencies: Tensor, out: Tensor) -> None:
    # A float64 angle of frame 2^31 still has 22 bits behind the point: float32 is exact after cos and sin.
    angles = frames.double()[:, None] * inverse_frequencies
    out[..., 0] = torch.cos(angles)
    out[..., 1] = torch.sin(angles)


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
    device = positions.device
    block = positions[0] + 1
    first = block * frames_per_block
    last = first + frames_per_block - 1
    shift = (last - max_temporal_id).clamp(min=0)
    memory_frame = (last - local_frames + 1).clamp(min=sink_frames) - memory_frames
    ring_slot = memory_frames + sink_frames + (first - sink_frames) % local_frames
    slot = torch.where(first < sink_frames, memory_frames + first, ring_slot)
    positions.copy_(torch.stack((block, first, shift, memory_frame, slot)))

    rope_table(first + torch.arange(frames_per_block, device=device), inverse_frequencies, temporal_block)
    anchors = torch.cat(
        (
            memory_frame + torch.arange(memory_frames, device=device),
            shift + torch.arange(sink_frames, device=device),
        )
    )
    rope_table(anchors, inverse_frequencies, temporal_anchor)
    tokens = write_index.shape[0]
    torch.add(
        torch.arange(tokens, device=device),
        slot * (tokens // frames_per_block),
        out=write_index,
    )


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
    heads, head_dim = k_cache.shape[-2:]
    q, k, v = qkv.chunk(3, dim=-1)
    q = _rms_norm(q, norm_q, eps).unflatten(-1, (heads, head_dim))
    k = _rms_norm(k, norm_k, eps).unflatten(-1, (heads, head_dim))
    v = v.unflatten(-1, (heads, head_dim))
    kept = slice(qkv.shape[0] - write_index.shape[0], None)
    k_cache.index_copy_(0, write_index, _rotate(k, temporal, spatial)[kept].to(k_cache.dtype))
    v_cache.index_copy_(0, write_index, v[kept])
    if raw_k is not None:
        raw_k.index_copy_(0, write_index - raw_offset, k[kept].to(raw_k.dtype))
    return _rotate(q, temporal, spatial).to(qkv.dtype)


def merge_attention(outputs: Tensor, logsumexps: Tensor) -> Tensor:
    weights = logsumexps.softmax(0).transpose(1, 2).unsqueeze(-1)
    return (weights * outputs.float()).sum(0).flatten(1).to(outputs.dtype)


def reanchor(
    kv: Tensor,
    temporal_anchor: Tensor,
    spatial: Tensor,
    sink_k: Tensor | None,
    memory_k: Tensor | None,
    memory_v: Tensor | None,
    memory_tokens: int,
) -> None:
    memory_frames = memory_tokens // spatial.shape[0]
    if sink_k is not None:
        sink_end = memory_tokens + sink_k.shape[1]
        for layer, keys in enumerate(sink_k):
            turned = _rotate(keys.float(), temporal_anchor[memory_frames:], spatial)
            kv[layer, 0, memory_tokens:sink_end] = turned.to(kv.dtype)
    if memory_k is not None:
        turned = _rotate(memory_k.float(), temporal_anchor[:memory_frames], spatial)
        kv[:, 0, :memory_tokens] = turned.to(kv.dtype)
    if memory_v is not None:
        kv[:, 1, :memory_tokens] = memory_v


def memory_attention(q: Tensor, norm_q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    heads, head_dim = k.shape[-2:]
    normed = _rms_norm(q, norm_q, eps).unflatten(-1, (heads, head_dim))
    normed, k, v = (t.float().transpose(0, 1).unsqueeze(0) for t in (normed, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(normed, k, v)
    return out[0].transpose(0, 1).flatten(-2).to(q.dtype)


def gated_update(
    old: Tensor,
    candidate: Tensor,
    norm: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    out: Tensor,
    eps: float,
) -> None:
    dim = old.shape[-1]
    normed = _rms_norm(candidate, norm, eps)
    # float64: on a GPU a process can have its float32 products rounded to TF32, in a model of 16 bits too.
    kept, taken = gate_weight.double().split(dim, dim=-1)
    gate = torch.sigmoid(old.double() @ kept.T + normed.double() @ taken.T + gate_bias.double()).float()
    out.copy_(gate * old.float() + (1 - gate) * normed)


def modulated_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return _layer_norm(x, shift, scale, eps).to(x.dtype)


def gated_residual_norm(x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    _add_gated(x, y, gate)
    return _layer_norm(x, shift, scale, eps).to(x.dtype)


def modulated_layer_norm_quantize(
    x: Tensor, shift: Tensor, scale: Tensor, out: Tensor, out_scale: Tensor, eps: float
) -> None:
    _store_quantized(_layer_norm(x, shift, scale, eps), out, out_scale)


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
    _add_gated(x, y, gate)
    _store_quantized(_layer_norm(x, shift, scale, eps), out, out_scale)


def gelu_quantize(x: Tensor, out: Tensor, out_scale: Tensor) -> None:
    _store_quantized(torch.nn.functional.gelu(x.float(), approximate="tanh"), out, out_scale)


def counter_noise(out: Tensor, positions: Tensor, seed: Tensor, step: int) -> None:
    fill_normal(out, positions[0], step, (seed[0], seed[1]))


def flow_step(x: Tensor, flow: Tensor, sigmas: Tensor, noise: Tensor | None) -> None:
    sigma, next_sigma = sigmas.double()
    denoised = x.double() - sigma * flow.double()
    x.copy_(denoised if noise is None else (1 - next_sigma) * denoised + next_sigma * noise.double())


def rms_silu_window(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gamma: Tensor,
    window: Tensor,
    history: Tensor | None,
    keep: bool,
) -> None:
    total = x.float()
    for term in (bias, residual):
        total = total if term is None else total + term
    rounded = total.to(x.dtype)
    if keep:
        x.copy_(rounded)
    total = rounded.float()
    length = total.norm(dim=-1, keepdim=True).clamp(min=_MIN_NORM)
    normed = total / length * (math.sqrt(x.shape[-1]) * gamma.float())
    frames, past = len(x), len(window) - len(x)
    window[past:] = torch.nn.functional.silu(normed)
    if history is not None:
        window[:past] = history
        history.copy_(window[frames:])


def frames_to_uint8(video: Tensor, out: Tensor) -> None:
    out.copy_(((video.float().clamp(-1, 1) + 1) * 127.5).round())


def causal_conv(window: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> None:
    video = window.float().permute(3, 0, 1, 2)
    around = (0, weight.shape[3] // 2, weight.shape[4] // 2)
    summed = torch.nn.functional.conv3d(video, weight.float(), bias, padding=around).permute(1, 2, 3, 0)
    out.copy_(summed if residual is None else summed + residual.float())


def causal_conv_hopper(window: Tensor, weight: Tensor, out: Tensor) -> None:
    kernel = weight.permute(0, 5, 2, 4, 6, 1, 3).flatten(2, 4).flatten(0, 1).unflatten(-1, (3, 3))
    causal_conv(window, kernel, None, None, out)


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    frames = x.float().permute(0, 3, 1, 2)
    for phase, kernel in enumerate(weight.float().permute(0, 1, 4, 2, 3)):
        row, column = divmod(phase, 2)
        padded = torch.nn.functional.pad(frames, (1 - column, column, 1 - row, row))
        pixels = torch.nn.functional.conv2d(padded, kernel, bias)
        out[:, row::2, column::2] = pixels.permute(0, 2, 3, 1)
