"""Opening weight files of every kind that holds a Wan model, and holding what they contain against what is expected.

Nothing is copied: safetensors and torch's zip format are mapped, and a tensor's bytes are read when it is used.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from echo_rt.errors import WeightsError
from echo_rt.utils.wording import plain
from echo_rt.weights.pickle_files import open_pickle
from echo_rt.weights.safetensors_files import INDEX_SUFFIX, open_safetensors, open_sharded
from echo_rt.weights.shapes import Shapes
from echo_rt.weights.tensors import TensorFile, first_names

_SAFETENSORS = ".safetensors"
_PICKLES = (".pt", ".pth")
_LFS_POINTER = b"version https://git-lfs"
_HEAD_BYTES = 64
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def open_tensors(path: str | Path) -> TensorFile:
    """The tensors of a weight file by name, mapped from disk.

    ``path`` is one of: a ``.safetensors`` file; an index ``*.safetensors.index.json``, whose shards lie beside it; a
    folder with one of either; either without its suffix (a *stem*: ``folder/diffusion_pytorch_model``); a ``.pt`` or
    ``.pth`` file (nested dicts come as names joined with dots).

    Errors: ``WeightsError`` for a file that is missing, damaged, of another format, or holds anything but tensors.
    """
    file = _find(Path(path))
    head = read_head(file)
    if file.name.endswith(INDEX_SUFFIX):
        return open_sharded(file, file.read_bytes())
    if file.suffix.lower() == _SAFETENSORS:
        return open_safetensors(file)
    return open_pickle(file, head)


def _find(path: Path) -> Path:
    """The one file that ``path`` means."""
    if path.name.endswith(INDEX_SUFFIX) or path.suffix.lower() in (_SAFETENSORS, *_PICKLES):
        return path
    # os.path answers False where a path cannot exist at all (too long a name); pathlib raises.
    if os.path.isdir(path):
        for pattern in (f"*{INDEX_SUFFIX}", f"*{_SAFETENSORS}"):
            found = sorted(path.glob(pattern))
            if len(found) > 1:
                names = first_names([file.name for file in found])
                raise WeightsError(f"{path}: expected one {pattern}, found {len(found)}: {names}")
            if found:
                return found[0]
        raise WeightsError(f"{path}: expected a folder with a *{_SAFETENSORS} or a *{INDEX_SUFFIX}, found neither")
    candidates = [path.with_name(path.name + suffix) for suffix in (_SAFETENSORS, INDEX_SUFFIX)]
    for candidate in candidates:
        if os.path.exists(candidate):
            return candidate
    if os.path.exists(path):
        raise WeightsError(f"{path}: expected a file called *{_SAFETENSORS}, *.pt or *.pth, came another")
    raise WeightsError(f"{path.parent}: expected {candidates[0].name} or {candidates[1].name}, found neither")


def read_head(path: Path) -> bytes:
    """The first bytes of a file that must be there, be a file, and be downloaded.

    Errors: ``WeightsError`` for a missing, unreadable or empty file, a folder, or a git-lfs pointer.
    """
    try:
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # to open a pipe is to wait for whoever fills it
            raise WeightsError(f"{path}: expected a file, came a pipe or a device")
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except FileNotFoundError:
        raise WeightsError(f"{path}: expected a file, found none") from None
    except IsADirectoryError:
        raise WeightsError(f"{path}: expected a file, came a folder") from None
    except OSError as error:
        raise WeightsError(f"{path}: expected a readable file, came: {error.strerror or error}") from error
    if not head:
        raise WeightsError(f"{path}: expected weights, came an empty file")
    if head.startswith(_LFS_POINTER):
        raise WeightsError(f"{path}: expected weights, came a git-lfs pointer: the file itself was never downloaded")
    return head


def check_tensors(found: Mapping[str, Tensor], expected: Shapes, source: str) -> None:
    """Raises ``WeightsError`` unless ``found`` has exactly the names and shapes of ``expected``, all dense floats.

    The one message lists what is missing, surplus and misshapen: the first few names of each, and how many.
    """
    missing = [name for name in expected if name not in found]
    surplus = sorted(name for name in found if name not in expected)
    misshapen, mistyped = [], []
    for name, shape in expected.items():
        if name not in found:
            continue
        tensor = found[name]
        if tuple(tensor.shape) != shape:
            misshapen.append(f"{name} is {list(tensor.shape)} for {list(shape)}")
        elif tensor.dtype not in _FLOATS or tensor.layout != torch.strided or tensor.is_meta:
            mistyped.append(f"{name} is {plain(tensor.dtype)}")
    faults = [
        f"{len(names)} {fault} ({first_names(names)})"
        for fault, names in (
            ("missing", missing),
            ("surplus", surplus),
            ("misshapen", misshapen),
            ("not dense 16- to 64-bit floats", mistyped),
        )
        if names
    ]
    if faults:
        raise WeightsError(f"{source}: expected {len(expected)} tensors, came {len(found)}: {'; '.join(faults)}")
