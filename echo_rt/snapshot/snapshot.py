"""A stream's whole state between two blocks, and how it lies in a file.

Other programs read the tensors ``state.*``, ``prompt.N``, ``held.N.*`` and ``initial.latents`` of the safetensors file,
and all else as JSON under ``facts`` in its metadata.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor

from echo_rt.chunk import Chunk, ChunkStats
from echo_rt.errors import ConfigError, SnapshotError
from echo_rt.options import check_seed
from echo_rt.snapshot.file import damaged, read_file, write_file

T = TypeVar("T")

_STATE, _PROMPT, _HELD, _INITIAL, _NOW = "state.", "prompt.", "held.", "initial.latents", "prompt"
_LONGEST_NUMBER = 20  # digits
_METADATA = {
    "model": dict,
    "seed": int,
    "block": int,
    "memory_ready": bool,
    "latents_decoded": int,
    "held": list,
    "offset": int,
}
# Written only where they differ from these values, which most videos have.
_OPTIONAL: dict[str, Any] = {"initial_blocks": 0, "caller_noise": False, "prompt_facts": {}}


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Everything a stream needs to go on bit for bit, on the host. Made by :meth:`Stream.snapshot`; can be pickled.

    ``model`` describes the runtime it fits, in plain JSON types: a runtime that differs in any entry refuses it, except
    for the implementations that its user asked for by name.
    ``block``: the last block begun, in the numbers of the state; ``tensors``: the state behind it.
    ``prompts``: prompts that have not begun yet, by the block that begins with them; ``prompt``: that of the last block
    begun, None in the files of older versions. ``prompt_facts``: text and blend of each, by its block, or ``"now"``.
    ``held``: blocks that were made and not taken; a resumed stream hands them out first.
    ``offset``: how far the video's block numbers are ahead of the state's, after rollbacks.
    ``initial_blocks``: number of given blocks that the state begins with; ``initial_latents [frames, C, h, w]``: given
    blocks that are still to come, or None.
    ``caller_noise``: the video is made of its caller's noise, and can only be resumed with it.
    """

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
    prompt: Tensor | None = field(default=None, repr=False)
    prompt_facts: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def next_block(self) -> int:
        """Number of the first block that a stream resumed from here hands out."""
        return self.block + 1 + self.offset - len(self.held)

    def save(self, path: str | Path) -> None:
        """Write it to ``path``, one safetensors file that appears whole or not at all.

        Raises ``OutputError`` where it cannot be written, :class:`SnapshotError` for values that no file can hold.
        """
        tensors = {_STATE + name: tensor for name, tensor in self.tensors.items()}
        tensors |= {f"{_PROMPT}{block}": embeds for block, embeds in self.prompts.items()}
        for number, chunk in enumerate(self.held):
            tensors |= {f"{_HELD}{number}.frames": chunk.frames, f"{_HELD}{number}.latents": chunk.latents}
        if self.initial_latents is not None:
            tensors[_INITIAL] = self.initial_latents
        if self.prompt is not None:
            tensors[_NOW] = self.prompt
        write_file(path, tensors, self._metadata(path))

    def _metadata(self, path: str | Path) -> dict[str, Any]:
        model = dict(self.model)
        try:
            survives = json.loads(json.dumps(model)) == model
        except (TypeError, ValueError):
            survives = False
        if not survives:
            raise SnapshotError(f"{path}: the model's description is not plain JSON and would come back changed")
        held = [
            {"index": c.index, "first_frame": c.first_frame, "stats": dataclasses.asdict(c.stats)} for c in self.held
        ]
        values = {name: getattr(self, name) for name in (*_METADATA, *_OPTIONAL)} | {"model": model, "held": held}
        return {name: value for name, value in values.items() if name not in _OPTIONAL or value != _OPTIONAL[name]}

    @staticmethod
    def load(path: str | Path) -> Snapshot:
        """Read what :meth:`save` wrote to ``path``; :class:`SnapshotError` for a damaged file, or another one."""
        tensors, metadata = read_file(path)
        if set(metadata) - set(_OPTIONAL) != set(_METADATA):
            raise damaged(path, f"expected {', '.join(_METADATA)}, found {', '.join(metadata) or 'none':.200}")
        metadata = _OPTIONAL | metadata
        for name, kind in (_METADATA | {name: type(value) for name, value in _OPTIONAL.items()}).items():
            if type(metadata[name]) is not kind:
                raise damaged(path, f"expected {name} to be {kind.__name__}, found {type(metadata[name]).__name__}")
        try:
            check_seed(metadata["seed"])
        except ConfigError as error:
            raise damaged(path, str(error)) from None
        metadata["prompts"] = _prompts(tensors, path)
        metadata["held"] = tuple(_chunk(number, entry, tensors, path) for number, entry in enumerate(metadata["held"]))
        metadata["initial_latents"], metadata["prompt"] = tensors.pop(_INITIAL, None), tensors.pop(_NOW, None)
        if surplus := [name for name in tensors if not name.startswith(_STATE)]:
            raise damaged(path, f"it holds tensors that no snapshot has: {', '.join(surplus):.200}")
        return Snapshot(tensors={name.removeprefix(_STATE): t for name, t in tensors.items()}, **metadata)


def _prompts(tensors: dict[str, Tensor], path: str | Path) -> dict[int, Tensor]:
    """Take the prompts out of ``tensors``; returns them by block."""
    prompts: dict[int, Tensor] = {}
    for name in [name for name in tensors if name.startswith(_PROMPT)]:
        block = name.removeprefix(_PROMPT)
        if not (block.isascii() and block.isdecimal() and len(block) < _LONGEST_NUMBER):
            raise damaged(path, f"{name!r:.80} names no block")
        prompts[int(block)] = tensors.pop(name)
    return prompts


def _chunk(number: int, entry: object, tensors: dict[str, Tensor], path: str | Path) -> Chunk:
    """Take held block ``number`` out of ``tensors``; ``entry`` is its metadata."""
    frames = tensors.pop(f"{_HELD}{number}.frames", None)
    latents = tensors.pop(f"{_HELD}{number}.latents", None)
    if frames is None or frames.dtype != torch.uint8 or frames.dim() != 4 or frames.shape[3] != 3:
        raise damaged(path, f"held block {number} has no frames")
    if latents is None or latents.dtype != torch.float32 or latents.dim() != 4:
        raise damaged(path, f"held block {number} has no latents")
    try:
        if not isinstance(entry, dict) or set(entry) != {"index", "first_frame", "stats"}:
            raise TypeError
        if type(entry["index"]) is not int or type(entry["first_frame"]) is not int:
            raise TypeError
        stats = _record(ChunkStats, entry["stats"])
    except TypeError:
        raise damaged(path, f"the metadata of held block {number} is not that of a block") from None
    return Chunk(index=entry["index"], frames=frames, first_frame=entry["first_frame"], latents=latents, stats=stats)


def _record(kind: type[T], values: object) -> T:
    """Make a dataclass of plain values from its ``asdict``; ``TypeError`` unless each value is of its field's type."""
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
