"""Reads what ``nsys export --type=sqlite`` writes: what the GPU did, and within which NVTX ranges it was asked to.

An activity of the GPU belongs to the ranges that were open, on the thread that asked for it, when it asked: the call
has the activity's correlation id. A replayed graph is one call that all its nodes belong to. Times are nanoseconds.
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernel_names import short_name

from echo_rt.errors import ConfigError

# Ranges that are pushed and popped, and therefore nest on their thread.
_PUSH_POP = 59
# A global thread id is a process, which has an id of its own, and 24 bits for the thread.
_THREAD_BITS = 24

_STRINGS = "StringIds"
_KERNELS = "CUPTI_ACTIVITY_KIND_KERNEL"
_COPIES = {"CUPTI_ACTIVITY_KIND_MEMCPY": "[memcpy]", "CUPTI_ACTIVITY_KIND_MEMSET": "[memset]"}
_CALLS = "CUPTI_ACTIVITY_KIND_RUNTIME"
_RANGES = "NVTX_EVENTS"
_WHOLE_GRAPHS = "CUPTI_ACTIVITY_KIND_GRAPH_TRACE"
_ACTIVITY = ("start", "end", "deviceId", "correlationId", "globalPid")
_COLUMNS = {
    _STRINGS: ("id", "value"),
    _KERNELS: (*_ACTIVITY, "demangledName"),
    **dict.fromkeys(_COPIES, _ACTIVITY),
    _CALLS: ("start", "correlationId", "globalTid"),
    _RANGES: ("start", "end", "eventType", "globalTid", "text", "textId"),
}
_NEEDED = {_STRINGS: "names", _KERNELS: "kernels", _CALLS: "calls of CUDA", _RANGES: "NVTX ranges"}


@dataclass(frozen=True)
class Range:
    """One stay of a thread in an NVTX range."""

    name: str
    thread: int
    start: int
    end: int


@dataclass(frozen=True)
class Activity:
    """A kernel, copy or fill on the GPU, and the ranges it was asked for in, the outermost first."""

    name: str
    start: int
    end: int
    device: int
    ranges: tuple[Range, ...]


@dataclass(frozen=True)
class Trace:
    """Both in the order of their starts."""

    activities: list[Activity]
    ranges: list[Range]


def read_trace(path: Path) -> Trace:
    """:class:`ConfigError` for a file that is no such export, and for tables and columns that are missing."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
        try:
            return _read(database, path.name)
        except sqlite3.DatabaseError as error:
            raise ConfigError(f"{path.name}: expected a database that nsys has exported; {error}") from None


def _read(database: sqlite3.Connection, source: str) -> Trace:
    tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")}
    _check(database, tables, source)
    names = dict(database.execute(f"SELECT id, value FROM {_STRINGS}"))
    ranges = _ranges(database, names)
    within = _enclosing(database, ranges)
    activities = [
        Activity(short_name(names.get(name, f"[kernel {name}]")), start, end, device, within.get((pid, call), ()))
        for start, end, device, call, pid, name in _rows(database, _KERNELS)
        for pid in (pid >> _THREAD_BITS,)
    ]
    for table, label in _COPIES.items():
        if table in tables:
            activities += [
                Activity(label, start, end, device, within.get((pid >> _THREAD_BITS, call), ()))
                for start, end, device, call, pid in _rows(database, table)
            ]
    if not activities:
        raise ConfigError(f"{source}: expected work of a GPU, got none: was anything run while the profiler listened?")
    return Trace(sorted(activities, key=lambda activity: activity.start), ranges)


def _check(database: sqlite3.Connection, tables: set[str], source: str) -> None:
    absent = [f"{table} ({what})" for table, what in _NEEDED.items() if table not in tables]
    if absent:
        raise ConfigError(
            f"{source}: lacks {', '.join(absent)}; nsys profile needs --trace=cuda,nvtx, and a GPU's work"
        )
    for table, wanted in _COLUMNS.items():
        if table in tables:
            found = {column[1] for column in database.execute(f"PRAGMA table_info({table})")}
            missing = [column for column in wanted if column not in found]
            if missing:
                raise ConfigError(f"{source}: {table} lacks the columns {', '.join(missing)}")
    if _WHOLE_GRAPHS in tables and database.execute(f"SELECT count(*) FROM {_WHOLE_GRAPHS}").fetchone()[0]:
        raise ConfigError(f"{source}: expected the kernels of graphs, got whole graphs; use --cuda-graph-trace=node")


def _rows(database: sqlite3.Connection, table: str) -> Iterable[tuple[Any, ...]]:
    columns = ", ".join(f'"{column}"' for column in _COLUMNS[table])
    return database.execute(f"SELECT {columns} FROM {table}")


def _ranges(database: sqlite3.Connection, names: dict[int, str]) -> list[Range]:
    """A range that was not left before the trace ended has no end of its own."""
    for_ever = 2**63
    found = []
    for start, end, kind, thread, text, text_id in _rows(database, _RANGES):
        if kind == _PUSH_POP:
            name = text if text is not None else names.get(text_id, "[unnamed]")
            found.append(Range(name, thread, start, for_ever if end is None else end))
    # Of two that start together, the one that ends later is around the other.
    return sorted(found, key=lambda each: (each.start, -each.end))


def _enclosing(database: sqlite3.Connection, ranges: list[Range]) -> dict[tuple[int, int], tuple[Range, ...]]:
    """Process and correlation id of every call of CUDA -> the ranges around it, the outermost first."""
    on_thread: dict[int, list[Range]] = defaultdict(list)
    for each in reversed(ranges):
        on_thread[each.thread].append(each)
    calls: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for start, call, thread in _rows(database, _CALLS):
        calls[thread].append((start, call))
    within: dict[tuple[int, int], tuple[Range, ...]] = {}
    for thread, asked in calls.items():
        coming, around = on_thread[thread], tuple[Range, ...]()
        for start, call in sorted(asked):
            while coming and coming[-1].start <= start:
                entered = coming.pop()
                around = (*(each for each in around if each.end > entered.start), entered)
            around = tuple(each for each in around if each.end > start)
            within[thread >> _THREAD_BITS, call] = around
    return within
