"""Opening weight files of every kind that holds a Wan model, and holding what they contain against what is expected.

What a file is, its first bytes say, whatever it is called. Nothing is copied: safetensors, GGUF and torch's zip format
are mapped, and a tensor's bytes are read when it is used.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from msgspec import Meta
from safetensors import SafetensorError, safe_open
from torch import Tensor

from echo_rt.errors import WeightsError
from echo_rt.utils.wording import plain
from echo_rt.weights.fp8 import widened
from echo_rt.weights.gguf_files import GGUF_MAGIC, open_gguf
from echo_rt.weights.pickle_files import PICKLE_MAGICS, open_pickle
from echo_rt.weights.reading import names_in, not_opened, other_format, read_head, read_object, reason_of
from echo_rt.weights.shapes import Shapes
from echo_rt.weights.tensors import MOST_TENSORS, LazyTensors, Stored, TensorFile, check_name, first_names, lazy

_SAFETENSORS = ".safetensors"
_PICKLES = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES = (_SAFETENSORS, *_PICKLES, ".gguf")
# The index of a sharded file, of a variant too (diffusers: *.safetensors.index.fp16.json).
_INDEX = re.compile(r"\.safetensors\.index(\.\w+)?\.json$")
_JSON_AT = 8  # where safetensors files have their header, behind its length
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def open_tensors(path: str | Path, *, widen_to: torch.dtype = torch.float32) -> TensorFile:
    """The tensors of a weight file by name, mapped from disk.

    ``path`` is one of: a safetensors, torch or GGUF file (nested dicts come as names joined with dots); an index
    ``*.safetensors.index.json``, whose shards lie beside it; a folder with a safetensors file or such an index; a
    *stem*, either without its suffix (``folder/diffusion_pytorch_model``, for ``.fp16.safetensors`` too).
    ``widen_to``: the dtype in which float8 and other quantized tensors come, each computed when it is used.

    Errors: ``WeightsError`` for a file that is missing, damaged, of another format (which is named), or holds anything
    but tensors; ``BackendError`` for a GGUF file without the package that reads it.
    """
    path = _find(Path(path))
    file = _open(path, read_head(path), widen_to)
    if not 0 < len(file) <= MOST_TENSORS:
        raise WeightsError(f"{path}: expected 1 to {MOST_TENSORS} tensors, found {len(file) or 'a file without any'}")
    for name in file:
        check_name(name, path)
    return TensorFile(path, widened(file, path, widen_to), file.facts)


def _open(path: Path, head: bytes, widen_to: torch.dtype) -> TensorFile:
    if _INDEX.search(path.name):
        return _open_sharded(path)
    if head.startswith(GGUF_MAGIC):
        return open_gguf(path, widen_to)
    if head[_JSON_AT : _JSON_AT + 1] == b"{":  # before pickles: the length it begins with may look like one
        return open_safetensors(path)
    if head.startswith(PICKLE_MAGICS):
        return open_pickle(path, head)
    other = other_format(path, head)
    if other is None and path.suffix.lower() not in SUFFIXES:
        other = "another format"
    if other is not None:
        raise WeightsError(f"{path}: expected weights in a safetensors, torch or GGUF file, found {other}")
    # A damaged file: its name says what it was to be.
    return open_pickle(path, head) if path.suffix.lower() in _PICKLES else open_safetensors(path)


def _find(path: Path) -> Path:
    """The one file that ``path`` means."""
    # os.path answers False where a path cannot exist at all (too long a name); pathlib raises.
    if path.suffix.lower() in SUFFIXES or _INDEX.search(path.name) or os.path.isfile(path):
        return path
    index = f"{_SAFETENSORS}.index.json"
    if os.path.isdir(path):
        folder, wanted = path, f"a folder with a *{_SAFETENSORS} or a *{index}"
        patterns = [(r".*\.safetensors\.index\.json", f"*{index}"), (r".*\.safetensors", f"*{_SAFETENSORS}")]
    else:
        folder, wanted = path.parent, f"{path.name}{_SAFETENSORS} or {path.name}{index}"
        # What diffusers calls copies in another precision, single and sharded.
        variant = r"(\.\w+\.safetensors|\.safetensors\.index\.\w+\.json)"
        endings = (r"\.safetensors", r"\.safetensors\.index\.json", variant, r"\.bin")
        patterns = [(f"{re.escape(path.name)}{ending}", "variant") for ending in endings]
        patterns.append((rf"pytorch_{re.escape(path.name)}\.bin", "file"))
    there = names_in(folder) if os.path.isdir(folder) else []
    for pattern, what in patterns:
        found = [name for name in there if re.fullmatch(pattern, name)]
        if len(found) > 1:
            raise WeightsError(f"{folder}: expected one {what}, found {len(found)}: {first_names(found)}")
        if found:
            return folder / found[0]
    raise WeightsError(f"{folder}: expected {wanted}, found {other_format(folder, b'') or 'neither'}")


def open_safetensors(path: Path) -> TensorFile:
    """The tensors and metadata of one file; ``WeightsError`` for a damaged one or one of another format."""
    try:
        file: Any = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        found = f"a damaged or other one ({reason_of(error)})"
        raise not_opened(path, error, "a safetensors file", found) from error
    entries = {name: Stored(partial(_read, file, name)) for name in file.keys()}  # noqa: SIM118
    return TensorFile(path, LazyTensors(entries), file.metadata() or {})


def _read(file: Any, name: str) -> Tensor:
    try:
        tensor: Tensor = file.get_tensor(name)
    except (SafetensorError, TypeError, ValueError) as error:  # a number format this torch does not have
        raise WeightsError(f"{name}: expected a tensor that torch can hold, {error}") from error
    return tensor


@dataclass
class _Index:
    weight_map: Annotated[dict[str, str], Meta(min_length=1)]


def _open_sharded(index: Path) -> TensorFile:
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
            raise WeightsError(f"{index}: expected the shard {shard_name!r:.300} beside the index, found none")
        read_head(shard)
        there = open_safetensors(shard).entries
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


def check_tensors(found: Mapping[str, Tensor], expected: Shapes, source: str) -> None:
    """Raise ``WeightsError`` unless ``found`` has exactly the names and shapes of ``expected``, all dense floats.

    The one message lists what is missing, surplus and misshapen: the first few names of each, and how many.
    """
    entries = lazy(found).entries
    faults: dict[str, list[str]] = {
        "missing": [name for name in expected if name not in entries],
        "surplus": sorted(entries.keys() - expected.keys()),
        "misshapen": [],
        "not dense 16- to 64-bit floats": [],
    }
    for name in filter(entries.__contains__, expected):
        shape, dtype, dense = entries[name].outline
        if shape != expected[name]:
            faults["misshapen"].append(f"{name} is {list(shape)} for {list(expected[name])}")
        elif dtype not in _FLOATS or not dense:
            faults["not dense 16- to 64-bit floats"].append(f"{name} is {plain(dtype)}")
    told = [f"{len(names)} {fault} ({first_names(names)})" for fault, names in faults.items() if names]
    if told:
        raise WeightsError(f"{source}: expected {len(expected)} tensors, found {len(found)}: {'; '.join(told)}")
