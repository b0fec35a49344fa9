"""torch's operators on the virtual GPU: each is computed by its CPU counterpart, in its turn in the stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from virtual_gpu.device import alias
from virtual_gpu.stand_ins import STAND_INS
from virtual_gpu.submission import held, submit, tensors_of

# Overridden operators last as long as these.
_libraries: dict[str, torch.library.Library] = {}

# Kernels of torch that launch nothing: they make or describe tensors, or call the runtime, which is the virtual one.
_TORCHS_OWN = {
    "aten::_fused_sdp_choice",
    "aten::_local_scalar_dense",
    "aten::_pin_memory",
    "aten::empty.memory_format",
    "aten::empty_strided",
    "aten::is_pinned",
    "aten::record_stream",
    "aten::resize_",
    "aten::set_",
    "aten::set_.source_Storage",
    "aten::set_.source_Storage_storage_offset",
    "aten::set_.source_Tensor",
}

# How many values come out is only known when they are: on a GPU these wait for the device.
_WAITING = {
    "_unique",
    "_unique2",
    "bincount",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
}


def _shapeless(value: Any) -> Any:
    """An argument for computing shapes alone."""
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, torch.device):
        return torch.device("meta")
    return None if isinstance(value, torch.Generator) else value


def _on_device(shape: Any) -> Any:
    if not isinstance(shape, Tensor):
        return shape
    return torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype, device="cuda")


class Operator:
    """One operator, as the virtual GPU does it.

    ``compute`` gets the arguments as tensors of the CPU; ``shape`` gets them as meta tensors, for operators that return
    new ones. Both are the operator itself unless a stand-in is given.
    """

    def __init__(self, op: torch._ops.OpOverload, compute: Callable[..., Any], shape: Callable[..., Any]) -> None:
        self.name, self.compute, self.shape = op._schema.name, compute, shape
        arguments, returns = op._schema.arguments, op._schema.returns
        self.order = [argument.name for argument in arguments]
        self.written = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        self.draws = "generator" in self.order
        self.is_out = op._overloadname.endswith("out")
        self.returns = bool(returns)
        returns_tensors = any("Tensor" in str(value.type) for value in returns)
        base = self.name.split("::")[1]
        self.waits = base in _WAITING or (self.returns and not returns_tensors)
        self.indexes = base == "index"
        self.makes_new = returns_tensors and not all(value.alias_info is not None for value in returns)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.draws and kwargs.get("generator") is None and len(args) <= self.order.index("generator"):
            kwargs["generator"] = torch.cuda.default_generators[torch.cuda.current_device()]
        if self.waits or (self.indexes and any(_is_mask(index) for index in args[1])):
            return self._at_once(args, kwargs)
        if self.makes_new:
            return self._new(args, kwargs)
        return self._in_place(args, kwargs)

    def _new(self, args: Any, kwargs: Any) -> Any:
        made = pytree.tree_map(_on_device, self.shape(*pytree.tree_map(_shapeless, args), **_shapeless_map(kwargs)))
        submit(self.name, self.compute, args, kwargs, tensors_of(made))
        return made

    def _in_place(self, args: Any, kwargs: Any) -> Any:
        named = dict(zip(self.order, args, strict=False)) | kwargs
        outs = [named[name] for name in self.written]
        if self.is_out and any(isinstance(out, Tensor) and out.numel() == 0 for out in outs):
            self._resize(args, kwargs, outs)
        submit(self.name, self.compute, args, kwargs)
        if not self.returns:
            return None
        return outs[0] if len(outs) == 1 else tuple(outs)

    def _resize(self, args: Any, kwargs: Any, outs: Sequence[Tensor]) -> None:
        """Empty results of ``out=`` get their shape."""
        shapes, named = pytree.tree_map(_shapeless, args), _shapeless_map(kwargs)
        self.shape(*shapes, **named)
        named = dict(zip(self.order, shapes, strict=False)) | named
        for out, name in zip(outs, self.written, strict=True):
            out.resize_(named[name].shape)

    def _at_once(self, args: Any, kwargs: Any) -> Any:
        torch.cuda.current_stream().synchronize()  # amid a capture this is the error that it is on a GPU
        args, kwargs = pytree.tree_map(held, (args, kwargs))

        def placed(result: Any) -> Any:
            made = _on_device(result)
            if isinstance(made, Tensor):
                alias(made).copy_(result)
            return made

        return pytree.tree_map(placed, self.compute(*args, **kwargs))


def _shapeless_map(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: pytree.tree_map(_shapeless, value) for name, value in kwargs.items()}


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def override(op: torch._ops.OpOverload, function: Callable[..., Any], *, with_keyset: bool = False) -> None:
    """``function`` in the place of the kernel for CUDA. With ``with_keyset``, the dispatcher's keys come first."""
    namespace, _, name = op._schema.name.partition("::")
    if namespace not in _libraries:
        _libraries[namespace] = torch.library.Library(namespace, "IMPL")
    name += f".{op._schema.overload_name}" if op._schema.overload_name else ""
    _libraries[namespace].impl(name, function, "CUDA", with_keyset=with_keyset, allow_override=True)


def _overload(full_name: str) -> torch._ops.OpOverload | None:
    namespace, _, name = full_name.partition("::")
    base, _, overload = name.partition(".")
    packet = getattr(getattr(torch.ops, namespace), base, None)
    return getattr(packet, overload or "default", None)


def _is_view(op: torch._ops.OpOverload) -> bool:
    return any(value.alias_info is not None and not value.alias_info.is_write for value in op._schema.returns)


def override_all() -> int:
    """Every operator of torch with a kernel for CUDA; the result is how many there are."""
    overridden = 0
    for name in torch._C._dispatch_get_all_op_names():
        if not name.startswith("aten::") or name in _TORCHS_OWN:
            continue
        if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"):
            continue
        op = _overload(name)
        if op is None or _is_view(op):
            continue
        # Not the overload: a number that the dispatcher had made a tensor of comes to Python as a number again.
        compute, shape = STAND_INS.get(name, (op.overloadpacket, op.overloadpacket))
        override(op, Operator(op, compute, shape).__call__)
        overridden += 1
    _override_copy(torch.ops.aten.copy_.default)  # one kernel for all devices
    return overridden + 1


def _override_copy(op: torch._ops.OpOverload) -> None:
    """Between host and device torch's own kernel calls the runtime; on the device it launches."""
    original = torch.library.get_kernel(op, "CUDA")
    on_device = Operator(op, op, op)

    def copy(keys: torch._C.DispatchKeySet, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if target.is_cuda and source.is_cuda:
            on_device(target, source)
        else:
            original.call_boxed(keys, target, source, non_blocking)
        return target

    override(op, copy, with_keyset=True)
