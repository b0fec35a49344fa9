"""Tensors by name that stay on disk until they are asked for, and views of them under other names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from echo_rt.errors import WeightsError

Fact = int | float | str
Contents = tuple[Mapping[str, Tensor], Mapping[str, Fact]]  # of a weight file: its tensors, and all that is none

MOST_TENSORS = 2**16  # of a file, dicts of an optimizer among them; a model has a thousand
_NAMED_IN_MESSAGES = 5
_LONGEST_NAME = 256


def first_names(names: Sequence[str]) -> str:
    """A list of names for a message: the first few, and how many more there are."""
    more = len(names) - _NAMED_IN_MESSAGES
    return ", ".join(names[:_NAMED_IN_MESSAGES]) + (f" and {more} more" if more > 0 else "")


def check_name(name: str, path: Path) -> str:
    """``name``, which messages will repeat; ``WeightsError`` for one of a length or of characters that no model has."""
    if len(name) > _LONGEST_NAME or not name.isprintable():
        raise WeightsError(f"{path}: expected names of tensors, found {name[:_LONGEST_NAME]!a}")
    return name


class Outline(NamedTuple):
    """Shape and dtype of a tensor without its values; ``dense``: it has values, each in a place of its own."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    dense: bool = True


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each read or computed from its entry when it is asked for: subclasses say how."""

    def __init__(self, entries: Mapping[str, Any]) -> None:
        self._entries = entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries  # Mapping's own would make the tensor only to see whether it is there

    def outline(self, name: str) -> Outline:
        """Shape and dtype of tensor ``name``, without its values where these have to be computed."""
        return _measured(self[name])

    def origins(self, name: str) -> list[Tensor]:
        """The tensors that ``name`` is computed from when it is loaded; none where it is stored."""
        return []


def outline_of(tensors: Mapping[str, Tensor], name: str) -> Outline:
    """Shape and dtype of a tensor, without its values where ``tensors`` computes these on demand."""
    return tensors.outline(name) if isinstance(tensors, LazyTensors) else _measured(tensors[name])


def _measured(tensor: Tensor) -> Outline:
    dense = tensor.layout == torch.strided and not tensor.is_meta
    # A stride of 0 makes a tensor of any shape out of one value.
    dense = dense and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()
    return Outline(tuple(tensor.shape), tensor.dtype, dense)


class RenamedTensors(LazyTensors):
    """A view of ``tensors`` in which the one called ``names[new]`` is called ``new``; it holds no others."""

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        super().__init__(names)
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._entries[name]]

    def outline(self, name: str) -> Outline:
        return outline_of(self._tensors, self._entries[name])


class TensorFile(RenamedTensors):
    """The tensors of an opened file, or of all shards of one model.

    ``facts`` are the entries that are plain numbers or strings (a training step, a LoRA's alpha, safetensors
    metadata); they are no tensors and no part of the mapping.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Fact]) -> None:
        super().__init__(tensors, {name: name for name in tensors})
        self.path, self.facts = path, facts


def selected(tensors: Mapping[str, Tensor], wanted: Callable[[str], bool]) -> RenamedTensors:
    """A view of those of ``tensors`` whose names are ``wanted``."""
    return RenamedTensors(tensors, {name: name for name in tensors if wanted(name)})


def below(tensors: Mapping[str, Tensor], prefix: str) -> RenamedTensors:
    """A view of those of ``tensors`` whose names begin with ``prefix``, without it."""
    return RenamedTensors(tensors, {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)})


def rename(tensors: Mapping[str, Tensor], rule: Callable[[str], str], source: str) -> RenamedTensors:
    """A view of all ``tensors`` under the names ``rule`` gives them.

    Errors: ``WeightsError`` where two of them would get one name.
    """
    names: dict[str, str] = {}
    for name in tensors:
        plain = rule(name)
        if plain in names:
            raise WeightsError(f"{source}: expected {plain} once, found it as {names[plain]} and as {name}")
        names[plain] = name
    return RenamedTensors(tensors, names)
