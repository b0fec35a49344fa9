"""A stream's whole state between two blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from echo_rt.chunk import Chunk


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Everything a stream needs to go on bit for bit, on the host. Made by :meth:`Stream.snapshot`; can be pickled.

    ``model`` describes the runtime it fits (plain JSON types): a runtime that differs in any entry refuses it, but for
    the ways of computing that its user asked for by name.
    ``prompts``: those that were set and not yet switched to, by the block that begins with them.
    ``held``: blocks that were made and not yet handed out; a resumed stream hands them out first.
    ``offset``: how far the video's block numbers are ahead of the state's ``block``, after rollbacks.
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

    @property
    def next_block(self) -> int:
        """The number of the block that a stream resumed from here hands out first."""
        return self.block + 1 + self.offset - len(self.held)

    def save(self, path: str | Path) -> None:
        """Write it to ``path``, one safetensors file that appears whole or not at all; raises ``OutputError``."""
        from echo_rt.snapshot_file import save_snapshot

        save_snapshot(self, path)

    @staticmethod
    def load(path: str | Path) -> Snapshot:
        """What :meth:`save` wrote to ``path``; :class:`SnapshotError` where the file is damaged, or another."""
        from echo_rt.snapshot_file import load_snapshot

        return load_snapshot(path)
