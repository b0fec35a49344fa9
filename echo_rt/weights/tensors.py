"""Tensors by name that stay on disk until they are asked for, and views of them: under other names, fingerprinted."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from echo_rt.errors import WeightsError

Fact = int | float | str

MOST_TENSORS = 2**16  # of a file, dicts of an optimizer among them; a model has a thousand
_NAMED_IN_MESSAGES = 5
_LONGEST_NAME = 256
# Values of each tensor that count: a merged LoRA or another training step changes the first ones of a matrix too.
_VALUES = 64


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
    """Shape and dtype of a tensor without its values; ``dense``: it has a value for each element."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    dense: bool = True

    @classmethod
    def of(cls, tensor: Tensor) -> Outline:
        return cls(tuple(tensor.shape), tensor.dtype, tensor.layout == torch.strided and not tensor.is_meta)


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor that ``read`` maps or computes.

    ``known``: its outline where values would have to be computed for it; ``origins``: the tensors that it is computed
    from when it is loaded, none where it is stored.
    """

    read: Callable[[], Tensor]
    known: Outline | None = None
    origins: Callable[[], list[Tensor]] = list

    @property
    def outline(self) -> Outline:
        return self.known or Outline.of(self.read())


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each read or computed anew whenever it is asked for."""

    def __init__(self, entries: Mapping[str, Stored]) -> None:
        self.entries = entries

    def __getitem__(self, name: str) -> Tensor:
        return self.entries[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries  # Mapping's own would make the tensor only to see whether it is there


class TensorFile(LazyTensors):
    """The tensors of an opened file, or of all shards of one model.

    ``facts`` are the entries that are plain numbers or strings (a training step, a LoRA's alpha, safetensors
    metadata); they are no tensors and no part of the mapping.
    """

    def __init__(self, path: Path, tensors: LazyTensors, facts: Mapping[str, Fact]) -> None:
        super().__init__(tensors.entries)
        self.path, self.facts = path, facts


def lazy(tensors: Mapping[str, Tensor]) -> LazyTensors:
    """``tensors``, those of a plain dict as stored ones."""
    if isinstance(tensors, LazyTensors):
        return tensors
    return LazyTensors({name: Stored(partial(tensors.__getitem__, name)) for name in tensors})


def selected(tensors: LazyTensors, wanted: Callable[[str], bool]) -> LazyTensors:
    """A view of those of ``tensors`` whose names are ``wanted``."""
    return LazyTensors({name: entry for name, entry in tensors.entries.items() if wanted(name)})


def rename(tensors: LazyTensors, rule: Callable[[str], str], source: str) -> LazyTensors:
    """A view of all ``tensors`` under the names ``rule`` gives them.

    Errors: ``WeightsError`` where two of them would get one name.
    """
    names: dict[str, str] = {}
    for name in tensors:
        plain = rule(name)
        if plain in names:
            raise WeightsError(f"{source}: expected {plain} once, found it as {names[plain]} and as {name}")
        names[plain] = name
    return LazyTensors({plain: tensors.entries[name] for plain, name in names.items()})


def below(tensors: LazyTensors, prefix: str) -> LazyTensors:
    """A view of those of ``tensors`` whose names begin with ``prefix``, without it."""
    entries = tensors.entries.items()
    return LazyTensors({name.removeprefix(prefix): entry for name, entry in entries if name.startswith(prefix)})


class FingerprintedTensors(LazyTensors):
    """A view that refuses tensors with NaN or infinite values and records each one read.

    A NaN in a weight need not show in the video: torch's attention on a CPU turns NaN scores into zeros. So it is
    looked for here. ``source`` names the weights in the message of the :class:`WeightsError`.
    """

    def __init__(self, tensors: Mapping[str, Tensor], source: str) -> None:
        super().__init__(lazy(tensors).entries)
        self.source = source
        self._seen: dict[str, bytes] = {}

    def __getitem__(self, name: str) -> Tensor:
        entry = self.entries[name]
        tensor = entry.read()
        # In one pass; NaN if any value is. ``isfinite`` would write a tensor of bools.
        ends = torch.aminmax(tensor) if tensor.numel() else ()
        if not all(math.isfinite(end.item()) for end in ends):
            bad = int((~torch.isfinite(tensor)).sum())
            raise WeightsError(f"{self.source}: {bad} of {tensor.numel()} values of {name} are NaN or infinite")
        # What is computed at load may be rounded otherwise elsewhere: then it is told by what it is computed of.
        samples = [origin.flatten()[:_VALUES].to("cpu", torch.float32) for origin in entry.origins() or [tensor]]
        self._seen[name] = b"".join(sample.contiguous().numpy().tobytes() for sample in samples)
        return tensor

    def digest(self) -> str:
        """SHA-256 over the names and first values of the tensors read so far, whatever the order of reading."""
        digest = hashlib.sha256()
        for name in sorted(self._seen):
            digest.update(name.encode() + b"\0" + self._seen[name])
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class ModelTensors:
    """A model's tensors by their original names; ``memory`` and ``vae`` are empty where it has no such part."""

    transformer: FingerprintedTensors
    memory: FingerprintedTensors = field(default_factory=lambda: FingerprintedTensors({}, ""))
    vae: FingerprintedTensors = field(default_factory=lambda: FingerprintedTensors({}, ""))
