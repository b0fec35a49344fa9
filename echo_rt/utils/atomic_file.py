"""Writing beside the target and moving into place: a name always stands for a whole file.

In a folder that this process has claimed (:class:`echo_rt.utils.folder_lock.FolderClaim`), everything here goes by the
folder's descriptor: it stays in that very folder, whatever its name leads to meanwhile, and follows no link out of it.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from echo_rt.errors import ConfigError, EchoError, OutputError, TargetError
from echo_rt.options import is_path

C = TypeVar("C", bound="Closing")

_PIECE = 2**20  # bytes that are read at once
_NAME_KEPT = 32  # characters: a part's name must be short enough for every file system, at four bytes for each
GONE = (errno.ENOENT, errno.ESTALE)  # of a folder that was removed; the latter on NFS
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFLNK: "a link", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}

# The folders that this process has claimed, by absolute path, with their descriptors.
claimed: dict[str, int] = {}


def reason(error: OSError) -> str:
    """The system's reason for an error, without the path and number that ``str(error)`` repeats."""
    return error.strerror or str(error) or type(error).__name__


@contextlib.contextmanager
def raising(kind: type[EchoError], what: str) -> Iterator[None]:
    """Raise a ``kind`` in place of an ``OSError``: ``what``, and the system's reason."""
    try:
        yield
    except OSError as error:
        raise kind(f"{what}: {reason(error)}") from None


def place(path: str | Path) -> tuple[str, int | None]:
    """Return the name and ``dir_fd`` of ``path`` for a call of the system; in a claimed folder, its descriptor."""
    descriptor = claimed.get(str(Path(path).absolute().parent))
    return (str(path), None) if descriptor is None else (Path(path).name, descriptor)


def is_same(path: str | Path, descriptor: int) -> bool:
    """Whether ``path`` leads to what ``descriptor`` is open for: a file may be removed, replaced or moved meanwhile."""
    name, folder = place(path)
    try:
        return os.path.samestat(os.stat(name, dir_fd=folder), os.fstat(descriptor))
    except OSError:
        return False


def names_in(folder: str | Path) -> list[str]:
    """Names of the entries of a folder; raises ``OSError``."""
    return os.listdir(claimed.get(str(Path(folder).absolute()), folder))


def remove(path: str | Path) -> None:
    """Remove a file, or nothing where there is none; raises ``OSError``."""
    name, folder = place(path)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)


def check_plain(path: str | Path) -> int:
    """Return the bytes of a plain file; raises ``OSError`` for anything else, and for a link in a claimed folder."""
    name, folder = place(path)
    found = os.stat(name, dir_fd=folder, follow_symlinks=folder is None)
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "a device")
        raise OSError(errno.EINVAL, f"expected a plain file, found {kind}")
    return found.st_size


def open_plain(path: str | Path, flags: int = os.O_RDONLY) -> int:
    """Open a plain file and return its descriptor; raises ``OSError`` for anything else, and never waits for a pipe.

    In a claimed folder it follows no link, and what it writes to has no second name (a hard link).
    """
    with contextlib.suppress(FileNotFoundError):
        check_plain(path)  # before opening: that alone does something to some devices
    name, folder = place(path)
    beyond = os.O_NONBLOCK | (0 if folder is None else os.O_NOFOLLOW)
    descriptor = os.open(name, flags | beyond, 0o666, dir_fd=folder)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or (folder is not None and flags & os.O_ACCMODE and found.st_nlink > 1):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "expected a plain file with one name, found another kind or a hard link")
    return descriptor


def read_plain(path: str | Path, most: int = 2**24) -> bytes:
    """Read a plain file of at most ``most`` bytes, as :func:`open_plain` opens it; raises ``OSError``."""
    with open(open_plain(path), "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"expected at most {most} bytes, found more")
    return data


def _target(path: str | Path) -> Path:
    """Return the file that a rename may replace: follow links, refuse anything but a plain file.

    In a claimed folder it is ``path`` itself: whatever else has that name is replaced, a link and not what it leads to.
    """
    if not is_path(path):
        raise TargetError(f"expected the path of a file to write, got {path!r}")
    path = Path(path)
    if place(path)[1] is not None:
        return path
    target = Path(os.path.realpath(path))
    with raising(TargetError, f"{path}: cannot write"):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            check_plain(target)
        if not target.parent.is_dir():
            raise TargetError(f"{path}: cannot write: there is no folder {path.parent}")
    if target.exists() and not os.access(target, os.W_OK):
        raise TargetError(f"{path}: cannot write: the file is there and is write-protected")
    return target


def check_ending(path: str | Path, ending: str, what: str) -> None:
    """Raise ``ConfigError``, which begins with ``what``, unless ``path`` is a path whose name ends in ``ending``."""
    if not is_path(path):
        raise ConfigError(f"{what}: expected the path of a file, got {path!r}")
    name = Path(path).name.lower()
    if Path(name).suffix != ending:
        expected = f"before {ending}" if name == ending else f"that ends in {ending}"
        raise ConfigError(f"{what}: expected a name {expected}, got {str(path)!r}")


def _append_whole(file: io.FileIO, size: int, data: bytes | bytearray | memoryview) -> int:
    """Append all of ``data`` to a file of ``size`` bytes and return the new size, or leave it as it was and raise."""
    view = memoryview(data)
    try:
        done = 0
        while done < len(view):
            done += file.write(view[done:])
    except BaseException:
        file.truncate(size)
        file.seek(size)
        raise
    return size + len(view)


class PartFile:
    """A new file beside ``path``, unbuffered, that becomes ``path`` on :meth:`commit` and vanishes on :meth:`discard`.

    Its name is ``.NAME.xxxxxxxx.part``, with the beginning of a long name; the random part keeps processes with the
    same target apart. A killed process leaves its part behind. Raises ``TargetError`` when it cannot be made.
    ``in_place``: whether it is ``path`` now.
    """

    def __init__(self, path: str | Path) -> None:
        self._target = _target(path)
        self.path = Path(path)
        self._part = self._target.with_name(f".{self._target.name[:_NAME_KEPT]}.{secrets.token_hex(4)}.part")
        name, folder = place(self._part)
        try:
            descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=folder)
        except OSError as error:
            why = f"there is no folder {self.path.parent} any more" if error.errno in GONE else reason(error)
            raise TargetError(f"{path}: cannot write: {why}") from None
        self._file = os.fdopen(descriptor, "r+b", buffering=0)
        self.size = 0
        self.in_place = False

    def append(self, data: bytes | bytearray | memoryview) -> None:
        """Write all of ``data`` at the end, or leave the file as it was and raise ``OSError``."""
        self.size = _append_whole(self._file, self.size, data)

    def overwrite(self, offset: int, data: bytes) -> None:
        """Replace bytes that are already written, when all of them are on the disk; raises ``OSError``."""
        if offset + len(data) > self.size:
            raise ValueError(f"bytes {offset}..{offset + len(data)} are not all within the {self.size} written")
        os.fsync(self._file.fileno())
        os.pwrite(self._file.fileno(), data, offset)

    def commit(self) -> None:
        """Move the file to ``path``; raises ``OutputError``, if possible after the move."""
        problems = close_all([lambda: os.fsync(self._file.fileno())])
        with raising(OutputError, f"{self.path}: cannot be put in place, left as {self._part}"):
            self._file.close()
            (part, folder), (target, _) = place(self._part), place(self._target)
            os.replace(part, target, src_dir_fd=folder, dst_dir_fd=folder)
            self.in_place = True
        problems += close_all([lambda: sync_folder(self._target.parent)])
        with raising(OutputError, f"{self.path}: may not be whole on the disk"):
            if problems:
                raise problems[0]

    def discard(self) -> None:
        """Remove the part, unless the disk refuses; ``path`` stays as it was."""
        self._file.close()
        with contextlib.suppress(OSError):  # the first error says more; the next process removes the part
            remove(self._part)


def sync_folder(folder: Path) -> None:
    """Flush a folder's names to the disk: until then a power cut can undo a rename. Raises ``OSError``."""
    held = claimed.get(str(folder.absolute()))
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY) if held is None else held
    except PermissionError:
        return  # a folder may be writable and not readable; the system flushes its names later
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot flush folders
            raise
    finally:
        if held is None:
            os.close(descriptor)


def check_writable(path: str | Path) -> None:
    """Raise ``TargetError`` unless a file with this name can be made now; leaves nothing behind."""
    PartFile(path).discard()


def check_results_folder(folder: Path) -> None:
    """Raise ``TargetError`` where ``folder`` neither is a folder to write into nor can be made one; makes nothing."""
    whole = folder.absolute()
    with raising(TargetError, f"{folder}: cannot be a folder"):  # by its name
        there = next(place for place in (whole, *whole.parents) if place.exists())
    if not there.is_dir():
        raise TargetError(f"{folder}: expected a folder for results, got a file in its place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise TargetError(f"{folder}: cannot be written into: {there} is write-protected")


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[PartFile]:
    """Write a file in one ``with``: it appears at the end, or not at all; ``OutputError`` for an ``OSError`` inside."""
    part = PartFile(path)
    try:
        with raising(OutputError, f"{path}: cannot write"):
            yield part
    except BaseException:
        part.discard()
        raise
    part.commit()


def write_whole(path: str | Path, data: bytes) -> None:
    """Write a small file, atomically; raises ``OutputError``."""
    with whole_file(path) as part:
        part.append(data)


def close_all(closers: Iterable[Callable[[], object]]) -> list[Exception]:
    """Call all ``closers``, whatever happens to the others, and return the errors."""
    errors: list[Exception] = []
    for close in closers:
        try:
            close()
        except Exception as error:  # of any kind: the next one must be called as well
            errors.append(error)
    return errors


class Closing(ABC):
    """A context manager that always closes."""

    @abstractmethod
    def close(self) -> object:
        """Finish the file and put it in place; end what runs."""

    def __enter__(self: C) -> C:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class GrowingFile(Closing):
    """What is written to ``_part`` while a stream runs, and appears under its name at :meth:`close`."""

    _part: PartFile

    @property
    def in_place(self) -> bool:
        """Whether the file is on the disk under its name."""
        return self._part.in_place

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return self._part.size


class Log(Closing):
    """A file of lines that this process alone appends to, begun with ``content``.

    Without it, it goes on with the lines that are there; a torn last one, left by a kill amid a write, is cut off. All
    methods raise ``OutputError`` where the disk refuses, or somebody removed, replaced or changed the file.
    """

    def __init__(self, path: str | Path, content: bytes | None = None) -> None:
        self.path = Path(path)
        if content is not None:
            write_whole(path, content)
        with raising(OutputError, f"{path}: cannot write"):
            self._file = os.fdopen(open_plain(path, os.O_RDWR | os.O_APPEND | os.O_CREAT), "r+b", buffering=0)
            self._size = end = 0
            while piece := self._file.read(_PIECE):
                end, whole = end + len(piece), piece.rfind(b"\n") + 1
                self._size = end - len(piece) + whole if whole else self._size
            self._file.truncate(self._size)

    def append(self, line: bytes) -> None:
        """Write ``line``, all of it or none."""
        with raising(OutputError, f"{self.path}: cannot write"):
            if not is_same(self.path, self._file.fileno()) or os.fstat(self._file.fileno()).st_size != self._size:
                raise OSError(errno.ESTALE, "somebody removed, replaced or changed the file")
            self._size = _append_whole(self._file, self._size, line)

    def sync(self) -> None:
        """Wait until all lines are on the disk."""
        with raising(OutputError, f"{self.path}: may not be whole on the disk"):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; may be called twice."""
        self._file.close()
