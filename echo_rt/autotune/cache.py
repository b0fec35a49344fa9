"""The files that cache measurements between starts, and the conditions under which a measurement holds.

A file that is damaged, or cannot be written, costs a measurement and a warning, never an error.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, Literal, TypeVar

import torch

from echo_rt.errors import EchoError, OutputError
from echo_rt.utils.atomic_file import open_plain, reason, write_whole
from echo_rt.utils.build_info import __version__
from echo_rt.utils.checked_json import convert, read_json

CACHE_VARIABLE = "ECHO_RT_CACHE_DIR"

_FORMAT = 1
_LARGEST = 2**24  # bytes of a file that is read
_LOCK_SECONDS = 5.0  # for which the file's lock is waited for
_NOT_PLAIN = (errno.ELOOP, errno.EINVAL, errno.EISDIR)  # a link, pipe, folder or device in place of a file of ours

Shapes = TypeVar("Shapes")  # a dataclass


class _DamagedError(EchoError):
    """A file with something else in it."""


@dataclass(frozen=True)
class Case(Generic[Shapes]):
    """The conditions under which a measurement holds; ``machine`` as :func:`machine_facts` describes it."""

    machine: Mapping[str, Any]
    dtype: str
    shapes: Shapes


@dataclass(frozen=True)
class Entry(Generic[Shapes]):
    """The name of the fastest candidate in ``case``.

    ``milliseconds`` per call of each candidate that was timed; ``rejected``: why each other one was not.
    """

    case: Case[Shapes]
    winner: str
    milliseconds: Mapping[str, float]
    rejected: Mapping[str, str]

    def __str__(self) -> str:
        """Say why it is selected."""
        times = sorted(self.milliseconds.items(), key=lambda item: item[1])
        what = "fastest" if len(times) > 1 else "the only one that works"
        return f"{what} on {self.case.machine['gpu']}: {', '.join(f'{name} {time:.3f} ms' for name, time in times)}"


@dataclass
class _File:
    format: Literal[1]
    entries: list[dict[str, Any]]


class Cache(Generic[Shapes]):
    """The file of one ``subject``, which is also the name of the field of the winner; ``shapes``: the dataclass.

    Each problem of a file is told once in a process.
    """

    def __init__(self, subject: str, shapes: type[Shapes]) -> None:
        self.subject = subject
        self._entry_of: Any = Entry[shapes]  # type: ignore[valid-type]
        self._told: set[str] = set()
        self._given_up: set[Path] = set()  # files that this process writes no more

    def path(self) -> Path | None:
        """Return the file in ``ECHO_RT_CACHE_DIR``, or in the user's cache folder; None for a user without a home."""
        name = f"{self.subject}.json"
        if folder := os.environ.get(CACHE_VARIABLE):
            return Path(folder, name)
        user_cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
        try:
            return (user_cache if user_cache.is_absolute() else Path.home() / ".cache") / "echo-rt" / name
        except RuntimeError:
            return None

    def entries(self, path: Path) -> list[Entry[Shapes]]:
        """Return the entries of ``path``, oldest first; none, with a warning, where it cannot be read."""
        try:
            with _open(path, os.O_RDONLY) as file:
                content = read_json(file.read(_LARGEST), _File, str(path), _DamagedError)
            return [self._entry(item) for item in content.entries]
        except FileNotFoundError:
            return []
        except OSError as error:
            if lasts := error.errno in _NOT_PLAIN:
                self._given_up.add(path)
            self._tell(f"{path} cannot be read ({reason(error)})", "at every start" if lasts else "anew")
        except _DamagedError as error:
            self._tell(f"{path} is damaged ({error})", "anew")
        return []

    def recall(self, path: Path, case: Case[Shapes]) -> Entry[Shapes] | None:
        """Return the measurement of exactly this case."""
        return next((entry for entry in self.entries(path) if entry.case == case), None)

    def remember(self, path: Path, entry: Entry[Shapes]) -> None:
        """Add ``entry`` to the file, in place of one of the same case; entries added by others meanwhile are kept."""
        if path in self._given_up:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_suffix(".lock")):
                kept = [other for other in self.entries(path) if other.case != entry.case]
                content = {"format": _FORMAT, "entries": [self._fields(item) for item in (*kept, entry)]}
                if path not in self._given_up:
                    write_whole(path, json.dumps(content, indent=1).encode() + b"\n")
        except (OSError, OutputError) as error:
            if isinstance(error, TimeoutError):
                self._given_up.add(path)
            problem = f"{path} cannot be written ({reason(error)})" if isinstance(error, OSError) else str(error)
            self._tell(problem, "at every start")

    def _tell(self, problem: str, when: str) -> None:
        if problem not in self._told:
            self._told.add(problem)
            logging.getLogger(f"echo_rt.{self.subject}").warning("%s: %s is measured %s", problem, self.subject, when)

    def _fields(self, entry: Entry[Shapes]) -> dict[str, Any]:
        return {self.subject if name == "winner" else name: value for name, value in dataclasses.asdict(entry).items()}

    def _entry(self, item: dict[str, Any]) -> Entry[Shapes]:
        fields = {**item, "winner": item.get(self.subject)}
        entry: Entry[Shapes] = convert(fields, self._entry_of, "an entry", _DamagedError)
        if json.loads(json.dumps(self._fields(entry))) != item:
            raise _DamagedError("an entry of unknown fields")
        return entry


def machine_facts(device: torch.device, versions: Mapping[str, str | None]) -> dict[str, Any]:
    """Return the GPU and all versions, as JSON: a measurement holds while they are the same.

    ``versions`` of the candidates by name; None where those of torch and echo-rt suffice.
    """
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "driver": _driver(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "echo_rt": __version__,
        "kinds": dict(versions),
    }


def _driver() -> str | None:
    """Return the driver's version; None without NVML, as in some containers."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        try:
            return str(pynvml.nvmlSystemGetDriverVersion())
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None


def _open(path: Path, flags: int) -> BinaryIO:
    """Open a plain file, never what a link points to; raises ``OSError``."""
    try:
        return open(open_plain(path, flags | os.O_NOFOLLOW), "rb")
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "it is a symbolic link") from None
        raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock on ``path``; the system releases it however the process ends, but not while one is stopped.

    Raises ``TimeoutError`` where another process keeps it.
    """
    end = time.monotonic() + _LOCK_SECONDS
    with _open(path, os.O_RDWR | os.O_CREAT) as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise TimeoutError(f"another process has held its lock for {_LOCK_SECONDS:g} s") from None
                time.sleep(0.02)
        yield
