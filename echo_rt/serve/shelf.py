"""Snapshots and recordings of a live video, in one folder; clients name them, never a path."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from echo_rt.errors import ConfigError, SnapshotError
from echo_rt.snapshot.snapshot import Snapshot
from echo_rt.utils.atomic_file import write_whole
from echo_rt.utils.checked_json import read_json
from echo_rt.utils.folder_lock import FolderClaim

_SNAPSHOT = re.compile(r"[0-9]{8}-[0-9]{9}-block-([0-9]+)\.safetensors")
_RECORDING = re.compile(r"[0-9]{8}-[0-9]{9}\.mp4")
_MOST_SNAPSHOTS, _MOST_RECORDINGS = 8, 32


@dataclass
class Notes:
    """What a snapshot does not hold: the prompts, with the blocks they begin at, and what was asked for."""

    prompts: list[dict[str, Any]] = field(default_factory=list)
    seed: int = 0
    memory: str | None = None


class Shelf:
    """Keeps the last few snapshots, and recordings up to a number of them. Holds the folder until closed.

    ``TargetError`` where the folder cannot be made or another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._claim = folder, FolderClaim(folder)
        self.close = self._claim.release

    def snapshots(self) -> list[dict[str, Any]]:
        """List the snapshots, newest first: name, block, bytes."""
        found = [(path, match) for path in self._folder.iterdir() if (match := _SNAPSHOT.fullmatch(path.name))]
        return [{"name": path.stem, "block": int(match[1]), **_size(path)} for path, match in sorted(found)[::-1]]

    def recordings(self) -> list[dict[str, Any]]:
        """List the finished recordings, newest first: name, bytes."""
        found = [path for path in self._folder.iterdir() if _RECORDING.fullmatch(path.name)]
        return [{"name": path.name, **_size(path)} for path in sorted(found)[::-1]]

    def keep(self, snapshot: Snapshot, notes: Notes) -> str:
        """Write a snapshot and its notes, and remove the oldest; returns its name. Raises ``OutputError``."""
        name = f"{_now()}-block-{snapshot.next_block}"
        write_whole(self._folder / f"{name}.json", msgspec.json.encode(notes))
        snapshot.save(self._folder / f"{name}.safetensors")
        for old in self.snapshots()[_MOST_SNAPSHOTS:]:
            for ending in ("safetensors", "json"):
                (self._folder / f"{old['name']}.{ending}").unlink(missing_ok=True)
        return name

    def open(self, name: str) -> tuple[Snapshot, Notes]:
        """Read a snapshot; :class:`SnapshotError` where there is none of that name, or it is damaged."""
        if name not in [found["name"] for found in self.snapshots()]:
            raise SnapshotError(f"expected the name of a snapshot, found {name[:80]!r}")
        notes = self._folder / f"{name}.json"
        snapshot = Snapshot.load(self._folder / f"{name}.safetensors")
        return snapshot, read_json(notes.read_bytes(), Notes, str(notes), SnapshotError) if notes.exists() else Notes()

    def new_recording(self) -> Path:
        """Return the file of a new recording; :class:`ConfigError` where there are too many."""
        if len(self.recordings()) >= _MOST_RECORDINGS:
            raise ConfigError(f"there are {_MOST_RECORDINGS} recordings, the most; remove some from {self._folder}")
        return self._folder / f"{_now()}.mp4"

    def recording(self, name: str) -> Path:
        """Return a recording's file; :class:`ConfigError` where there is none of that name."""
        if name not in [found["name"] for found in self.recordings()]:
            raise ConfigError(f"expected the name of a recording, found {name[:80]!r}")
        return self._folder / name


def _size(path: Path) -> dict[str, int]:
    return {"bytes": path.stat().st_size}


def _now() -> str:
    seconds = time.time()
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime(seconds))}{int(seconds * 1000) % 1000:03}"
