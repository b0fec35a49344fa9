"""The best that libraries have for each operation, on the same arguments: what a hand-written kernel stands against.

A call takes an operation's arguments and returns its result, or None where that is written in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from echo_rt.ops import reference

# The argument that an operation writes, where it returns nothing and none is called ``out``.
_WRITTEN = {"advance": "write_index", "reanchor": "kv", "flow_step": "x", "rms_silu_window": "window"}
# Operations whose definition torch.compile makes one or two kernels of.
_COMPILED = (
    "qkv_norm_rope_store", "merge_attention", "gated_update", "modulated_layer_norm", "gated_residual_norm",
    "modulated_layer_norm_quantize", "gated_residual_norm_quantize", "gelu_quantize", "counter_noise", "flow_step",
    "rms_silu_window", "frames_to_uint8",
)  # fmt: skip


Call = Callable[[Sequence[Any]], "Tensor | None"]


def result_of(op: str, returned: Any, args: Sequence[Any]) -> Tensor:
    """The result of a call: what it returned, or the argument that it wrote."""
    if isinstance(returned, Tensor):
        return returned
    written: Tensor = args[[*signature(getattr(reference, op)).parameters].index(_WRITTEN.get(op, "out"))]
    return written


def library_calls(op: str, args: Sequence[Any], device: torch.device, compiled: bool) -> dict[str, Call]:
    """What to try, by name; any of them may raise. ``compiled``: torch.compile too, which takes seconds each."""
    calls = dict(_CALLS.get(op, {}))
    if op == "memory_attention":
        names = ("FLASH", "CUDNN", "EFFICIENT") if device.type == "cuda" else ("FLASH", "MATH")
        for name in names:
            backend = getattr(SDPBackend, name if name == "MATH" else f"{name}_ATTENTION")
            calls[f"rms_norm, SDPA {name.lower()}"] = partial(_attention, backend)
    elif op == "causal_conv_hopper":
        weight = _untiled(args[1]).contiguous(memory_format=torch.channels_last_3d)
        calls[_CONV3D] = lambda args: _conv3d((args[0], weight, None, None, args[2]))
    if compiled and op in _COMPILED:
        # Without the reset a second shape would make it compile for any shape, which is slower.
        torch._dynamo.reset()
        faster: Callable[..., Any] = torch.compile(getattr(reference, op), dynamic=False)
        calls["torch.compile"] = lambda args: faster(*args)
    return calls


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return functional.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)


def _attention(backend: SDPBackend, args: Sequence[Any]) -> Tensor:
    q, norm, k, v, eps = args
    normed = _rms_norm(q, norm, eps).unflatten(-1, k.shape[-2:])
    with sdpa_kernel(backend):
        out = functional.scaled_dot_product_attention(*(t.transpose(0, 1).unsqueeze(0) for t in (normed, k, v)))
    return out[0].transpose(0, 1).flatten(-2)


def _gate(args: Sequence[Any]) -> Tensor:
    old, candidate, norm, weight, bias, _, eps = args
    kept, taken = weight.split(old.shape[-1], dim=-1)
    new = _rms_norm(candidate, norm, eps)
    gate = functional.linear(old, kept, bias).addmm_(new, taken.T).sigmoid_()
    return torch.lerp(new, old, gate)


def _modulated(args: Sequence[Any]) -> Tensor:
    x, shift, scale, eps = args
    return functional.layer_norm(x, x.shape[-1:], scale.to(x.dtype), shift.to(x.dtype), eps)


def _residual(args: Sequence[Any]) -> Tensor:
    x, y, gate, shift, scale, eps = args
    x.add_(y) if gate is None else x.addcmul_(y, gate.to(x.dtype))
    return _modulated((x, shift, scale, eps))


def _window(args: Sequence[Any]) -> None:
    x, bias, residual, gamma, window, history, keep = args
    frames, past = x.shape[0], window.shape[0] - x.shape[0]
    bias = bias.to(x.dtype)
    x = x.add_(bias) if keep else x + bias
    x = x if residual is None else x.add_(residual)
    normed = functional.rms_norm(x, x.shape[-1:], gamma.to(x.dtype))
    window[:past].copy_(history)
    torch.ops.aten.silu.out(normed, out=window[past:])
    history.copy_(window[frames:])


def _conv3d(args: Sequence[Any]) -> Tensor:
    """With the fastest algorithm that cuDNN finds: it searches at the first call of a shape."""
    window, weight, bias, residual, _ = args
    video, around = window.permute(3, 0, 1, 2).unsqueeze(0), (0, weight.shape[3] // 2, weight.shape[4] // 2)
    bias = None if bias is None else bias.to(window.dtype)
    cudnn = torch.backends.cudnn
    before, cudnn.benchmark = cudnn.benchmark, True
    try:
        out = functional.conv3d(video, weight, bias, 1, around).squeeze(0).permute(1, 2, 3, 0)
    finally:
        cudnn.benchmark = before
    return out if residual is None else out.add_(residual)


def _untiled(weight: Tensor) -> Tensor:
    """Invert :func:`echo_rt.convolution.backends.tiled`."""
    kernel: Tensor = weight.permute(0, 5, 2, 4, 6, 1, 3).flatten(2, 4).flatten(0, 1).unflatten(-1, (3, 3))
    return kernel


_CONV3D = "conv3d, channels-last"
_CALLS: dict[str, dict[str, Call]] = {
    "gated_update": {"rms_norm, linear, addmm, sigmoid, lerp": _gate},
    "modulated_layer_norm": {"layer_norm": _modulated},
    "gated_residual_norm": {"addcmul, layer_norm": _residual},
    "causal_conv": {_CONV3D: _conv3d},
    "rms_silu_window": {"add, rms_norm, silu, copy": _window},
}
