"""Every operation of echo-rt in plain torch: its signature, its definition, and the ``torch`` backend.

Kernels are held against these definitions. All arithmetic inside an operation is float32 (angles, noise, the sampler's
step and the gate's product: float64); results are rounded once, to the dtype of the tensor that receives them. Only
tensors marked (written) are changed, in place. No operation reads a tensor's value on the host, so a CUDA graph can
capture each of them.

Letters: ``F`` frames, ``S`` tokens per frame, ``n`` = F·S tokens, ``H`` heads, ``d`` head size, ``dim`` = H·d, ``L``
layers, ``M`` memory tokens, ``ct`` and ``cs`` rotary pairs of time and of rows and columns (ct + cs = d/2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from echo_rt.ops.float8 import copy_rows, quantize_rows, rounded
from echo_rt.ops.noise import fill_normal

name = "torch"


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
    for part, table in ((slice(None, split), temporal[:, None, None]), (slice(split, None), spatial[None, :, None])):
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
    """Write cosine and sine of float64 ``frames [F] · inverse_frequencies [c]`` to ``out [F, c, 2]`` (written)."""
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
    """Advance the device-side position to the next block; the host never reads it back.

    ``positions`` int64 [5] (written): block, its first frame, shift, the absolute frame whose angle the first
    memory frame takes, and the block's first slot in the KV buffer (memory | sink | ring, counted in frames).
    ``temporal_block [frames_per_block, ct, 2]``, ``temporal_anchor [memory_frames + sink_frames, ct, 2]``
    (written): angles of the block's frames, and of the memory and sink where the shift puts them.
    ``write_index`` int64 [tokens of a block] (written): the KV rows that the block occupies.
    """
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
        (memory_frame + torch.arange(memory_frames, device=device), shift + torch.arange(sink_frames, device=device))
    )
    rope_table(anchors, inverse_frequencies, temporal_anchor)
    tokens = write_index.shape[0]
    torch.add(torch.arange(tokens, device=device), slot * (tokens // frames_per_block), out=write_index)


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
    """RMSNorm of q and k over the whole width, 3-D rotation, store of k and v; returns q ``[n, H, d]``.

    ``qkv [n, 3·dim]``; ``norm_q``, ``norm_k`` float32 [dim]; ``temporal [F, ct, 2]``, ``spatial [S, cs, 2]``.
    The last ``m`` tokens go to rows ``write_index [m]`` of ``k_cache``, ``v_cache [rows, H, d]`` (written), and
    their keys before rotation to rows ``write_index - raw_offset`` of ``raw_k`` (written) where it is given. The
    cache has the dtype of ``qkv`` or e4m3fn (:func:`echo_rt.ops.float8.rounded`), and so have the queries.
    """
    heads, head_dim = k_cache.shape[-2:]
    q, k, v = qkv.chunk(3, dim=-1)
    q = _rms_norm(q, norm_q, eps).unflatten(-1, (heads, head_dim))
    k = _rms_norm(k, norm_k, eps).unflatten(-1, (heads, head_dim))
    v = v.unflatten(-1, (heads, head_dim))
    kept = slice(qkv.shape[0] - write_index.shape[0], None)
    copy_rows(k_cache, write_index, _rotate(k, temporal, spatial)[kept])
    copy_rows(v_cache, write_index, v[kept].float())
    if raw_k is not None:
        raw_k.index_copy_(0, write_index - raw_offset, k[kept].to(raw_k.dtype))
    return rounded(_rotate(q, temporal, spatial), k_cache.dtype)


def merge_attention(outputs: Tensor, logsumexps: Tensor) -> Tensor:
    """Merge attention over two, three or four pieces of the keys into attention over all; returns ``[n, H·d]``.

    ``outputs [pieces, n, H, d]``; ``logsumexps`` float32 ``[pieces, H, n]``: natural logarithm of the sum of the
    exponentials of the scaled scores. A piece's weight is its share of the whole sum.
    """
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
    """Rotate sink and memory keys from their unrotated copies into ``kv [L, 2, rows, H, d]`` (written).

    ``sink_k [L, sink tokens, H, d]``; ``memory_k``, ``memory_v [M, H, d]`` are shared by all layers. Rows whose
    source is None keep their values. ``kv`` has the dtype of its sources or e4m3fn.
    """
    memory_frames = memory_tokens // spatial.shape[0]
    if sink_k is not None:
        sink_end = memory_tokens + sink_k.shape[1]
        for layer, keys in enumerate(sink_k):
            turned = _rotate(keys.float(), temporal_anchor[memory_frames:], spatial)
            kv[layer, 0, memory_tokens:sink_end] = rounded(turned, kv.dtype)
    if memory_k is not None:
        turned = _rotate(memory_k.float(), temporal_anchor[:memory_frames], spatial)
        kv[:, 0, :memory_tokens] = rounded(turned, kv.dtype)
    if memory_v is not None:
        kv[:, 1, :memory_tokens] = rounded(memory_v.float(), kv.dtype)


def memory_attention(q: Tensor, norm_q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """Attention of ``RMSNorm(q [M, dim])`` over ``k``, ``v [any, H, d]``, no mask, no rotation; ``[M, dim]``."""
    heads, head_dim = k.shape[-2:]
    normed = _rms_norm(q, norm_q, eps).unflatten(-1, (heads, head_dim))
    normed, k, v = (t.float().transpose(0, 1).unsqueeze(0) for t in (normed, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(normed, k, v)
    return out[0].transpose(0, 1).flatten(-2).to(q.dtype)


def gated_update(
    old: Tensor, candidate: Tensor, norm: Tensor, gate_weight: Tensor, gate_bias: Tensor, out: Tensor, eps: float
) -> None:
    """``c = RMSNorm(candidate)``, ``g = sigmoid([old; c] @ gate_weight.T + gate_bias)``, ``out = g·old + (1-g)·c``.

    ``old``, ``candidate``, ``out`` (written) ``[M, dim]``; ``gate_weight [dim, 2·dim]``.
    """
    dim = old.shape[-1]
    normed = _rms_norm(candidate, norm, eps)
    # float64: on a GPU a process can have its float32 products rounded to TF32, in a model of 16 bits too.
    kept, taken = gate_weight.double().split(dim, dim=-1)
    gate = torch.sigmoid(old.double() @ kept.T + normed.double() @ taken.T + gate_bias.double()).float()
    out.copy_(gate * old.float() + (1 - gate) * normed)


def modulated_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """``LayerNorm(x [n, dim]) · scale + shift``, float32 ``scale``, ``shift [dim]`` (the 1+ is in the scale)."""
    return _layer_norm(x, shift, scale, eps).to(x.dtype)


def gated_residual_norm(x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """``x += gate · y`` (written; no gate: 1), then returns ``LayerNorm(x) · scale + shift [n, dim]``."""
    _add_gated(x, y, gate)
    return _layer_norm(x, shift, scale, eps).to(x.dtype)


def modulated_layer_norm_quantize(
    x: Tensor, shift: Tensor, scale: Tensor, out: Tensor, out_scale: Tensor, eps: float
) -> None:
    """:func:`modulated_layer_norm` as float8: ``out`` e4m3fn ``[n, dim]``, ``out_scale`` float32 [n] (written).

    A row's scale is its largest magnitude / 448, and ``out · out_scale`` its value: see :mod:`echo_rt.ops.float8`.
    """
    _store_quantized(_layer_norm(x, shift, scale, eps), out, out_scale)


def gated_residual_norm_quantize(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, out: Tensor, out_scale: Tensor, eps: float
) -> None:
    """:func:`gated_residual_norm` as float8: ``x [n, dim]``, ``out`` e4m3fn, ``out_scale`` [n] (written)."""
    _add_gated(x, y, gate)
    _store_quantized(_layer_norm(x, shift, scale, eps), out, out_scale)


def gelu_quantize(x: Tensor, out: Tensor, out_scale: Tensor) -> None:
    """``GELU(x [n, any])`` by its tanh formula, as float8: ``out`` e4m3fn, ``out_scale`` float32 [n] (written)."""
    _store_quantized(torch.nn.functional.gelu(x.float(), approximate="tanh"), out, out_scale)


def counter_noise(out: Tensor, positions: Tensor, seed: Tensor, step: int) -> None:
    """Draw standard normal noise of denoising step ``step`` of the block in ``positions`` into ``out`` (written).

    ``out`` float32, contiguous, of any shape; ``positions`` int64 [5] as :func:`advance` writes it; ``seed`` int64
    [2], its low and high 32 bits. The noise depends only on these: see :mod:`echo_rt.ops.noise`.
    """
    fill_normal(out, positions[0], step, (seed[0], seed[1]))


def flow_step(x: Tensor, flow: Tensor, sigmas: Tensor, noise: Tensor | None) -> None:
    """``x0 = x - sigma·flow``; x (written) becomes x0, or ``(1-sigma')·x0 + sigma'·noise`` where noise is given.

    ``x``, ``noise`` float32 and ``flow`` of one shape; ``sigmas`` float64 [2]: sigma of this step and of the next.
    """
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
    """Write ``silu(v / max(‖v‖, 1e-12) · sqrt(C) · gamma)`` of ``v = x + bias + residual`` after a window's past.

    ``x [T, h, w, C]`` (written: becomes v, where ``keep``), ``residual`` alike; ``bias``, ``gamma`` float32 [C];
    ``window [past + T, h, w, C]`` (written). A ``history [past, h, w, C]`` (written) is copied to the window's
    past and then takes the window's last ``past`` frames; without one, the window's past keeps its values.
    """
    total = x.float()
    for term in (bias, residual):
        total = total if term is None else total + term
    rounded = total.to(x.dtype)
    if keep:
        x.copy_(rounded)
    total = rounded.float()
    normed = torch.nn.functional.normalize(total, dim=-1) * (math.sqrt(x.shape[-1]) * gamma.float())
    frames, past = len(x), len(window) - len(x)
    window[past:] = torch.nn.functional.silu(normed)
    if history is not None:
        window[:past] = history
        history.copy_(window[frames:])


def frames_to_uint8(video: Tensor, out: Tensor) -> None:
    """Map ``video [F, h, w, 3]`` in [-1, 1], clamped, to 0..255, rounded to nearest: uint8 ``out`` (written)."""
    for frame, pixels in zip(video, out, strict=True):  # one after the other they stay in a CPU's caches
        pixels.copy_(frame.float().clamp(-1, 1).add_(1).mul_(127.5).round_())


def causal_conv(window: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> None:
    """Write ``bias + residual`` + the convolution of ``window`` into ``out [T, h, w, Co]`` (written).

    ``window [kT - 1 + T, h, w, C]``, past frames first, padded with zeros in space. ``weight [Co, C, kT, k, k]`` in
    torch.channels_last_3d memory, k = 1 or 3. ``bias`` float32 [Co]. ``residual`` has the shape of ``out`` and may
    be the same tensor. The stride between frames of the three may be larger than a frame.
    """
    video = window.float().permute(3, 0, 1, 2)
    around = (0, weight.shape[3] // 2, weight.shape[4] // 2)
    summed = torch.nn.functional.conv3d(video, weight.float(), bias, padding=around).permute(1, 2, 3, 0)
    out.copy_(summed if residual is None else summed + residual.float())


def causal_conv_hopper(window: Tensor, weight: Tensor, out: Tensor) -> None:
    """:func:`causal_conv` of 3x3 pixels without bias and residual, with Hopper's matrix instructions.

    ``weight [Co / 96, kT, C / 32, 9, 4, 96, 8]``: see :mod:`echo_rt.convolution.backends`. ``out [T, h, w, Co]``
    (written).
    """
    kernel = weight.permute(0, 5, 2, 4, 6, 1, 3).flatten(2, 4).flatten(0, 1).unflatten(-1, (3, 3))
    causal_conv(window, kernel, None, None, out)


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write a 3x3 convolution of ``x [T, h, w, C]``, upsampled by 2, into ``out [T, 2h, 2w, Co]`` (written).

    Upsampled to the nearest pixel. ``weight [4, Co, 2, 2, C]``, see :mod:`echo_rt.convolution.torch_conv`; ``bias``
    float32 [Co]. Pixel (2y + a, 2x + b) is the bias + the sum over i and j of ``weight[2a + b, :, i, j] @
    x[t, y + a - 1 + i, x + b - 1 + j]``, with zeros around ``x``. The stride between frames of both
    may be larger than a frame.
    """
    frames = x.float().permute(0, 3, 1, 2)
    for phase, kernel in enumerate(weight.float().permute(0, 1, 4, 2, 3)):
        row, column = divmod(phase, 2)
        padded = torch.nn.functional.pad(frames, (1 - column, column, 1 - row, row))
        pixels = torch.nn.functional.conv2d(padded, kernel, bias)
        out[:, row::2, column::2] = pixels.permute(0, 2, 3, 1)
