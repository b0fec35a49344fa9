"""Files of tensors and metadata: safetensors with a checksum over every byte, written whole or not at all.

The metadata of a file has the format and its version, the version of echo-rt, ``facts`` (one JSON object), and
``sha256``: the digest of the whole file, itself taken as zeros. Files of every version have format, version and
digest, so a whole file of another version can be told from a damaged one. Versions 1 and 2 differ in the tensors of
the KV buffer alone (:mod:`echo_rt.snapshot.kv_rows`).

Files are written by hand, as the safetensors library would copy all tensors once more. It reads them: tensors are
allocated once the file is known to be whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from echo_rt.errors import SnapshotError, SnapshotVersionError
from echo_rt.options import is_path
from echo_rt.utils.atomic_file import open_plain, reason, whole_file
from echo_rt.utils.build_info import __version__
from echo_rt.utils.wording import first_line, plain

FORMAT, VERSION = "echo-rt snapshot", 2
_READ = ("1", "2")  # versions
_LENGTH_BYTES = 8
_ALIGNMENT = 64
_ZEROS = "0" * 64
_PIECE = 2**20  # bytes in memory at once
_UNREADABLE = (SafetensorError, TypeError, ValueError, OverflowError)  # not memory that is used up

_CODES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
}

# -------------------------------------------------------------------- writing


def write_file(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write ``tensors`` and ``metadata`` (plain JSON) to a temporary file, flush it to the disk, move it to ``path``.

    The digest takes one pass of SHA-256 over the data, outside the interpreter's lock like the writing itself.
    Raises ``OutputError`` where it cannot be written (an old file stays), :class:`SnapshotError` for a dtype that no
    file can hold.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _CODES:
            raise SnapshotError(f"{path}: {name} is {plain(tensor.dtype)}, which a snapshot's file cannot hold")
    # Wide numbers first, so that each tensor begins at a multiple of its element size.
    tensors = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    header = _header(tensors, metadata)
    with whole_file(path) as part:
        digest = hashlib.sha256(header)
        part.append(header)
        for tensor in tensors.values():
            data = _bytes_of(tensor)
            digest.update(data)
            part.append(data)
        part.overwrite(header.index(_ZEROS.encode()), digest.hexdigest().encode())


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    """Length and JSON of a safetensors file, with zeros in place of the digest."""
    header: dict[str, Any] = {
        # First, so that the first zeros are those of the digest.
        "__metadata__": {
            "sha256": _ZEROS,
            "format": FORMAT,
            "version": str(VERSION),
            "echo_rt": __version__,
            "facts": json.dumps(metadata),
        }
    }
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    length = -(-(_LENGTH_BYTES + len(text)) // _ALIGNMENT) * _ALIGNMENT - _LENGTH_BYTES
    return length.to_bytes(_LENGTH_BYTES, "little") + text.ljust(length)


def _bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's values in row-major order; a view of a contiguous tensor on the host."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


# -------------------------------------------------------------------- reading


def read_file(path: str | Path) -> tuple[dict[str, Tensor], Any]:
    """Return the tensors, on the host, and the metadata that :func:`write_file` wrote to ``path``.

    Raises :class:`SnapshotError`, in one line, for a file that is missing, damaged (in a single bit, or cut short), or
    of another format; :class:`SnapshotVersionError` for a whole file of another version. Nothing in a file is executed.
    """
    if not is_path(path):
        raise SnapshotError(f"expected the path of a snapshot, got {path!r}")
    try:
        # By its descriptor, which stands for this very file; the library knows paths only.
        with open(open_plain(path), "rb") as file, safe_open(f"/proc/self/fd/{file.fileno()}", "pt") as opened:
            return _read(file, opened, path)
    except OSError as error:
        raise SnapshotError(f"{path}: expected a snapshot, cannot read it: {reason(error)}") from None
    except _UNREADABLE as error:
        what = f"expected a safetensors file, found a damaged or other one ({first_line(error):.200})"
        raise damaged(path, what) from None


def _read(file: BufferedReader, opened: Any, path: str | Path) -> tuple[dict[str, Tensor], Any]:
    labels: dict[str, str] = opened.metadata() or {}
    if labels.get("format") != FORMAT:
        raise SnapshotError(f"{path}: expected a snapshot, found a file of tensors with no {FORMAT!r} in its metadata")
    start = file.read(_LENGTH_BYTES)
    header = file.read(int.from_bytes(start, "little"))
    claimed = labels.get("sha256", "")
    if len(claimed) != len(_ZEROS) or header.count(claimed.encode()) != 1:
        raise damaged(path, "it has no checksum")
    digest = hashlib.sha256(start + header.replace(claimed.encode(), _ZEROS.encode()))
    while piece := file.read(_PIECE):
        digest.update(piece)
    if digest.hexdigest() != claimed:
        raise damaged(path, "its checksum is not that of its contents")
    if (version := labels.get("version")) not in _READ:
        raise SnapshotVersionError(
            f"{path}: expected a snapshot of version {' or '.join(_READ)}, found a whole one of version "
            f"{version!s:.20}, written by echo-rt {labels.get('echo_rt')!s:.20}; this is echo-rt {__version__}"
        )
    try:  # by the library of :func:`write_file`: a statistic of a block may be NaN
        facts = json.loads(labels.get("facts", ""))
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"its facts are not JSON: {error}") from None
    return {name: opened.get_tensor(name).clone() for name in opened.keys()}, facts  # noqa: SIM118


def damaged(path: str | Path, what: str) -> SnapshotError:
    """An error about a damaged file; ``what`` tells the damage."""
    return SnapshotError(f"{path}: the snapshot is damaged: {what}")
