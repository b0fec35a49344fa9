"""``.pt`` and ``.pth`` files: opened with ``weights_only``, so that a file can hold numbers but never run code."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from echo_rt.errors import WeightsError
from echo_rt.utils.wording import one_line, type_of
from echo_rt.weights.formats import ZIP_MAGIC, other_format
from echo_rt.weights.tensors import Contents, Fact, check_name

# torch's zip container and a pickle of protocol 2 or newer, as torch.save wrote it before there was one.
PICKLE_MAGICS = (ZIP_MAGIC, *(b"\x80" + bytes([protocol]) for protocol in range(2, 6)))
# How torch's unpickler words its refusal of anything that is not plain data.
_REFUSED_GLOBAL = re.compile(r"GLOBAL (\S+)|class (\S+)|module (\S+) is blocked")
_REASON_LENGTH = 160


def open_pickle(path: Path, head: bytes) -> Contents:
    """The tensors and numbers of a torch file, nested dicts joined with dots; ``head`` are its first bytes.

    Errors: ``WeightsError`` for a file that is damaged, holds code, or holds no dict.
    """
    # Before torch 1.6 there was no zip container; such a file is a stream in which nothing lies where it could be
    # mapped, so it is read. So is one with the suffix of another format, which torch would take it for.
    is_zip = head.startswith(ZIP_MAGIC)
    mappable = is_zip and path.suffix.lower() != ".safetensors"
    try:
        with warnings.catch_warnings(), path.open("rb") as opened:
            # A TorchScript archive is announced with a warning before it is refused with an error.
            warnings.simplefilter("ignore")
            content = torch.load(path if mappable else opened, map_location="cpu", weights_only=True, mmap=mappable)
    except Exception as error:  # unpickling damaged bytes fails with whatever those bytes lead to
        found = (other_format(path, head) if is_zip else None) or _reason(error)
        raise WeightsError(f"{path}: expected a torch file of tensors, found {found}") from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: expected a dict of tensors, found {type_of(content)}")
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Fact] = {}
    try:
        _flatten(content, "", tensors, facts, path)
    except RecursionError as error:
        raise WeightsError(f"{path}: expected a dict of tensors, found dicts nested without end") from error
    return tensors, facts


def _flatten(
    content: Mapping[object, object], prefix: str, tensors: dict[str, Tensor], facts: dict[str, Fact], path: Path
) -> None:
    for key, value in content.items():
        # Anything can be a key, a tensor too; what it looks like would be pages.
        name = f"{prefix}{key if isinstance(key, (str, int)) else f'<{type(key).__name__}>'}"
        if isinstance(value, Mapping):
            _flatten(value, f"{name}.", tensors, facts, path)
        elif isinstance(value, Tensor):
            if name in tensors:
                raise WeightsError(f"{path}: expected {check_name(name, path)} once, found it twice in nested dicts")
            tensors[name] = value.detach()
        elif isinstance(value, (int, float, str)):
            facts[name] = value
        # Lists and the like are optimizer settings: no weights, and of no use here.


def _reason(error: Exception) -> str:
    """One line on why torch would not load a file; its own messages run over pages and advise to trust the file."""
    text = one_line(error)
    if "weights_only" in text or "Weights only" in text:
        refused = _REFUSED_GLOBAL.search(text)
        if refused:
            name = next(group for group in refused.groups() if group)
            return f"a pickle that asks for {name}, which is code and is not run"
        return "a damaged file or a pickle of something else"
    return f"a damaged or truncated file ({text[:_REASON_LENGTH] or type(error).__name__})"
