"""A folder of snapshots of a running stream: written on a thread, the last few kept, the newest whole one found.

A file is called ``block-0000000123.safetensors`` after the next block. It gets that name only once all of it is on the
disk, and older files are removed after that: whenever the process is killed, a whole snapshot is there.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path

from echo_rt.errors import ConfigError, OutputError, SnapshotError, SnapshotVersionError, StreamError
from echo_rt.snapshot.snapshot import Snapshot
from echo_rt.utils.atomic_file import Closing, names_in, reason, remove
from echo_rt.utils.folder_lock import FolderClaim
from echo_rt.utils.wording import warn_caller

_PREFIX = "block-"
_NAME = re.compile(rf"{_PREFIX}(\d{{10,}})\.safetensors")


def snapshot_files(folder: str | Path) -> list[Path]:
    """Paths of the snapshots in ``folder``, whole or not, newest first; none where there is no such folder."""
    try:
        entries = names_in(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise SnapshotError(f"{folder}: expected a folder of snapshots, cannot read it: {reason(error)}") from None
    numbered = [(int(match[1]), name) for name in entries if (match := _NAME.fullmatch(name)) is not None]
    return [Path(folder, name) for _, name in sorted(numbered, reverse=True)]


def latest_snapshot(folder: str | Path) -> tuple[Path, Snapshot] | None:
    """Return the newest whole snapshot in ``folder`` and its file; None where there is no snapshot.

    Damaged ones are passed over, each with a warning that names it. Raises :class:`SnapshotError` where all are
    damaged, :class:`SnapshotVersionError` where the newest whole one is of another version: to go on from an older
    one would in time remove it.
    """
    files = snapshot_files(folder)
    for file in files:
        try:
            return file, Snapshot.load(file)
        except SnapshotVersionError:
            raise
        except SnapshotError as error:
            warn_caller(f"passed over: {error}", RuntimeWarning)
    if files:
        raise SnapshotError(f"{folder}: expected a whole snapshot, found {len(files)} damaged ones")
    return None


class SnapshotKeeper(Closing):
    """Writes snapshots into ``folder`` on a thread and keeps the last ``keep`` of them.

    One is written at a time. Meanwhile :meth:`offer` declines others, which ``skipped`` counts: the stream waits only
    for the copy to the host, and memory holds one snapshot. An error of the thread is raised once, by the next
    :meth:`offer`, :meth:`wait` or :meth:`close`.

    Snapshots of later blocks than the one written are of a video that was given up (by a resume from an older one):
    they are removed like those that are too old. ``written`` counts the files put in place.

    Raises ``TargetError`` where another process holds the folder or it cannot be made, ``ConfigError`` for a ``keep``
    below 1. With 2 or more, a file that the disk damages later is passed over for the one before.
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
        """Whether a snapshot is being written, so that an offer would be declined."""
        return self._thread is not None and self._thread.is_alive()

    def offer(self, take: Callable[[], Snapshot]) -> bool:
        """Write what ``take`` (``stream.snapshot``) returns, and return True; while busy, return False."""
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
        """Wait for the snapshot being written; raises the thread's error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem

    def close(self) -> None:
        """Wait for the snapshot being written and release the folder. Idempotent."""
        self._closed = True
        try:
            self.wait()
        finally:
            self._claim.release()

    def _write(self, snapshot: Snapshot) -> None:
        try:
            number = snapshot.next_block
            # Or killed processes, which had not removed anything yet, would leave more and more files.
            self._remove_surplus(number, stale_too=False)
            snapshot.save(self.folder / f"{_PREFIX}{number:010}.safetensors")
            self.written += 1
            self._remove_surplus(number, stale_too=True)
        except BaseException as error:  # of any kind: the stream's thread raises it
            self._problem = error

    def _remove_surplus(self, newest: int, stale_too: bool) -> None:
        """Remove files that are too old beside block ``newest``, and with ``stale_too`` those of later blocks."""
        files = snapshot_files(self.folder)
        stale = [file for file in files if int(file.stem.removeprefix(_PREFIX)) > newest]
        for file in [*(stale if stale_too else ()), *files[len(stale) + self.keep :]]:
            try:
                remove(file)
            except OSError as error:
                raise OutputError(f"{file}: cannot remove an old snapshot: {reason(error)}") from None
