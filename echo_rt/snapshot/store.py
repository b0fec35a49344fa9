"""Snapshots of a running stream in a folder: written beside the stream, the last few kept, the newest whole one found.

A file is called ``block-0000000123.safetensors`` after the block that comes next. It is under that name only when all
of it is on the disk, and older ones go only after that: whenever the process is killed, a whole one is there.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from echo_rt.errors import ConfigError, OutputError, SnapshotError, SnapshotVersionError, StreamError
from echo_rt.snapshot.snapshot import Snapshot
from echo_rt.utils.atomic_file import Closing, reason
from echo_rt.utils.folder_lock import FolderClaim

_PREFIX = "block-"
_NAME = re.compile(rf"{_PREFIX}(\d{{10,}})\.safetensors")


def snapshot_files(folder: str | Path) -> list[Path]:
    """The snapshots in ``folder``, whole or not, newest first; none where there is no such folder."""
    try:
        entries = [entry.name for entry in Path(folder).iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise SnapshotError(f"{folder}: expected a folder of snapshots, cannot read it: {reason(error)}") from None
    numbered = [(int(match[1]), name) for name in entries if (match := _NAME.fullmatch(name)) is not None]
    return [Path(folder, name) for _, name in sorted(numbered, reverse=True)]


def latest_snapshot(folder: str | Path) -> tuple[Path, Snapshot] | None:
    """The newest whole snapshot in ``folder`` and its file; None where the folder holds none at all.

    Damaged ones are passed over, each with a warning that names it. What only a person can decide is an error:
    :class:`SnapshotError` where all are damaged, :class:`SnapshotVersionError` where the newest whole one is of another
    version: to go on from an older one would in time remove it.
    """
    files = snapshot_files(folder)
    for file in files:
        try:
            return file, Snapshot.load(file)
        except SnapshotVersionError:
            raise
        except SnapshotError as error:
            warnings.warn(f"passed over: {error}", RuntimeWarning, stacklevel=2)
    if files:
        raise SnapshotError(f"{folder}: expected a whole snapshot, came {len(files)} damaged ones")
    return None


class SnapshotKeeper(Closing):
    """Writes snapshots into ``folder`` on a thread of its own and keeps the last ``keep`` of them.

    One is written at a time. While it is, :meth:`offer` takes no other: the stream is held up by the copy to the host
    alone, memory by one snapshot alone, and ``skipped`` counts the offers that were declined. What goes wrong on the
    thread is raised by the next :meth:`offer`, :meth:`wait` or :meth:`close`, once.

    A snapshot that was written makes those of later blocks stale, which come from a video that was given up (a resume
    from an older one): they are removed with those that are too old. ``written`` counts the files put in place.

    Raises ``TargetError`` where another process holds the folder or it cannot be made, ``ConfigError`` for a ``keep``
    below 1. More than one is wise: a file that the disk damages later is passed over for the one before.
    """

    def __init__(self, folder: str | Path, *, keep: int = 3) -> None:
        if keep < 1:
            raise ConfigError(f"{folder}: expected to keep 1 snapshot or more, got {keep}")
        self.folder, self.keep = Path(folder), keep
        self.written = self.skipped = 0
        self._thread: threading.Thread | None = None
        self._problem: BaseException | None = None
        self._closed = False
        self._claim = FolderClaim(folder)
        try:
            self._claim.remove_parts(_PREFIX)
        except OSError as error:
            self._claim.release()
            raise OutputError(f"{folder}: cannot remove what a killed process left: {reason(error)}") from None

    @property
    def busy(self) -> bool:
        """Whether a snapshot is being written at this moment, so that an offer would be declined."""
        return self._thread is not None and self._thread.is_alive()

    def offer(self, take: Callable[[], Snapshot]) -> bool:
        """Have what ``take`` gives (``stream.snapshot``) written; whether it is. ``take`` is not called while busy."""
        if self._closed:
            raise StreamError(f"{self.folder}: this keeper of snapshots is closed")
        if self.busy:
            self.skipped += 1
            return False
        self.wait()
        snapshot = take()
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="echo-rt snapshot")
        self._thread.start()
        return True

    def wait(self) -> None:
        """Return when nothing is being written any more; raises what went wrong since the last call."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem

    def close(self) -> None:
        """Wait for what is being written and let the folder go. May be called twice."""
        self._closed = True
        try:
            self.wait()
        finally:
            self._claim.release()

    def _write(self, snapshot: Snapshot) -> None:
        try:
            number = snapshot.next_block
            # Processes that were killed before they had removed anything must not add up to more and more files.
            self._remove(self._sorted_out(number)[1])
            snapshot.save(self.folder / f"{_PREFIX}{number:010}.safetensors")
            self.written += 1
            stale, old = self._sorted_out(number)
            self._remove([*stale, *old])
        except BaseException as error:  # of whatever kind: it is raised again where someone can act on it
            self._problem = error

    def _sorted_out(self, newest: int) -> tuple[list[Path], list[Path]]:
        """The files of blocks after ``newest``, and those that are too old beside it."""
        files = snapshot_files(self.folder)
        stale = [file for file in files if _number(file) > newest]
        return stale, files[len(stale) + self.keep :]

    def _remove(self, files: Iterable[Path]) -> None:
        for file in files:
            try:
                file.unlink(missing_ok=True)
            except OSError as error:
                raise OutputError(f"{file}: cannot remove an old snapshot: {reason(error)}") from None


def _number(file: Path) -> int:
    return int(file.stem.removeprefix(_PREFIX))
