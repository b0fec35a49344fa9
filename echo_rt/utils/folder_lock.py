"""A folder that belongs to one process at a time."""

from __future__ import annotations

import fcntl
import os
import re
from contextlib import nullcontext, suppress
from pathlib import Path

from echo_rt.errors import TargetError
from echo_rt.utils.atomic_file import GONE, claimed, is_same, names_in, place, raising, reason, remove, sync_folder

# Name of a part file, around the beginning of the name of the file that it was to become.
_PART = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.part")


class FolderClaim:
    """Makes ``folder`` if absent, and holds it until :meth:`release` or any end of the process.

    Otherwise two processes could write one recording, where it is resumed while the first still runs. ``new``: it must
    be absent.

    Meanwhile the folder may be moved: what belongs into it still gets there, and nothing gets into another folder of
    that name. A folder within a claimed one is not claimed through a link.

    Raises ``TargetError`` where another process holds the folder, or it cannot be made. It leaves no file behind, and
    no folder of its own making that stayed empty.
    """

    def __init__(self, folder: str | Path, *, new: bool = False) -> None:
        self.folder = Path(folder)
        name, within = place(self.folder)
        beyond = 0 if within is None else os.O_NOFOLLOW
        self._descriptor: int | None = None
        self._made = False
        with raising(TargetError, f"{folder}: cannot be a folder to write into"):
            with nullcontext() if new else suppress(FileExistsError):
                os.mkdir(name, dir_fd=within)
                self._made = True
                sync_folder(self.folder.parent)
            self._descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | beyond, dir_fd=within)
        self._key = str(self.folder.absolute())
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.release()
            taken = "another process writes into it" if isinstance(error, BlockingIOError) else reason(error)
            raise TargetError(f"{folder}: cannot be written into: {taken}") from None
        if self._key in claimed:  # and was moved since
            self.release()
            raise TargetError(f"{folder}: cannot be written into: this process holds another folder by that name")
        claimed[self._key] = self._descriptor

    @property
    def path(self) -> Path:
        """Where the folder is now: ``folder``, unless it was moved."""
        if self._descriptor is None:
            return self.folder
        found = Path(os.readlink(f"/proc/self/fd/{self._descriptor}"))
        return self.folder if self.folder.resolve() == found else found

    @property
    def removed(self) -> bool:
        """Whether somebody removed the folder."""
        try:
            return self._descriptor is not None and os.fstat(self._descriptor).st_nlink == 0
        except OSError as error:
            if error.errno in GONE:
                return True
            raise

    def remove_parts(self, prefix: str) -> None:
        """Remove the part files of killed processes, of files whose names begin with ``prefix``."""
        for name in names_in(self.folder):
            match = _PART.fullmatch(name)
            if match is not None and match["name"].startswith(prefix):
                remove(self.folder / name)

    def release(self) -> None:
        """Let go of the folder; may be called twice."""
        if self._descriptor is None:
            return
        if claimed.get(self._key) == self._descriptor:
            del claimed[self._key]
        if self._made and is_same(self.folder, self._descriptor):
            with suppress(OSError):  # it is no longer empty
                name, within = place(self.folder)
                os.rmdir(name, dir_fd=within)
        os.close(self._descriptor)
        self._descriptor = None
