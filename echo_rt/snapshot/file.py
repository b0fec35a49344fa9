"""Files of tensors and metadata: safetensors with a checksum over every byte, written whole or not at all.

The metadata of a file has the format and its version, the version of echo-rt, ``facts`` (one JSON object), and
``sha256``: the digest of the whole file, itself taken as zeros. Files of every version have format, version and
digest, so a whole file of another version can be told from a damaged one. Versions 1 and 2 differ in the tensors of
the KV buffer alone (:mod:`echo_rt.snapshot.kv_rows`).

Files are read and written by hand: the safetensors library maps a file (one that shrinks meanwhile is a bus error, and
what is used is not what was checked) or copies all tensors once more. Tensors are allocated only once the file is known
to be long enough to hold them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any

import torch
from msgspec import Meta
from torch import Tensor

from echo_rt.errors import SnapshotError, SnapshotVersionError
from echo_rt.options import is_path
from echo_rt.utils.atomic_file import open_plain, reason, whole_file
from echo_rt.utils.build_info import __version__
from echo_rt.utils.checked_json import convert, read_json
from echo_rt.utils.wording import plain

FORMAT, VERSION = "echo-rt snapshot", 2
_READ = ("1", "2")  # versions
_LENGTH_BYTES = 8
_ALIGNMENT = 64
_LONGEST_HEADER = 2**24  # names and shapes of some hundred tensors are a thousandth of this
_ZEROS = "0" * 64
_PIECE = 2**20  # bytes of another version's file in memory at once

_DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}

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

_Counts = list[Annotated[int, Meta(ge=0)]]


@dataclass
class _Entry:
    """The description of a tensor in the header."""

    dtype: str
    shape: Annotated[_Counts, Meta(max_length=16)]
    data_offsets: _Counts


def read_file(path: str | Path) -> tuple[dict[str, Tensor], Any]:
    """Return the tensors, on the host, and the metadata that :func:`write_file` wrote to ``path``.

    Raises :class:`SnapshotError`, in one line, for a file that is missing, damaged (in a single bit, or cut short), or
    of another format; :class:`SnapshotVersionError` for a whole file of another version. Nothing in a file is executed.
    """
    if not is_path(path):
        raise SnapshotError(f"expected the path of a snapshot, got {path!r}")
    try:
        with open(open_plain(path), "rb") as file:
            return _read(file, path)
    except OSError as error:
        raise SnapshotError(f"{path}: expected a snapshot, cannot read it: {reason(error)}") from None


def _read(file: BufferedReader, path: str | Path) -> tuple[dict[str, Tensor], Any]:
    size = file.seek(0, 2)
    file.seek(0)
    start = file.read(_LENGTH_BYTES)
    length = int.from_bytes(start, "little")
    if size < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
        if file.read(1) != b"{":  # which every header begins with
            raise SnapshotError(f"{path}: expected a snapshot, found a file that is no safetensors file")
        raise damaged(path, f"its header of {length} bytes does not fit into its {size} bytes")
    if length > _LONGEST_HEADER:
        raise damaged(path, f"its header is {length} bytes long, more than {_LONGEST_HEADER}")
    text = file.read(length)
    what = f"{path}: expected a snapshot, found a damaged file or one of something else"
    header = read_json(text, dict[str, Any], what, SnapshotError)
    labels = header.pop("__metadata__", None)
    if not isinstance(labels, dict) or labels.get("format") != FORMAT:
        raise SnapshotError(f"{path}: expected a snapshot, found a file of tensors with no {FORMAT!r} in its metadata")
    labels = convert(labels, dict[str, str], f"{path}: the snapshot is damaged", SnapshotError)
    claimed = labels.get("sha256", "")
    if len(claimed) != len(_ZEROS) or text.count(claimed.encode()) != 1:
        raise damaged(path, "it has no checksum")
    digest = hashlib.sha256(start + text.replace(claimed.encode(), _ZEROS.encode()))
    tensors: dict[str, Tensor] = {}
    known = labels.get("version") in _READ
    layout = _layout(header, size - _LENGTH_BYTES - length, path) if known else {}
    for name, (dtype, shape) in layout.items():
        try:
            tensors[name] = torch.empty(shape, dtype=dtype, device="cpu")
        except (RuntimeError, TypeError, OverflowError):
            raise damaged(path, f"no tensor has the shape of {name}") from None
        view = _bytes_of(tensors[name])
        if file.readinto(view) != len(view):
            raise damaged(path, "it became shorter while it was read")
        digest.update(view)
    while piece := file.read(_PIECE):  # all of another version's tensors
        digest.update(piece)
    if digest.hexdigest() != claimed:
        raise damaged(path, "its checksum is not that of its contents")
    if not known:
        raise SnapshotVersionError(
            f"{path}: expected a snapshot of version {' or '.join(_READ)}, found a whole one of version "
            f"{labels.get('version')!s:.20}, written by echo-rt {labels.get('echo_rt')!s:.20}; "
            f"this is echo-rt {__version__}"
        )
    try:  # by the library of :func:`write_file`: a statistic of a block may be NaN
        return tensors, json.loads(labels.get("facts", ""))
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"its facts are not JSON: {error}") from None


def damaged(path: str | Path, what: str) -> SnapshotError:
    """An error about a damaged file; ``what`` tells the damage."""
    return SnapshotError(f"{path}: the snapshot is damaged: {what}")


def _layout(header: Mapping[str, Any], size: int, path: str | Path) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Dtype and shape of every tensor, in the order of the file; together they are exactly ``size`` bytes."""
    layout: dict[str, tuple[torch.dtype, list[int]]] = {}
    end = 0
    for name, described in header.items():
        entry = convert(described, _Entry, f"{path}: the snapshot is damaged: {name!r:.80}", SnapshotError)
        dtype = _DTYPES.get(entry.dtype)
        if dtype is None:
            raise damaged(path, f"{name!r:.80} has the unknown dtype {entry.dtype!r:.20}")
        begin, end = end, end + math.prod(entry.shape) * dtype.itemsize
        if entry.data_offsets != [begin, end]:
            raise damaged(path, f"{name!r:.80} does not begin where the tensor before it ends")
        layout[name] = (dtype, entry.shape)
    if end != size:
        raise damaged(path, f"expected {end} bytes of tensors, found {size}")
    return layout
