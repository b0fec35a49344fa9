"""The file in which the outcome of measuring attention is remembered from one start to the next.

It is a convenience: a file that is damaged, or cannot be written, costs a measurement and a warning, never an error.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echo_rt.attention.trials import AttentionShapes
from echo_rt.errors import OutputError
from echo_rt.output.part_file import reason, write_whole

CACHE_VARIABLE = "ECHO_RT_CACHE_DIR"

_FORMAT = 1

_logger = logging.getLogger("echo_rt.attention")


@dataclass(frozen=True)
class Case:
    """What a measurement holds for: ``machine`` as :func:`echo_rt.attention.machine.machine_facts` describes it."""

    machine: Mapping[str, Any]
    dtype: str
    shapes: AttentionShapes


@dataclass(frozen=True)
class Entry:
    """The name of the fastest in ``case``.

    ``milliseconds`` of a call for each kind that was timed, ``rejected``: why each other one was not.
    """

    case: Case
    attention: str
    milliseconds: Mapping[str, float]
    rejected: Mapping[str, str]


def cache_file() -> Path | None:
    """Where choices are remembered: in ``ECHO_RT_CACHE_DIR``, or in echo-rt's folder of the user's cache folder.

    None where there is no such folder because the user has no home.
    """
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder) / "attention.json"
    user_cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not user_cache.is_absolute():
        try:
            user_cache = Path.home() / ".cache"
        except RuntimeError:
            return None
    return user_cache / "echo-rt" / "attention.json"


def entries(path: Path) -> list[Entry]:
    """All that is remembered in ``path``, oldest first; nothing, with a warning, where it cannot be read."""
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']!r}, expected {_FORMAT}")
        return [_entry(**item) for item in content["entries"]]
    except FileNotFoundError:
        return []
    except OSError as error:
        _logger.warning("%s cannot be read (%s): attention is measured anew", path, reason(error))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        _logger.warning(
            "%s is damaged (%s: %s): attention is measured anew",
            path,
            type(error).__name__,
            " ".join(str(error).split()),
        )
    return []


def _entry(case: Any, attention: Any, milliseconds: Any, rejected: Any) -> Entry:
    texts = (case["dtype"], attention, *rejected.values())
    if not (isinstance(case["machine"], dict) and all(isinstance(text, str) for text in texts)):
        raise ValueError("values of other types")
    shapes = AttentionShapes(**case["shapes"])
    times = {name: float(time) for name, time in milliseconds.items()}
    return Entry(Case(case["machine"], case["dtype"], shapes), attention, times, rejected)


def recall(path: Path, case: Case) -> Entry | None:
    """What was measured in exactly this case."""
    return next((entry for entry in entries(path) if entry.case == case), None)


def remember(path: Path, entry: Entry) -> None:
    """Add ``entry`` to the file, in place of one of the same case; what others add at the same time is kept."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            kept = [other for other in entries(path) if other.case != entry.case]
            content = {"format": _FORMAT, "entries": [dataclasses.asdict(item) for item in (*kept, entry)]}
            write_whole(path, json.dumps(content, indent=1).encode() + b"\n")
    except OSError as error:
        _logger.warning("%s cannot be written (%s): attention is measured at every start", path, reason(error))
    except OutputError as error:
        _logger.warning("%s: attention is measured at every start", error)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the system lets go of the lock however the process ends."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
