"""A stream's whole state between two blocks, and how it lies in a file.

Other programs read the tensors ``state.*``, ``prompt.N``, ``held.N.*`` and ``initial.latents`` of the safetensors file,
and all else as JSON under ``facts`` in its metadata.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from echo_rt.chunk import Chunk
from echo_rt.errors import ConfigError, SnapshotError
from echo_rt.options import check_seed
from echo_rt.snapshot.file import damaged, read_file, write_file
from echo_rt.utils.checked_json import convert

_STATE, _HELD, _INITIAL, _NOW = "state.", "held.", "initial.latents", "prompt"
_PROMPT = re.compile(r"prompt\.([0-9]{1,19})")
_TENSORS = ("tensors", "prompts", "prompt", "initial_latents")  # fields that are no facts
# Newer facts, with the values for which they are left out of a file.
_LEFT_OUT: dict[str, Any] = {"initial_blocks": 0, "caller_noise": False, "prompt_facts": {}}
_SEEDS = 2**64
# Added to the seed at each rollback: odd, so that 2^64 seeds in a row are all different.
_RESEED = 0x9E3779B97F4A7C15
_MOST_ROLLBACKS = 2**20


def reseeded(seed: int) -> int:
    """Return the seed of a video's noise after one more rollback."""
    return (seed + _RESEED) % _SEEDS


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
        tensors |= {f"prompt.{block}": embeds for block, embeds in self.prompts.items()}
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
        facts = vars(self) | {"model": model, "held": held}
        return {name: value for name, value in facts.items() if name not in _TENSORS and value != _LEFT_OUT.get(name)}

    def is_of_video(self, seed: int) -> bool:
        """Whether its video may have been begun with ``seed``, which each rollback since then has changed."""
        rollbacks = (self.seed - seed) * pow(_RESEED, -1, _SEEDS) % _SEEDS
        return rollbacks <= _MOST_ROLLBACKS

    @staticmethod
    def load(path: str | Path) -> Snapshot:
        """Read what :meth:`save` wrote to ``path``; :class:`SnapshotError` for a damaged file, or another one."""
        tensors, metadata = read_file(path)
        what = f"{path}: the snapshot is damaged"
        facts = convert(metadata, dict[str, Any], what, SnapshotError)
        held = convert(facts.get("held"), list[dict[str, Any]], f"{what}: its held blocks", SnapshotError)
        for number, block in enumerate(held):
            block |= {name: tensors.pop(f"{_HELD}{number}.{name}", None) for name in ("frames", "latents")}
        facts |= {
            "held": held,
            "prompts": {int(name[1]): tensors.pop(name[0]) for name in map(_PROMPT.fullmatch, [*tensors]) if name},
            "prompt": tensors.pop(_NOW, None),
            "initial_latents": tensors.pop(_INITIAL, None),
            "tensors": {name.removeprefix(_STATE): t for name, t in tensors.items() if name.startswith(_STATE)},
        }
        if surplus := [name for name in tensors if not name.startswith(_STATE)]:
            raise damaged(path, f"it holds tensors that no snapshot has: {', '.join(surplus):.200}")
        snapshot = convert(facts, Snapshot, what, SnapshotError)
        for number, chunk in enumerate(snapshot.held):
            frames, latents = chunk.frames, chunk.latents
            if frames.dtype != torch.uint8 or frames.dim() != 4 or frames.shape[3] != 3:
                raise damaged(path, f"held block {number} has no frames")
            if latents.dtype != torch.float32 or latents.dim() != 4:
                raise damaged(path, f"held block {number} has no latents")
        try:
            check_seed(snapshot.seed)
        except ConfigError as error:
            raise damaged(path, str(error)) from None
        return snapshot
