"""Tensors by name that stay on disk until they are asked for, and views of them under other names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from echo_rt.errors import WeightsError

Fact = int | float | str

_NAMED_IN_MESSAGES = 5
_LONGEST_NAME = 256


def first_names(names: Sequence[str]) -> str:
    """A list of names for a message: the first few, and how many more there are."""
    more = len(names) - _NAMED_IN_MESSAGES
    return ", ".join(names[:_NAMED_IN_MESSAGES]) + (f" and {more} more" if more > 0 else "")


def check_name(name: str, path: Path) -> str:
    """``name``, which messages will repeat; ``WeightsError`` for one of a length or of characters that no model has."""
    if len(name) > _LONGEST_NAME or not name.isprintable():
        raise WeightsError(f"{path}: expected names of tensors, came {name[:_LONGEST_NAME]!a}")
    return name


class Outline(NamedTuple):
    """What can be known of a tensor without its values; ``dense``: it has values, each in a place of its own."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    dense: bool = True


@runtime_checkable
class OutlinedTensors(Protocol):
    """Tensors whose shapes and dtypes are known before their values are computed or read."""

    def outline(self, name: str) -> Outline:
        """Shape and dtype of tensor ``name``."""


def outline_of(tensors: Mapping[str, Tensor], name: str) -> Outline:
    """Shape and dtype of a tensor, without its values where ``tensors`` computes these on demand."""
    if isinstance(tensors, OutlinedTensors):
        return tensors.outline(name)
    tensor = tensors[name]
    return Outline(tuple(tensor.shape), tensor.dtype, tensor.layout == torch.strided and not tensor.is_meta)


class TensorFile(Mapping[str, Tensor]):
    """The tensors of an opened file (or of all shards of one model) by name, read from disk when they are used.

    ``facts`` are the entries that are plain numbers or strings (a training step, a LoRA's alpha, safetensors
    metadata); they are no tensors and no part of the mapping.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Fact]) -> None:
        self.path = path
        self.facts = facts
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        # Mapping's own would make the tensor only to see whether it is there.
        return name in self._tensors

    def outline(self, name: str) -> Outline:
        """Shape and dtype of tensor ``name``."""
        return outline_of(self._tensors, name)


class RenamedTensors(Mapping[str, Tensor]):
    """A view of ``tensors`` in which the one called ``names[new]`` is called ``new``; it holds no others."""

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self._tensors = tensors
        self._names = names

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def outline(self, name: str) -> Outline:
        """Shape and dtype of tensor ``name``."""
        return outline_of(self._tensors, self._names[name])


def rename(tensors: Mapping[str, Tensor], rule: Callable[[str], str], source: str) -> RenamedTensors:
    """A view of all ``tensors`` under the names ``rule`` gives them.

    Errors: ``WeightsError`` where two of them would get one name.
    """
    names: dict[str, str] = {}
    for name in tensors:
        plain = rule(name)
        if plain in names:
            raise WeightsError(f"{source}: expected {plain} once, came as {names[plain]} and as {name}")
        names[plain] = name
    return RenamedTensors(tensors, names)


# Modules that training wraps around others and that leave their names in the keys.
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
# What the trained object as a whole is called: PEFT's wrapper, then the diffusion wrapper's attribute.
_OWNERS = ("base_model.model.", "model.")
# Dicts and modules that a whole model lies in, Lightning's and ComfyUI's among them. One may lie in another.
_HOLDERS = (*_OWNERS, "state_dict.", "module.", "diffusion_model.")
# Dicts of a training run beside the model: the state of its optimizers, and a model that is not generated with.
_TRAINING = ("optimizer", "generator_optimizer", "critic_optimizer", "optimizer_states", "lr_schedulers", "critic")
# Tensors that are no weights: a tokenizer inside ComfyUI's text encoders.
_BAGGAGE = ("spiece_model",)


def without_wrappers(name: str) -> str:
    """The name of a tensor in the bare model: FSDP's, PEFT's and the trainer's own prefixes taken off."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    for owner in _OWNERS:
        name = name.removeprefix(owner)
    return name


def bare(tensors: Mapping[str, Tensor], source: str) -> RenamedTensors:
    """A whole model's tensors under their bare names, without what a training run or ComfyUI saves beside them."""

    def plain(name: str) -> str:
        name = without_wrappers(name)
        while holder := next((holder for holder in _HOLDERS if name.startswith(holder)), None):
            name = name.removeprefix(holder)
        return name

    beside = {name for name in tensors if name.split(".", 1)[0] in _TRAINING or plain(name) in _BAGGAGE}
    return rename(RenamedTensors(tensors, {name: name for name in tensors if name not in beside}), plain, source)
