"""Operations of torch, noted while they run and run again on the same tensors: what a CUDA graph does, on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes


def tensors_in(value: Any) -> list[Tensor]:
    """Those among an operation's arguments or results, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for entry in value for tensor in tensors_in(entry)]


@dataclass
class Call:
    """One operation with its arguments; ``fresh``: which of its outputs are new tensors, and these."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    fresh: list[tuple[int, Tensor]]

    @classmethod
    def run(cls, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, Any]:
        """The operation, done and noted, and its result."""
        result = function(*args, **kwargs)
        inputs = {tensor.untyped_storage().data_ptr() for tensor in tensors_in((args, kwargs))}
        outputs = enumerate(tensors_in(result))
        fresh = [(place, out) for place, out in outputs if out.untyped_storage().data_ptr() not in inputs]
        return cls(function, tuple(args), dict(kwargs), fresh), result

    def again(self) -> None:
        """The same on the same addresses, with the host's values of the first time."""
        result = self.function(*self.args, **self.kwargs)
        if self.fresh:
            outputs = tensors_in(result)
            for place, out in self.fresh:
                out.copy_(outputs[place])


def replay(calls: list[Call]) -> None:
    """Do the operations again, in order, unseen by whoever watches operations."""
    with _disable_current_modes():
        for call in calls:
            call.again()


class Tape(TorchDispatchMode):
    """Entered as a context, notes every operation; :meth:`replay` does them again."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call, result = Call.run(func, args, kwargs or {})
        self._calls.append(call)
        return result

    def replay(self) -> None:
        replay(self._calls)
