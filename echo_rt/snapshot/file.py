"""Snapshots as files: one safetensors file each, with a checksum over every byte, written whole or not at all.

What a reader of other programs sees: the tensors under ``state.*``, ``prompt.N`` and ``held.N.*``, of a video that is
not yet past what it was given to begin with ``initial.latents`` as well, and in the metadata the format and its
version, the version of echo-rt, all other facts as one JSON object, and ``sha256``: the digest of the whole file,
itself taken as zeros. Format, version and digest are what files of every version have, so a file of another one can be
told from a damaged one.

Files are read and written by hand. The safetensors library maps a file (one that shrinks meanwhile is a bus error, and
what is used is not what was checked) or makes a second copy of all tensors, and it writes metadata in an order that
changes from call to call. The tensors are allocated only when the file is known to be long enough to hold them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor

from echo_rt.chunk import Chunk, ChunkStats
from echo_rt.errors import ConfigError, SnapshotError, SnapshotVersionError
from echo_rt.options import check_seed
from echo_rt.utils.atomic_file import reason, whole_file
from echo_rt.utils.build_info import __version__
from echo_rt.utils.wording import plain

T = TypeVar("T")

FORMAT, VERSION = "echo-rt snapshot", 1
_LENGTH_BYTES = 8
_ALIGNMENT = 64
_LONGEST_HEADER = 2**24  # names and shapes of some hundred tensors are a thousandth of this
_ZEROS = "0" * 64
_MOST_DIMENSIONS = 16
_LONGEST_NUMBER = 20  # digits
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
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_STATE, _PROMPT, _HELD = "state.", "prompt.", "held."
_INITIAL = "initial.latents"
_FACTS = {
    "model": dict,
    "seed": int,
    "block": int,
    "memory_ready": bool,
    "latents_decoded": int,
    "held": list,
    "offset": int,
}
# Those that most videos do not have: the file names them only where they are not these.
_RARE_FACTS: dict[str, bool | int] = {"initial_blocks": 0, "caller_noise": False}


@dataclass(frozen=True, eq=False)
class SnapshotData:
    """What a snapshot holds; :class:`echo_rt.Snapshot` says what each of it is."""

    model: Mapping[str, Any] = field(repr=False)
    seed: int
    block: int
    memory_ready: bool
    latents_decoded: int
    tensors: Mapping[str, Tensor] = field(repr=False)
    prompts: Mapping[int, Tensor] = field(repr=False)
    held: tuple[Chunk, ...] = ()
    offset: int = 0
    initial_blocks: int = 0
    caller_noise: bool = False
    initial_latents: Tensor | None = field(default=None, repr=False)


# -------------------------------------------------------------------- writing


def save_snapshot(snapshot: SnapshotData, path: str | Path) -> None:
    """Write ``snapshot`` to ``path``: beside it first, then to the disk, then into place.

    The digest takes one pass of SHA-256 over the data, outside the interpreter's lock like the writing itself.
    Raises ``OutputError`` where it cannot be written (what stood there before stays), :class:`SnapshotError` for a
    snapshot that no file can hold.
    """
    tensors = _tensors_of(snapshot, path)
    header = _header(tensors, _facts_of(snapshot, path))
    with whole_file(path) as part:
        digest = hashlib.sha256(header)
        part.append(header)
        for tensor in tensors.values():
            data = _bytes_of(tensor)
            digest.update(data)
            part.append(data)
        part.overwrite(header.index(_ZEROS.encode()), digest.hexdigest().encode())


def _tensors_of(snapshot: SnapshotData, path: str | Path) -> dict[str, Tensor]:
    """Every tensor by its name in the file, wide numbers first: so each begins at a multiple of its own size."""
    named = {_STATE + name: tensor for name, tensor in snapshot.tensors.items()}
    named |= {f"{_PROMPT}{block}": embeds for block, embeds in snapshot.prompts.items()}
    for number, chunk in enumerate(snapshot.held):
        named |= {f"{_HELD}{number}.frames": chunk.frames, f"{_HELD}{number}.latents": chunk.latents}
    if snapshot.initial_latents is not None:
        named[_INITIAL] = snapshot.initial_latents
    for name, tensor in named.items():
        if tensor.dtype not in _CODES:
            raise SnapshotError(f"{path}: {name} is {plain(tensor.dtype)}, which a snapshot's file cannot hold")
    return dict(sorted(named.items(), key=lambda item: (-item[1].element_size(), item[0])))


def _facts_of(snapshot: SnapshotData, path: str | Path) -> dict[str, Any]:
    model = dict(snapshot.model)
    try:
        survives = json.loads(json.dumps(model)) == model
    except (TypeError, ValueError):
        survives = False
    if not survives:
        raise SnapshotError(f"{path}: the facts of the model are not plain JSON and would come back as others")
    held = [
        {"index": c.index, "first_frame": c.first_frame, "stats": dataclasses.asdict(c.stats)} for c in snapshot.held
    ]
    rare = {name: getattr(snapshot, name) for name in _RARE_FACTS}
    rare = {name: value for name, value in rare.items() if value != _RARE_FACTS[name]}
    return {name: getattr(snapshot, name) for name in _FACTS} | rare | {"model": model, "held": held}


def _header(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> bytes:
    """Length and JSON of a safetensors file, with zeros where the digest goes."""
    header: dict[str, Any] = {
        # First, so that the zeros found first are the ones meant.
        "__metadata__": {
            "sha256": _ZEROS,
            "format": FORMAT,
            "version": str(VERSION),
            "echo_rt": __version__,
            "facts": json.dumps(facts),
        }
    }
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    room = -(-(_LENGTH_BYTES + len(text)) // _ALIGNMENT) * _ALIGNMENT - _LENGTH_BYTES
    return room.to_bytes(_LENGTH_BYTES, "little") + text.ljust(room)


def _bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's values, row by row; a view where it lies so on the host already."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


# -------------------------------------------------------------------- reading


def load_snapshot(path: str | Path, make: Callable[..., T]) -> T:
    """The snapshot in ``path``, all of it on the host: what ``make`` makes of a :class:`SnapshotData`'s entries.

    Raises :class:`SnapshotError`, in one line, for a file that is missing, damaged (in a single bit, or cut short), or
    of another format; :class:`SnapshotVersionError` for a whole one of a version that this one does not read. Nothing
    in a file is ever executed.
    """
    try:
        if stat.S_ISFIFO(os.stat(path).st_mode):  # to open one is to wait for whoever fills it
            raise SnapshotError(f"{path}: expected a snapshot, came a pipe")
        with open(path, "rb", buffering=0) as file:
            return make(**_read(file, path))
    except OSError as error:
        raise SnapshotError(f"{path}: expected a snapshot, cannot read it: {reason(error)}") from None


def _read(file: FileIO, path: str | Path) -> dict[str, Any]:
    size = file.seek(0, 2)
    file.seek(0)
    start = _take(file, min(_LENGTH_BYTES, size), path)
    length = int.from_bytes(start, "little")
    if size < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
        raise _damaged(path, f"its header of {length} bytes does not fit into its {size} bytes")
    if length > _LONGEST_HEADER:
        raise _damaged(path, f"its header is {length} bytes long, more than {_LONGEST_HEADER}")
    text = _take(file, length, path)
    header, metadata = _parse(text, path)
    claimed = metadata.get("sha256", "")
    if len(claimed) != len(_ZEROS) or text.count(claimed.encode()) != 1:
        raise _damaged(path, "it has no checksum")
    digest = hashlib.sha256(start + text.replace(claimed.encode(), _ZEROS.encode()))
    if metadata.get("version") != str(VERSION):
        while piece := file.read(_PIECE):
            digest.update(piece)
        _require_digest(digest.hexdigest(), claimed, path)
        raise SnapshotVersionError(
            f"{path}: expected a snapshot of version {VERSION}, came a whole one of version "
            f"{metadata.get('version')!s:.20}, written by echo-rt {metadata.get('echo_rt')!s:.20}; "
            f"this is echo-rt {__version__}"
        )
    layout = _layout(header, size - _LENGTH_BYTES - length, path)
    tensors: dict[str, Tensor] = {}
    for name, (dtype, shape) in layout.items():
        try:
            tensor = torch.empty(shape, dtype=dtype, device="cpu")
        except (RuntimeError, TypeError, OverflowError):
            raise _damaged(path, f"no tensor has the shape of {name}") from None
        view = _bytes_of(tensor)
        _fill(file, view, path)
        digest.update(view)
        tensors[name] = tensor
    _require_digest(digest.hexdigest(), claimed, path)
    return _rebuild(metadata.get("facts", ""), tensors, path)


def _damaged(path: str | Path, what: str) -> SnapshotError:
    return SnapshotError(f"{path}: the snapshot is damaged: {what}")


def _require_digest(digest: str, claimed: str, path: str | Path) -> None:
    if digest != claimed:
        raise _damaged(path, "its checksum is not that of its contents")


def _fill(file: FileIO, view: memoryview, path: str | Path) -> None:
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise _damaged(path, "it became shorter while it was read")
        done += count


def _take(file: FileIO, count: int, path: str | Path) -> bytes:
    data = bytearray(count)
    _fill(file, memoryview(data), path)
    return bytes(data)


def _json(text: str | bytes, path: str | Path) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise SnapshotError(f"{path}: expected a snapshot, came a damaged file or one of something else")
    return parsed


def _parse(text: bytes, path: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The header's entries and, apart from them, its metadata: those of a snapshot."""
    header = _json(text, path)
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        metadata = {}
    if metadata.get("format") != FORMAT:
        raise SnapshotError(f"{path}: expected a snapshot, came a file of tensors with no {FORMAT!r} in its metadata")
    return header, metadata


def _layout(header: Mapping[str, Any], size: int, path: str | Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of every tensor, in the order of the file; they fill its ``size`` bytes of data exactly."""
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    end = 0
    for name, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise _damaged(path, f"{name!r:.80} is described by no dtype, shape and offsets")
        code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(code, str) or code not in _DTYPES:
            raise _damaged(path, f"{name!r:.80} has the unknown dtype {code!r:.20}")
        if not _are_counts(shape) or len(shape) > _MOST_DIMENSIONS or not _are_counts(offsets):
            raise _damaged(path, f"{name!r:.80} has the shape {shape!r:.80} at {offsets!r:.80}")
        begin, end = end, end + math.prod(shape) * _DTYPES[code].itemsize
        if offsets != [begin, end]:
            raise _damaged(path, f"{name!r:.80} is not where the tensor before it ends")
        layout[name] = (_DTYPES[code], tuple(shape))
    if end != size:
        raise _damaged(path, f"expected {end} bytes of tensors, came {size}")
    return layout


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _rebuild(text: str, tensors: dict[str, Tensor], path: str | Path) -> dict[str, Any]:
    facts = _json(text, path)
    if set(facts) - set(_RARE_FACTS) != set(_FACTS):
        raise _damaged(path, f"expected the facts {', '.join(_FACTS)}, came {', '.join(facts) or 'none':.200}")
    facts = _RARE_FACTS | facts
    for name, kind in (_FACTS | {name: type(value) for name, value in _RARE_FACTS.items()}).items():
        if type(facts[name]) is not kind:
            raise _damaged(path, f"expected {name} to be {kind.__name__}, came {type(facts[name]).__name__}")
    try:
        check_seed(facts["seed"])
    except ConfigError as error:
        raise _damaged(path, str(error)) from None
    prompts = _prompts(tensors, path)
    facts["held"] = tuple(_chunk(number, entry, tensors, path) for number, entry in enumerate(facts["held"]))
    initial = tensors.pop(_INITIAL, None)
    if initial is not None and (initial.dtype != torch.float32 or initial.dim() != 4):
        raise _damaged(path, f"the latents to begin with are {plain(initial.dtype)} {list(initial.shape)}")
    surplus = [name for name in tensors if not name.startswith(_STATE)]
    if surplus:
        raise _damaged(path, f"it holds tensors that no snapshot has: {', '.join(surplus):.200}")
    state = {name.removeprefix(_STATE): tensor for name, tensor in tensors.items()}
    return {**facts, "tensors": state, "prompts": prompts, "initial_latents": initial}


def _prompts(tensors: dict[str, Tensor], path: str | Path) -> dict[int, Tensor]:
    """The prompts by their block, taken out of ``tensors``."""
    prompts: dict[int, Tensor] = {}
    for name in [name for name in tensors if name.startswith(_PROMPT)]:
        embeds, block = tensors.pop(name), name.removeprefix(_PROMPT)
        if not (block.isascii() and block.isdecimal() and len(block) < _LONGEST_NUMBER):
            raise _damaged(path, f"{name!r:.80} names no block")
        if embeds.dim() != 2 or not embeds.is_floating_point():
            raise _damaged(path, f"its prompt for block {block} is {plain(embeds.dtype)} {list(embeds.shape)}")
        prompts[int(block)] = embeds
    return prompts


def _chunk(number: int, entry: object, tensors: dict[str, Tensor], path: str | Path) -> Chunk:
    frames = tensors.pop(f"{_HELD}{number}.frames", None)
    latents = tensors.pop(f"{_HELD}{number}.latents", None)
    if frames is None or frames.dtype != torch.uint8 or frames.dim() != 4 or frames.shape[3] != 3:
        raise _damaged(path, f"block {number} of those it holds has no frames")
    if latents is None or latents.dtype != torch.float32 or latents.dim() != 4:
        raise _damaged(path, f"block {number} of those it holds has no latents")
    try:
        if not isinstance(entry, dict) or set(entry) != {"index", "first_frame", "stats"}:
            raise TypeError
        if type(entry["index"]) is not int or type(entry["first_frame"]) is not int:
            raise TypeError
        stats = _record(ChunkStats, entry["stats"])
    except TypeError:
        raise _damaged(path, f"the figures of block {number} of those it holds are not those of a block") from None
    return Chunk(index=entry["index"], frames=frames, first_frame=entry["first_frame"], latents=latents, stats=stats)


def _record(kind: type[T], values: object) -> T:
    """A dataclass of plain values from what ``asdict`` made of it; ``TypeError`` unless each is of its own type."""
    hints = get_type_hints(kind)
    if not isinstance(values, dict) or set(values) != set(hints):
        raise TypeError
    made: dict[str, Any] = {}
    for name, hint in hints.items():
        value = values[name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            made[name] = _record(hint, value)
        elif type(value) is bool and hint is not bool:
            raise TypeError
        elif isinstance(value, hint) or (type(value) is int and isinstance(0.0, hint)):
            made[name] = value
        else:
            raise TypeError
    return kind(**made)
