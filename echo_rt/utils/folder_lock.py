"""A folder that belongs to one process at a time."""

from __future__ import annotations

import fcntl
import os
import re
from contextlib import suppress
from pathlib import Path

from echo_rt.errors import TargetError
from echo_rt.utils.atomic_file import reason, sync_folder

# Name of a part file, around the beginning of the name of the file that it was to become.
_PART = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.part")


class FolderClaim:
    """Makes ``folder`` if absent, and locks it until :meth:`release` or any end of the process.

    Otherwise two processes could write one recording, where it is resumed while the first still runs. Raises
    ``TargetError`` where another process holds the folder, or it cannot be made. It leaves no file behind, and no
    folder of its own making that stayed empty.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self._made = not self.folder.is_dir()
            self.folder.mkdir(exist_ok=True)
            if self._made:
                sync_folder(self.folder.parent)
            self._descriptor: int | None = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise TargetError(f"{folder}: cannot be a folder to write into: {reason(error)}") from None
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.release()
            taken = "another process writes into it" if isinstance(error, BlockingIOError) else reason(error)
            raise TargetError(f"{folder}: cannot be written into: {taken}") from None

    def remove_parts(self, prefix: str) -> None:
        """Remove the part files of killed processes, of files whose names begin with ``prefix``."""
        for file in list(self.folder.iterdir()):
            match = _PART.fullmatch(file.name)
            if match is not None and match["name"].startswith(prefix):
                file.unlink(missing_ok=True)

    def release(self) -> None:
        """Unlock the folder; may be called twice."""
        if self._descriptor is not None:
            if self._made:
                with suppress(OSError):  # it is no longer empty
                    self.folder.rmdir()
            os.close(self._descriptor)
            self._descriptor = None
