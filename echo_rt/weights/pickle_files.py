"""``.pt`` and ``.pth`` files: opened with ``weights_only``, so that a file can hold numbers but never run code.

Nor can a small one ask for much memory: what it says of sizes is held against the bytes that it has.
"""

from __future__ import annotations

import mmap
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from echo_rt.errors import WeightsError
from echo_rt.utils.wording import one_line, type_of
from echo_rt.weights.reading import ANY_SIZE, MAKES_ANY_SIZE, ZIP_MAGIC, not_opened, reason_of, zip_format
from echo_rt.weights.tensors import MOST_TENSORS, Fact, TensorFile, check_name, lazy

# torch's zip container and a pickle of protocol 2 or newer, as torch.save wrote it before there was one.
PICKLE_MAGICS = (ZIP_MAGIC, *(b"\x80" + bytes([protocol]) for protocol in range(2, 6)))
# How torch's unpickler words its refusal of anything that is not plain data.
_REFUSED_GLOBAL = re.compile(r"GLOBAL (\S+)|class (\S+)|module (\S+) is blocked")
_ALLOCATED = re.compile(r"tried to allocate (\d+) bytes")
_LONGEST_PATH = 1024  # of dicts inside one another, in characters: a name is as long for each entry below
_SHARED = 8  # names at most that all of a file's values have: of tied weights, of one dict under two names


def open_pickle(path: Path, head: bytes) -> TensorFile:
    """The tensors and numbers of a torch file, nested dicts joined with dots; ``head`` are its first bytes.

    Errors: ``WeightsError`` for a file that is damaged, holds code, states sizes that it does not have, or holds no
    dict.
    """
    # Before torch 1.6 there was no zip container; such a file is a stream in which nothing lies where it could be
    # mapped, so it is read. So is one with the suffix of another format, which torch would take it for.
    is_zip = head.startswith(ZIP_MAGIC)
    mappable = is_zip and path.suffix.lower() != ".safetensors"
    content: Any = None
    try:
        other = zip_format(path) if is_zip else _stream_format(path)
        if other is None:
            with warnings.catch_warnings(), path.open("rb") as opened:
                warnings.simplefilter("ignore")  # of protocols that an error is about to name
                content = torch.load(path if mappable else opened, map_location="cpu", weights_only=True, mmap=mappable)
    except Exception as error:  # unpickling damaged bytes fails with whatever those bytes lead to
        asked = _ALLOCATED.search(str(error))
        if asked and int(asked[1]) > path.stat().st_size:
            error = ValueError(f"it states {asked[1]} bytes of values")
        raise not_opened(path, error, "a torch file of tensors", _reason(error)) from error
    if other is not None:
        raise WeightsError(f"{path}: expected a torch file of tensors, found {other}")
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: expected a dict of tensors, found {type_of(content)}")
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Fact] = {}
    try:
        for count, (name, value) in enumerate(_flattened(content, "")):
            if count >= MOST_TENSORS:
                raise WeightsError(f"{path}: expected at most {MOST_TENSORS} entries, found more in nested dicts")
            if isinstance(value, Tensor):
                if name in tensors:
                    name = check_name(name, path)
                    raise WeightsError(f"{path}: expected {name} once, found it twice in nested dicts")
                tensors[name] = value.detach()
            elif isinstance(value, (int, float, str)):
                facts[name] = value
            # Lists and the like are optimizer settings: no weights, and of no use here.
    except RecursionError as error:
        raise WeightsError(f"{path}: expected a dict of tensors, found dicts nested without end") from error
    _check_sizes(tensors, path)
    return TensorFile(path, lazy(tensors), facts)


def _stream_format(path: Path) -> str | None:
    """Name what makes a file without a container unreadable; None where that is not known before it is read."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        return MAKES_ANY_SIZE if whole.find(ANY_SIZE) >= 0 else None


def _flattened(content: Mapping[object, object], prefix: str) -> Iterator[tuple[str, object]]:
    for key, value in content.items():
        # Anything can be a key, a tensor too; what it looks like would be pages.
        name = f"{prefix}{key if isinstance(key, (str, int)) else f'<{type(key).__name__}>'}"
        if len(name) > _LONGEST_PATH:
            raise RecursionError
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{name}.")
        else:
            yield name, value


def _check_sizes(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise ``WeightsError`` for tensors of more values than are stored, which strides make of a few."""
    total, stored = 0, path.stat().st_size
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta:
            continue  # refused where it is asked for
        size, has = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
        total += size
        if size > min(has, stored) or total > _SHARED * stored:
            raise WeightsError(
                f"{path}: expected tensors as large as what is stored, found {check_name(name, path)} "
                f"{list(tensor.shape)} of {min(has, stored)} bytes"
            )


def _reason(error: Exception) -> str:
    """One line on why torch would not load a file; its own messages run over pages and advise to trust the file."""
    text = one_line(error)
    if "weights_only" in text or "Weights only" in text:
        refused = _REFUSED_GLOBAL.search(text)
        if refused:
            name = next(group for group in refused.groups() if group)
            return f"a pickle that asks for {name}, which is code and is not run"
        return "a damaged file or a pickle of something else"
    return f"a damaged or truncated file ({reason_of(error)})"
