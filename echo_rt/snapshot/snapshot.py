"""A stream's whole state between two blocks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from echo_rt.snapshot.file import SnapshotData, load_snapshot, save_snapshot


@dataclass(frozen=True, eq=False)
class Snapshot(SnapshotData):
    """Everything a stream needs to go on bit for bit, on the host. Made by :meth:`Stream.snapshot`; can be pickled.

    ``model`` describes the runtime it fits (plain JSON types): a runtime that differs in any entry refuses it, but for
    the ways of computing that its user asked for by name.
    ``prompts``: those that were set and not yet switched to, by the block that begins with them.
    ``held``: blocks that were made and not yet handed out; a resumed stream hands them out first.
    ``offset``: how far the video's block numbers are ahead of the state's ``block``, after rollbacks.
    ``initial_blocks``: how many blocks of the state were given to begin with; ``initial_latents [frames, C, h, w]``:
    those that are still to come, whole blocks, or None.
    ``caller_noise``: the video is made of noise that its caller gives, and goes on with it alone.
    """

    @property
    def next_block(self) -> int:
        """The number of the block that a stream resumed from here hands out first."""
        return self.block + 1 + self.offset - len(self.held)

    def save(self, path: str | Path) -> None:
        """Write it to ``path``, one safetensors file that appears whole or not at all; raises ``OutputError``."""
        save_snapshot(self, path)

    @staticmethod
    def load(path: str | Path) -> Snapshot:
        """What :meth:`save` wrote to ``path``; :class:`SnapshotError` where the file is damaged, or another."""
        return load_snapshot(path, Snapshot)
