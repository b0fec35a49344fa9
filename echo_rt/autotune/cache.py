"""The files that cache measurements between starts, and the conditions under which a measurement holds.

A file that is damaged, or cannot be written, costs a measurement and a warning, never an error.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from echo_rt.errors import EchoError, OutputError
from echo_rt.utils.atomic_file import read_plain, reason, write_whole
from echo_rt.utils.build_info import __version__
from echo_rt.utils.checked_json import convert, read_json

CACHE_VARIABLE = "ECHO_RT_CACHE_DIR"

_NAME = 16  # digits of a file's name

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


class Cache(Generic[Shapes]):
    """The folder of one ``subject``, which is also the field of the winner; ``shapes``: the dataclass of a case.

    A file holds one case: processes that write at once take nothing from each other. A problem is told once in a
    process.
    """

    def __init__(self, subject: str, shapes: type[Shapes]) -> None:
        self.subject = subject
        self._entry_of: Any = Entry[shapes]  # type: ignore[valid-type]
        self._told: set[str] = set()

    def path(self) -> Path | None:
        """Return the folder, in ``ECHO_RT_CACHE_DIR`` or the user's cache folder; None for a user without a home."""
        if folder := os.environ.get(CACHE_VARIABLE):
            return Path(folder, self.subject)
        user_cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
        try:
            return (user_cache if user_cache.is_absolute() else Path.home() / ".cache") / "echo-rt" / self.subject
        except RuntimeError:
            return None

    def entries(self, folder: Path) -> list[Entry[Shapes]]:
        """Return the entries of all files in ``folder`` that can be read."""
        found = (self._read(path) for path in sorted(folder.glob("*.json")))
        return [entry for entry in found if entry is not None]

    def recall(self, folder: Path, case: Case[Shapes]) -> Entry[Shapes] | None:
        """Return the measurement of exactly this case."""
        entry = self._read(_file(folder, case))
        return entry if entry is not None and entry.case == case else None

    def remember(self, folder: Path, entry: Entry[Shapes]) -> None:
        """Write ``entry`` into ``folder``, in place of one of the same case."""
        path = _file(folder, entry.case)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if path.is_symlink():
                raise OSError(errno.ELOOP, "it is a symbolic link")
            write_whole(path, json.dumps(self._fields(entry), indent=1).encode() + b"\n")
        except (OSError, OutputError) as error:
            problem = f"{path} cannot be written ({reason(error)})" if isinstance(error, OSError) else str(error)
            self._tell(problem, "at every start")

    def _read(self, path: Path) -> Entry[Shapes] | None:
        try:
            item = read_json(read_plain(path), dict[str, Any], str(path), _DamagedError)
            fields = {**item, "winner": item.get(self.subject)}
            entry: Entry[Shapes] = convert(fields, self._entry_of, str(path), _DamagedError)
            if json.loads(json.dumps(self._fields(entry))) != item:
                raise _DamagedError(f"{path}: an entry of unknown fields")
            return entry
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self._tell(f"{path} cannot be read ({reason(error)})", "anew")
        except _DamagedError as error:
            self._tell(f"damaged: {error}", "anew")
        return None

    def _tell(self, problem: str, when: str) -> None:
        if problem not in self._told:
            self._told.add(problem)
            logging.getLogger(f"echo_rt.{self.subject}").warning("%s: %s is measured %s", problem, self.subject, when)

    def _fields(self, entry: Entry[Shapes]) -> dict[str, Any]:
        return {self.subject if name == "winner" else name: value for name, value in dataclasses.asdict(entry).items()}


def _file(folder: Path, case: Case[Any]) -> Path:
    """Return the file of a case in ``folder``."""
    text = json.dumps(dataclasses.asdict(case), sort_keys=True)
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:_NAME]}.json"


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
