"""A folder of snapshots of a running stream: written on a thread, the last few kept, the newest whole one found.

A file is called ``block-0000000123.safetensors`` after the next block. It gets that name only once all of it is on the
disk, and older files are removed after that: whenever the process is killed, a whole snapshot is there.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
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


def require_seed(file: Path, snapshot: Snapshot, seed: int) -> None:
    """Raise :class:`SnapshotError` unless the snapshot in ``file`` can be of the video that was begun with ``seed``."""
    if not snapshot.is_of_video(seed):
        raise SnapshotError(f"{file}: expected a snapshot of the video with seed {seed}, found one of {snapshot.seed}")


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
        self._thread = ThreadPoolExecutor(1, "echo-rt snapshot")
        self._writing: Future[None] | None = None
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
        return self._writing is not None and not self._writing.done()

    def offer(self, take: Callable[[], Snapshot]) -> bool:
        """Write what ``take`` (``stream.snapshot``) returns, and return True; while busy, return False."""
        if self._closed:
            raise StreamError(f"{self.folder}: this keeper of snapshots is closed")
        if self.busy:
            self.skipped += 1
            return False
        self.wait()
        self._writing = self._thread.submit(self._write, take())
        return True

    def wait(self) -> None:
        """Wait for the snapshot being written; raises the thread's error."""
        if self._writing is not None:
            wait([self._writing])  # interrupted here, it is still being written
            written, self._writing = self._writing, None
            written.result()

    def close(self) -> None:
        """Wait for the snapshot being written and release the folder. Idempotent."""
        self._closed = True
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._claim.release()

    def _write(self, snapshot: Snapshot) -> None:
        number = snapshot.next_block
        # Or killed processes, which had not removed anything yet, would leave more and more files.
        self._remove_surplus(number, stale_too=False)
        snapshot.save(self.folder / f"{_PREFIX}{number:010}.safetensors")
        self.written += 1
        self._remove_surplus(number, stale_too=True)

    def _remove_surplus(self, newest: int, stale_too: bool) -> None:
        """Remove files that are too old beside block ``newest``, and with ``stale_too`` those of later blocks."""
        files = snapshot_files(self.folder)
        stale = [file for file in files if int(file.stem.removeprefix(_PREFIX)) > newest]
        for file in [*(stale if stale_too else ()), *files[len(stale) + self.keep :]]:
            try:
                remove(file)
            except OSError as error:
                raise OutputError(f"{file}: cannot remove an old snapshot: {reason(error)}") from None
