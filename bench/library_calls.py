"""The best that libraries have for each operation, on the same arguments: what a hand-written kernel stands against.

A call takes an operation's arguments and returns its result, or None where that is written in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from echo_rt.ops import reference

# Which argument holds the result of an operation that returns nothing.
_WRITTEN = {
    "rope_table": 2,
    "advance": 9,
    "reanchor": 0,
    "gated_update": 5,
    "modulated_layer_norm_quantize": 3,
    "gated_residual_norm_quantize": 5,
    "gelu_quantize": 1,
    "counter_noise": 0,
    "flow_step": 0,
    "rms_silu_window": 4,
    "frames_to_uint8": 1,
    "causal_conv": 4,
    "causal_conv_hopper": 2,
    "upsample_conv": 3,
}
# Operations whose definition torch.compile makes one or two kernels of.
_COMPILED = (
    "qkv_norm_rope_store", "merge_attention", "gated_update", "modulated_layer_norm", "gated_residual_norm",
    "modulated_layer_norm_quantize", "gated_residual_norm_quantize", "gelu_quantize", "counter_noise", "flow_step",
    "rms_silu_window", "frames_to_uint8",
)  # fmt: skip


@dataclass(frozen=True)
class LibraryCall:
    """One way of doing an operation with a library."""

    name: str
    call: Callable[[Sequence[Any]], Tensor | None]


def result_of(op: str, returned: Any, args: Sequence[Any]) -> Tensor:
    """The result of a call: what it returned, or the argument that it wrote."""
    result = returned if isinstance(returned, Tensor) else args[_WRITTEN[op]]
    assert isinstance(result, Tensor)
    return result


def library_calls(op: str, args: Sequence[Any], device: torch.device, compiled: bool) -> list[LibraryCall]:
    """What to try; any of them may raise. ``compiled``: torch.compile too, which takes seconds each."""
    calls = _CALLS.get(op, lambda args, device: [])(args, device)
    if compiled and op in _COMPILED:
        calls.append(_compiled("torch.compile", getattr(reference, op)))
    return calls


def _compiled(name: str, function: Callable[..., Any]) -> LibraryCall:
    # Without the reset a second shape would make it compile for any shape, which is slower.
    torch._dynamo.reset()
    faster = torch.compile(function, dynamic=False)
    return LibraryCall(name, lambda args: faster(*args))


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return functional.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)


def _attention(backend: SDPBackend) -> Callable[[Sequence[Any]], Tensor]:
    def call(args: Sequence[Any]) -> Tensor:
        q, norm, k, v, eps = args
        normed = _rms_norm(q, norm, eps).unflatten(-1, k.shape[-2:])
        parts = (t.transpose(0, 1).unsqueeze(0) for t in (normed, k, v))
        with sdpa_kernel(backend):
            out = functional.scaled_dot_product_attention(*parts)
        return out[0].transpose(0, 1).flatten(-2)

    return call


def _attentions(args: Sequence[Any], device: torch.device) -> list[LibraryCall]:
    names = ("FLASH", "CUDNN", "EFFICIENT") if device.type == "cuda" else ("FLASH", "MATH")
    backends = {name.lower(): getattr(SDPBackend, name if name == "MATH" else f"{name}_ATTENTION") for name in names}
    return [LibraryCall(f"rms_norm, SDPA {name}", _attention(backend)) for name, backend in backends.items()]


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


def _searched(convolve: Callable[..., Tensor], *args: Any) -> Tensor:
    """With the fastest algorithm that cuDNN finds: it searches at the first call of a shape."""
    cudnn = torch.backends.cudnn
    before, cudnn.benchmark = cudnn.benchmark, True
    try:
        return convolve(*args)
    finally:
        cudnn.benchmark = before


def _conv3d(args: Sequence[Any]) -> Tensor:
    window, weight, bias, residual, _ = args
    video, around = window.permute(3, 0, 1, 2).unsqueeze(0), (0, weight.shape[3] // 2, weight.shape[4] // 2)
    bias = None if bias is None else bias.to(window.dtype)
    out = _searched(functional.conv3d, video, weight, bias, 1, around).squeeze(0).permute(1, 2, 3, 0)
    return out if residual is None else out.add_(residual)


def _untiled(weight: Tensor) -> Tensor:
    """Invert :func:`echo_rt.convolution.backends.tiled`."""
    kernel: Tensor = weight.permute(0, 5, 2, 4, 6, 1, 3).flatten(2, 4).flatten(0, 1).unflatten(-1, (3, 3))
    return kernel


def _conv3d_of_tiles(args: Sequence[Any], device: torch.device) -> list[LibraryCall]:
    """The same with the weight as it was before it was cut."""
    weight = _untiled(args[1]).contiguous(memory_format=torch.channels_last_3d)

    def call(args: Sequence[Any]) -> Tensor:
        window, _, out = args
        return _conv3d((window, weight, None, None, out))

    return [LibraryCall("conv3d, channels-last", call)]


def _single(name: str, call: Callable[[Sequence[Any]], Any]) -> Callable[..., list[LibraryCall]]:
    return lambda args, device: [LibraryCall(name, call)]


_CALLS: dict[str, Callable[[Sequence[Any], torch.device], list[LibraryCall]]] = {
    "memory_attention": _attentions,
    "gated_update": _single("rms_norm, linear, addmm, sigmoid, lerp", _gate),
    "modulated_layer_norm": _single("layer_norm", _modulated),
    "gated_residual_norm": _single("addcmul, layer_norm", _residual),
    "causal_conv": _single("conv3d, channels-last", _conv3d),
    "causal_conv_hopper": _conv3d_of_tiles,
    "rms_silu_window": _single("add, rms_norm, silu, copy", _window),
}
