"""How a computation on tensors of the virtual GPU gets into its stream."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from virtual_gpu.device import alias, device

_SEEDS_APART = 1_000_003  # a prime
_SEEDS = 2**63
_CLOCK = 1e9  # cycles a second


def held(value: Any) -> Any:
    """An argument as a kernel gets it at its launch: the device's memory by address, all else as it is now."""
    if isinstance(value, Tensor):
        return alias(value) if value.is_cuda else value.clone()
    if isinstance(value, torch.Generator):
        return _of_host(value)
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return value


def _of_host(generator: torch.Generator) -> torch.Generator:
    """A generator of the CPU at the state of the device's, which moves on: a seed makes the same numbers each time."""
    offset = generator.get_offset()
    generator.set_offset(offset + 4)
    return torch.Generator("cpu").manual_seed((generator.initial_seed() * _SEEDS_APART + offset) % _SEEDS)


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def submit(name: str, compute: Callable[..., Any], args: Any, kwargs: Any, made: Sequence[Tensor] = ()) -> None:
    """``compute`` in its turn, with arguments as they are now; what it returns is written into ``made``.

    It may return fewer than there are in ``made``: what nobody reads need not be computed.
    """
    targets = [alias(tensor) for tensor in made]
    args, kwargs = pytree.tree_map(held, (args, kwargs))

    def work() -> None:
        with torch.inference_mode():  # in which the caller may be, whose tensors nothing else may write
            results = tensors_of(compute(*args, **kwargs))
            for target, result in zip(targets, results, strict=False):
                target.copy_(result)

    device().submit(name, work, [*tensors_of((args, kwargs)), *targets])


def pause(cycles: int) -> None:
    """Keeps the current stream busy for as many cycles."""
    submit("pause", time.sleep, (cycles / _CLOCK,), {})
