"""What is stored of a session, in a folder or below an address: snapshots, recordings, a log of changes.

Clients name snapshots and recordings, never a path.
"""

from __future__ import annotations

import logging
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypedDict

import fsspec.core
import msgspec
from fsspec.implementations.local import LocalFileSystem
from msgspec import Meta

from echo_rt.errors import ConfigError, OutputError, SnapshotError
from echo_rt.serve.encoder import plays
from echo_rt.snapshot.snapshot import Snapshot
from echo_rt.stream import Stream
from echo_rt.utils.atomic_file import close_all, write_whole
from echo_rt.utils.checked_json import convert, read_json
from echo_rt.utils.folder_lock import FolderClaim
from echo_rt.utils.wording import first_line, with_type

_SNAPSHOT = re.compile(r"([0-9]{8}-[0-9]{9}-block-([0-9]+))\.safetensors")
_RECORDING = re.compile(r"[0-9]{8}-[0-9]{9}\.mp4")
_LOGGED = re.compile(r"prompt-([0-9]{10})\.json")
_OWNER = "owner.json"
_CURRENT = "current"  # folder of the automatic snapshots, apart from those that viewers asked for
_MOST_RECORDINGS = 32
_MOST_PROMPTS = 200  # remembered

logger = logging.getLogger("echo_rt.serve")

_Count = Annotated[int, Meta(ge=0)]


class Entry(TypedDict):
    """A prompt, the block that begins with it, blocks that it is blended in over, and the time."""

    text: str
    block: _Count
    over: int | None
    asked: float


class Values(TypedDict, total=False):
    """What else of a session changes."""

    paused: bool
    recording: str | None


@dataclass
class Notes:
    """What a snapshot does not hold: the prompts, with the blocks they begin at, and what was asked for.

    ``recording``: name of the one that runs; ``logged``: number of changes so far, which are in the log; ``base``: that
    of the pictures shown before this video; ``shown``: of those shown when the snapshot was taken; ``epoch``: of the
    pictures' times.
    """

    prompts: list[Entry] = field(default_factory=list)
    seed: _Count = 0
    memory: str | None = None
    paused: bool = False
    recording: str | None = None
    logged: _Count = 0
    base: int = 0  # below 0 where a snapshot of a longer video was resumed
    shown: _Count = 0
    epoch: float | None = None


class Shelf:
    """Keeps the last ``most`` snapshots, and recordings up to a number of them.

    ``place``: a folder, or an address of fsspec's such as ``s3://bucket/live``. ``claim``: hold the folder until
    :meth:`close`; ``TargetError`` where it cannot be made or another process holds it.
    """

    def __init__(self, place: str | Path, *, most: int = 8, claim: bool = True) -> None:
        try:
            self._fs, self._root = fsspec.core.url_to_fs(str(place))
        except (ImportError, ValueError) as error:
            raise ConfigError(f"{place}: expected a folder or an object store: {first_line(error)}") from None
        self._most = most
        self._close: Callable[[], None] = lambda: None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._owner: str | None = None
        if isinstance(self._fs, LocalFileSystem):
            self._folder = Path(self._root)
            if claim:
                self._close = FolderClaim(Path(place)).release
            else:
                self._folder.mkdir(parents=True, exist_ok=True)
        else:
            self._scratch = tempfile.TemporaryDirectory(prefix="echo-rt-")
            self._folder = Path(self._scratch.name)

    def close(self) -> None:
        """Let go of the folder."""
        self._close()
        if self._scratch is not None:
            self._scratch.cleanup()

    def take_over(self) -> None:
        """Make whoever had the place before write no more: a machine that cannot be reached may still run."""
        owner = secrets.token_hex(8)
        self._write_json(_OWNER, owner)
        self._owner = owner

    def snapshots(self) -> list[dict[str, Any]]:
        """List the snapshots, newest first: name, block, bytes."""
        return [{"name": m[1], "block": int(m[2]), "bytes": size} for m, size in self._matching(_SNAPSHOT)[::-1]]

    def recordings(self) -> list[dict[str, Any]]:
        """List the finished recordings, newest first: name, bytes."""
        return [{"name": match[0], "bytes": size} for match, size in self._matching(_RECORDING)[::-1]]

    def keep(self, snapshot: Snapshot, notes: Notes, taken_at: float | None = None) -> str:
        """Write a snapshot and its notes, and remove the oldest; returns its name. Raises ``OutputError``."""
        name = f"{_stamp(taken_at or time.time())}-block-{snapshot.next_block}"
        self._write_json(f"{name}.json", notes)
        self._write(f"{name}.safetensors", snapshot.save)
        for old in self.snapshots()[self._most :]:
            for ending in ("safetensors", "json"):
                self._remove(f"{old['name']}.{ending}")
        return name

    def open(self, name: str) -> tuple[Snapshot, Notes]:
        """Read a snapshot; :class:`SnapshotError` where there is none of that name, or it is damaged."""
        if name not in [found["name"] for found in self.snapshots()]:
            raise SnapshotError(f"expected the name of a snapshot, found {name[:80]!r}")
        with self._reading(f"{name}.safetensors") as file:
            snapshot = Snapshot.load(file)
        return snapshot, self.read_json(f"{name}.json", Notes) or Notes()

    # ---------------------------------------------------------------- the log

    def log(self, number: int, entry: Mapping[str, Any]) -> None:
        """Write change ``number`` of the log, in place of one of that number; raises ``OutputError``."""
        self._write_json(f"prompt-{number:010}.json", entry)

    def logged(self, after: int) -> Iterator[Mapping[str, Any]]:
        """Yield the changes of the log with numbers above ``after``, in order: an :class:`Entry` or :class:`Values`.

        Raises ``SnapshotError``.
        """
        for match, _ in self._matching(_LOGGED):
            if int(match[1]) > after and (change := self.read_json(match[0], dict[str, Any])) is not None:
                kind: type[Any] = Values if change.keys() <= Values.__annotations__.keys() else Entry
                yield convert(change, kind, f"{self._root}/{match[0]}", SnapshotError)

    def forget(self, until: int) -> None:
        """Remove the changes of the log up to number ``until``."""
        for match, _ in self._matching(_LOGGED):
            if int(match[1]) <= until:
                self._remove(match[0])

    # ---------------------------------------------------------------- recordings

    def new_recording(self) -> Path:
        """Return the file of a new recording; :class:`ConfigError` where there are too many."""
        if len(self.recordings()) >= _MOST_RECORDINGS:
            raise ConfigError(f"there are {_MOST_RECORDINGS} recordings, the most; remove some from {self._root}")
        return self._folder / f"{_stamp(time.time())}.mp4"

    def hand_in(self, recording: Path) -> None:
        """Store a finished recording that :meth:`new_recording` named, if it has pictures; raises ``OutputError``."""
        if self._scratch is not None and recording.exists():
            self._write(recording.name, recording.replace)

    def find_cut_short(self) -> None:
        """Give recordings that a killed process left in the folder their names; those of no picture are removed."""
        for part in self._folder.glob(".*.mp4"):
            if _RECORDING.fullmatch(part.name[1:]):
                if plays(part):
                    part.replace(part.with_name(part.name[1:]))
                else:
                    part.unlink()

    def recording(self, name: str) -> str:
        """Return a recording's path or address; :class:`ConfigError` where there is none of that name."""
        if name not in [found["name"] for found in self.recordings()]:
            raise ConfigError(f"expected the name of a recording, found {name[:80]!r}")
        path = f"{self._root}/{name}"
        return path if self._scratch is None else self._fs.unstrip_protocol(path)

    # ---------------------------------------------------------------- files

    def _matching(self, pattern: re.Pattern[str]) -> list[tuple[re.Match[str], int]]:
        """The files whose names match, in order, with their bytes."""
        self._fs.invalidate_cache()
        try:
            listed = self._fs.ls(self._root, detail=True)
        except FileNotFoundError:  # an object store has no empty folders
            return []
        names = sorted((entry["name"].rpartition("/")[2], entry["size"] or 0) for entry in listed)
        return [(match, size) for name, size in names if (match := pattern.fullmatch(name))]

    def _write_json(self, name: str, value: Any) -> None:
        self._write(name, lambda path: write_whole(path, msgspec.json.encode(value)))

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        """Have ``write`` make the file, and store it: whole or not at all."""
        if self._owner is not None and self.read_json(_OWNER, str) != self._owner:
            raise OutputError(f"{self._root}/{name}: another process has taken over")
        if self._scratch is None:
            write(self._folder / name)
            return
        part = self._folder / f"part-{name}"
        try:
            write(part)
            self._fs.put_file(str(part), f"{self._root}/{name}")
        except Exception as error:  # of any kind, from the store's own library
            raise OutputError(f"{self._root}/{name}: cannot be written: {with_type(error)}") from None
        finally:
            part.unlink(missing_ok=True)

    @contextmanager
    def _reading(self, name: str) -> Iterator[Path]:
        if self._scratch is None:
            yield self._folder / name
            return
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            try:
                self._fs.get_file(f"{self._root}/{name}", f"{folder}/{name}")
            except Exception as error:  # as above
                raise SnapshotError(f"{self._root}/{name}: cannot be read: {with_type(error)}") from None
            yield Path(folder) / name

    def read_json(self, name: str, kind: type[Any]) -> Any:
        """Read a file that holds a ``kind``, or None where there is none; raises ``SnapshotError``."""
        try:
            return read_json(self._fs.cat_file(f"{self._root}/{name}"), kind, f"{self._root}/{name}", SnapshotError)
        except FileNotFoundError:
            return None

    def _remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._root}/{name}")


def _stamp(seconds: float) -> str:
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime(seconds))}{int(seconds * 1000) % 1000:03}"


class History:
    """Keeps ``notes`` of a session, and stores them with snapshots of its video.

    Between two snapshots every change of the notes is in a log before it takes effect, if the session ``survives`` its
    process: then the automatic snapshots and the log are in a folder of their own.

    ``shelf``: the snapshots that viewers asked for, and the recordings. Raises what :class:`Shelf` does.
    """

    def __init__(self, folder: Path | str, notes: Notes, *, survives: bool) -> None:
        self.notes, self._survives = notes, survives
        self._secured = 0  # number of logged changes that the snapshot before the newest has
        self.shelf = self._current = Shelf(folder, claim=not survives)
        if survives:
            # Two: the newest may have been cut short, by a store that shows a file before it is whole.
            self._current = Shelf(f"{folder}/{_CURRENT}", most=2, claim=False)
            self._current.take_over()

    def close(self) -> None:
        """Let go of the folders."""
        close_all([self._current.close, self.shelf.close])

    # ---------------------------------------------------------------- going on

    def newest(self) -> tuple[str | None, Snapshot | None]:
        """Return name and content of the newest snapshot that is whole, if there is one, and take its notes."""
        names = [str(found["name"]) for found in self._current.snapshots()]
        for name in names:
            try:
                snapshot, self.notes = self._current.open(name)
                return name, snapshot
            except SnapshotError as error:
                if not self._survives or name == names[-1]:
                    raise
                logger.warning("going on from the snapshot before: %s", error)
        return None, None

    def repeat(self, stream: Stream) -> None:
        """Do with ``stream`` what was logged after its snapshot."""
        for change in self._current.logged(self.notes.logged):
            if "text" not in change:
                self.note(change)
            elif change["block"] >= stream.next_prompt_block:  # or it was not taken in the end
                stream.set_prompt(change["text"], block=change["block"], over=change["over"] or 1)
                self.note(change)

    def was_recording(self) -> bool:
        """Whether the process before was killed while it recorded. What there is of that becomes a recording."""
        name = self.notes.recording
        ended = name is None or name in [found["name"] for found in self.shelf.recordings()]
        self.shelf.find_cut_short()
        return not ended

    # ---------------------------------------------------------------- changes

    def log(self, change: Mapping[str, Any]) -> None:
        """Store the next change, in place of one that was logged and not noted; raises ``OutputError``."""
        if self._survives:
            self._current.log(self.notes.logged + 1, change)

    def note(self, change: Mapping[str, Any]) -> None:
        """Take a logged change into the notes: a prompt, or new values of ``paused`` and ``recording``."""
        if "text" in change:
            values: dict[str, Any] = {"prompts": [*self.notes.prompts, change][-_MOST_PROMPTS:]}
        else:
            values = {name: change[name] for name in ("paused", "recording") if name in change}
        self.notes = replace(self.notes, **values, logged=self.notes.logged + 1)

    def change(self, **values: Any) -> None:
        """Log and note new values."""
        self.log(values)
        self.note(values)

    def begin(self, notes: Notes, *, base: int, shown: int) -> None:
        """Take the notes of another video, which begins after ``shown`` pictures of the session."""
        kept = {name: getattr(self.notes, name) for name in ("logged", "epoch", "paused", "recording")}
        self.notes = replace(notes, **kept, base=base, shown=shown)

    def store(self, snapshot: Snapshot, notes: Notes, taken_at: float) -> str:
        """Store what the next process goes on from; returns the snapshot's name. Raises ``OutputError``."""
        name = self._current.keep(snapshot, notes, taken_at)
        self._current.forget(self._secured)
        self._secured = notes.logged
        return name
