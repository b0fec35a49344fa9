"""``.safetensors`` files, single or sharded with an index; tensors are views of the mapped file."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta
from safetensors import SafetensorError, safe_open
from torch import Tensor

from echo_rt.errors import WeightsError
from echo_rt.weights.reading import not_opened, read_head, read_object, reason_of
from echo_rt.weights.tensors import LazyTensors, Stored, TensorFile, check_name

# The index of a sharded file, of a variant too (diffusers: *.safetensors.index.fp16.json).
INDEX = re.compile(r"\.safetensors\.index(\.\w+)?\.json$")

_LENGTH_BYTES = 8


def is_safetensors(head: bytes) -> bool:
    """Return whether ``head`` begins as safetensors files do: a length, then a JSON object."""
    return head[_LENGTH_BYTES : _LENGTH_BYTES + 1] == b"{"


def _opened(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors and metadata of a file."""
    try:
        file: Any = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        found = f"a damaged or other one ({reason_of(error)})"
        raise not_opened(path, error, "a safetensors file", found) from error
    return {name: Stored(partial(_read, file, name)) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _read(file: Any, name: str) -> Tensor:
    try:
        tensor: Tensor = file.get_tensor(name)
    except (SafetensorError, TypeError, ValueError) as error:  # a number format this torch does not have
        raise WeightsError(f"{name}: expected a tensor that torch can hold, {error}") from error
    return tensor


def open_safetensors(path: Path) -> TensorFile:
    """The tensors and metadata of one file; ``WeightsError`` for a damaged one or one of another format."""
    entries, facts = _opened(path)
    return TensorFile(path, LazyTensors(entries), facts)


@dataclass
class _Index:
    weight_map: Annotated[dict[str, str], Meta(min_length=1)]


def open_sharded(index: Path) -> TensorFile:
    """The tensors of all shards that ``index`` (``*.safetensors.index.json``) names.

    Errors: ``WeightsError`` for an index without its map, one that names files elsewhere or missing ones, or differs
    from what the shards hold.
    """
    weight_map = read_object(index, 'an index of shards with a "weight_map"', _Index).weight_map
    entries: dict[str, Stored] = {}
    for shard_name in sorted(set(weight_map.values())):
        if Path(shard_name).name != shard_name:
            raise WeightsError(f"{index}: expected shards beside the index, found {shard_name!r:.300}")
        shard = index.parent / shard_name
        if not os.path.isfile(shard):  # pathlib raises for a name that cannot be
            raise WeightsError(f"{index}: expected the shard {shard_name:.300} beside the index, found none")
        read_head(shard)
        there, _ = _opened(shard)
        for name in there:
            if weight_map.get(check_name(name, shard)) != shard_name:
                raise WeightsError(f"{shard}: expected only tensors that {index.name} places here, found also {name}")
        entries |= there
    missing = [check_name(name, index) for name in weight_map if name not in entries]
    if missing:
        raise WeightsError(
            f"{index}: expected {missing[0]} in {weight_map[missing[0]]}, which lacks it ({len(missing)} such tensors)"
        )
    return TensorFile(index, LazyTensors(entries), {})
