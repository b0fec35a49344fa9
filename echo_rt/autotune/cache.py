"""The files that cache measurements between starts, and the conditions under which a measurement holds.

A file that is damaged, or cannot be written, costs a measurement and a warning, never an error.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from echo_rt.errors import OutputError
from echo_rt.utils.atomic_file import reason, write_whole
from echo_rt.utils.build_info import __version__
from echo_rt.utils.wording import one_line

CACHE_VARIABLE = "ECHO_RT_CACHE_DIR"

_FORMAT = 1

Shapes = TypeVar("Shapes")  # a dataclass


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
        listed = ", ".join(f"{name} {time:.3f} ms" for name, time in times)
        what = "fastest" if len(times) > 1 else "the only one that works"
        return f"{what} on {self.case.machine['gpu']}: {listed}"


class Cache(Generic[Shapes]):
    """The file of one ``subject``, which is also the name of the field of the winner.

    ``shapes`` makes an object of its fields as JSON stores them, and may raise what wrong values raise.
    """

    def __init__(self, subject: str, shapes: Callable[[Mapping[str, Any]], Shapes]) -> None:
        self.subject = subject
        self._shapes = shapes
        self._logger = logging.getLogger(f"echo_rt.{subject}")

    def path(self) -> Path | None:
        """Return the file in ``ECHO_RT_CACHE_DIR``, or in the user's cache folder; None for a user without a home."""
        if folder := os.environ.get(CACHE_VARIABLE):
            return Path(folder) / f"{self.subject}.json"
        user_cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
        if not user_cache.is_absolute():
            try:
                user_cache = Path.home() / ".cache"
            except RuntimeError:
                return None
        return user_cache / "echo-rt" / f"{self.subject}.json"

    def entries(self, path: Path) -> list[Entry[Shapes]]:
        """Return the entries of ``path``, oldest first; none, with a warning, where it cannot be read."""
        try:
            content = json.loads(path.read_bytes())
            if content["format"] != _FORMAT:
                raise ValueError(f"format {content['format']!r}, expected {_FORMAT}")
            return [self._entry(item) for item in content["entries"]]
        except FileNotFoundError:
            return []
        except OSError as error:
            problem = f"cannot be read ({reason(error)})"
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            problem = f"is damaged ({type(error).__name__}: {one_line(error)})"
        self._logger.warning("%s %s: %s is measured anew", path, problem, self.subject)
        return []

    def recall(self, path: Path, case: Case[Shapes]) -> Entry[Shapes] | None:
        """Return the measurement of exactly this case."""
        return next((entry for entry in self.entries(path) if entry.case == case), None)

    def remember(self, path: Path, entry: Entry[Shapes]) -> None:
        """Add ``entry`` to the file, in place of one of the same case; entries added by others meanwhile are kept."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_suffix(".lock")):
                kept = [other for other in self.entries(path) if other.case != entry.case]
                content = {"format": _FORMAT, "entries": [self._fields(item) for item in (*kept, entry)]}
                write_whole(path, json.dumps(content, indent=1).encode() + b"\n")
        except (OSError, OutputError) as error:
            problem = f"{path} cannot be written ({reason(error)})" if isinstance(error, OSError) else error
            self._logger.warning("%s: %s is measured at every start", problem, self.subject)

    def _fields(self, entry: Entry[Shapes]) -> dict[str, Any]:
        return {self.subject if name == "winner" else name: value for name, value in dataclasses.asdict(entry).items()}

    def _entry(self, item: Any) -> Entry[Shapes]:
        if item.keys() != {"case", self.subject, "milliseconds", "rejected"}:
            raise ValueError(f"an entry of {', '.join(map(str, item))}")
        case, winner, rejected = item["case"], item[self.subject], item["rejected"]
        texts = (case["dtype"], winner, *rejected.values())
        if not (isinstance(case["machine"], dict) and all(isinstance(text, str) for text in texts)):
            raise ValueError("values of other types")
        times = {name: float(time) for name, time in item["milliseconds"].items()}
        return Entry(Case(case["machine"], case["dtype"], self._shapes(case["shapes"])), winner, times, rejected)


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

        pynvml.nvmlInit()
        try:
            return str(pynvml.nvmlSystemGetDriverVersion())
        finally:
            pynvml.nvmlShutdown()
    except ImportError:
        return None
    except pynvml.NVMLError:
        return None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock on ``path``; the system releases it however the process ends."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
