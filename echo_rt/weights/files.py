"""Opening weight files of every kind that holds a Wan model, and holding what they contain against what is expected.

What a file is, its first bytes say, whatever it is called. Nothing is copied: safetensors, GGUF and torch's zip format
are mapped, and a tensor's bytes are read when it is used.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from echo_rt.errors import WeightsError
from echo_rt.utils.wording import plain
from echo_rt.weights.fp8 import widened
from echo_rt.weights.gguf_files import GGUF_MAGIC, open_gguf
from echo_rt.weights.pickle_files import PICKLE_MAGICS, open_pickle
from echo_rt.weights.reading import names_in, other_format, read_head
from echo_rt.weights.safetensors_files import INDEX, is_safetensors, open_safetensors, open_sharded
from echo_rt.weights.shapes import Shapes
from echo_rt.weights.tensors import MOST_TENSORS, TensorFile, check_name, first_names, lazy

_SAFETENSORS = ".safetensors"
_PICKLES = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES = (_SAFETENSORS, *_PICKLES, ".gguf")
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
    if INDEX.search(path.name):
        return open_sharded(path)
    if head.startswith(GGUF_MAGIC):
        return open_gguf(path, widen_to)
    if is_safetensors(head):  # before pickles: the length it begins with may look like one
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
    if path.suffix.lower() in SUFFIXES or INDEX.search(path.name) or os.path.isfile(path):
        return path
    there = names_in(path) if os.path.isdir(path) else []
    for ending in (f"{_SAFETENSORS}.index.json", _SAFETENSORS):
        found = [name for name in there if name.endswith(ending)]
        if len(found) > 1:
            raise WeightsError(f"{path}: expected one *{ending}, found {len(found)}: {first_names(found)}")
        if found:
            return path / found[0]
    if os.path.isdir(path):
        wanted = f"a folder with a *{_SAFETENSORS} or a *{_SAFETENSORS}.index.json"
        raise WeightsError(f"{path}: expected {wanted}, found {other_format(path, b'') or 'neither'}")
    usual = [f"{path.name}{_SAFETENSORS}", f"{path.name}{_SAFETENSORS}.index.json"]
    older = [f"{path.name}.bin", f"pytorch_{path.name}.bin"]
    # What diffusers calls copies in another precision, single and sharded.
    variant = re.compile(re.escape(path.name) + r"(\.\w+\.safetensors|\.safetensors\.index\.\w+\.json)")
    there = names_in(path.parent) if os.path.isdir(path.parent) else []
    variants = [name for name in there if variant.fullmatch(name) and name not in usual]
    found = [name for name in usual if name in there] or variants or [name for name in older if name in there]
    if found == variants and len(found) > 1:
        raise WeightsError(f"{path.parent}: expected one variant, found {first_names(found)}")
    if not found:
        raise WeightsError(f"{path.parent}: expected {usual[0]} or {usual[1]}, found neither")
    return path.with_name(found[0])


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
