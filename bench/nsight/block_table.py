"""A trace of Nsight Systems as tables: ``python bench/nsight/block_table.py TRACE.sqlite`` (block.sh calls it).

What each NVTX range and each kernel took of the GPU, and for how long the GPU had nothing to do.
"""

from __future__ import annotations

import argparse
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import _bench  # noqa: F401
from nsys_sqlite import Activity, Range, Trace, read_trace

from echo_rt.bench.tables import Column, markdown
from echo_rt.errors import EchoError
from echo_rt.utils.wording import counted

OUTSIDE = "(in no range)"
Key = TypeVar("Key")

RANGE_COLUMNS = (
    Column("name", "NVTX range", text=True),
    Column("entered", "entered"),
    Column("launches", "launches"),
    Column("milliseconds", "GPU ms", ".3f"),
    Column("share", "of all GPU time", ".1%"),
    Column("idle", "GPU idle in it", ".1%"),
)
KERNEL_COLUMNS = (
    Column("name", "kernel", text=True),
    Column("launches", "launches"),
    Column("milliseconds", "GPU ms", ".3f"),
    Column("share", "of all GPU time", ".1%"),
    Column("microseconds", "µs each", ".1f"),
)
DEVICE_COLUMNS = (
    Column("device", "GPU"),
    Column("span", "from first to last, ms", ".3f"),
    Column("busy", "at work, ms", ".3f"),
    Column("idle", "idle", ".1%"),
    Column("launches", "launches"),
)


def _summed(activities: Iterable[Activity]) -> int:
    return sum(activity.end - activity.start for activity in activities)


def _group(activities: Iterable[Activity], keys: Callable[[Activity], Iterable[Key]]) -> dict[Key, list[Activity]]:
    found: dict[Key, list[Activity]] = {}
    for activity in activities:
        for key in keys(activity):
            found.setdefault(key, []).append(activity)
    return found


class Busy:
    """When a GPU was at work; what runs side by side counts once."""

    def __init__(self, activities: Sequence[Activity]) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        for activity in activities:  # in the order of their starts
            if self._ends and activity.start <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], activity.end)
            else:
                self._starts.append(activity.start)
                self._ends.append(activity.end)

    def within(self, begin: int, end: int) -> int:
        """Nanoseconds of work between two times."""
        worked = 0
        for place in range(bisect_right(self._ends, begin), bisect_left(self._starts, end)):
            worked += min(end, self._ends[place]) - max(begin, self._starts[place])
        return worked


def _spans(activities: Sequence[Activity], busy: dict[int, Busy]) -> tuple[int, int]:
    """Nanoseconds from the first start to the last end on each GPU, and those of them in which the GPU worked."""
    span = worked = 0
    for device, same in _group(activities, lambda activity: (activity.device,)).items():
        begin, end = same[0].start, max(activity.end for activity in same)
        span += end - begin
        worked += busy[device].within(begin, end)
    return span, worked


def _idle(span: int, worked: int) -> float | None:
    return 1 - worked / span if span else None


def _busy(trace: Trace) -> dict[int, Busy]:
    return {device: Busy(same) for device, same in _group(trace.activities, lambda each: (each.device,)).items()}


def device_rows(trace: Trace) -> list[dict[str, Any]]:
    """A row for each GPU."""
    rows, busy = [], _busy(trace)
    for device, same in sorted(_group(trace.activities, lambda each: (each.device,)).items()):
        span, worked = _spans(same, busy)
        facts = {"span": span / 1e6, "busy": worked / 1e6, "idle": _idle(span, worked), "launches": len(same)}
        rows.append({"device": device, **facts})
    return rows


def range_rows(trace: Trace) -> list[dict[str, Any]]:
    """A row for each name of a range with all that was launched in it, in ranges inside it too; the longest first.

    Time is summed over what ran side by side. Idle: of the time from first to last of what one stay in the range
    launched, the share in which the GPU did nothing at all.
    """
    every, busy = _summed(trace.activities), _busy(trace)
    names: dict[str, list[Range]] = {}
    for stay in trace.ranges:
        names.setdefault(stay.name, []).append(stay)
    launched = _group(trace.activities, lambda activity: activity.ranges)
    rows = []
    for name, stays in names.items():
        spans = [_spans(launched[stay], busy) for stay in stays if stay in launched]
        inside = {id(activity): activity for stay in stays for activity in launched.get(stay, ())}.values()
        idle = _idle(sum(span for span, _ in spans), sum(worked for _, worked in spans))
        rows.append(_range_row(name, len(stays), inside, every, idle))
    outside = [activity for activity in trace.activities if not activity.ranges]
    if outside:
        rows.append(_range_row(OUTSIDE, None, outside, every, None))
    return sorted(rows, key=lambda row: -row["milliseconds"])


def _range_row(
    name: str, entered: int | None, inside: Collection[Activity], every: int, idle: float | None
) -> dict[str, Any]:
    took = _summed(inside)
    facts = {"milliseconds": took / 1e6, "share": took / every if every else None, "idle": idle}
    return {"name": name, "entered": entered, "launches": len(inside), **facts}


def kernel_rows(trace: Trace) -> list[dict[str, Any]]:
    """A row for each kernel, and for copies and fills, the longest first."""
    every = _summed(trace.activities)
    rows = []
    for name, activities in _group(trace.activities, lambda activity: (activity.name,)).items():
        took, count = _summed(activities), len(activities)
        facts = {"milliseconds": took / 1e6, "share": took / every if every else None}
        rows.append({"name": name, "launches": count, **facts, "microseconds": took / count / 1e3})
    return sorted(rows, key=lambda row: -row["milliseconds"])


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path, metavar="SQLITE", help="a trace exported by nsys, as block.sh makes it")
    parser.add_argument("--top", type=int, default=30, metavar="N", help="kernels that are listed; default: 30")
    arguments = parser.parse_args(argv)
    try:
        trace = read_trace(arguments.trace)
    except EchoError as error:
        print(f"block_table.py: {error}", file=sys.stderr)
        return 2
    kernels = kernel_rows(trace)
    print(markdown(device_rows(trace), DEVICE_COLUMNS))
    print(markdown(range_rows(trace), RANGE_COLUMNS))
    print(markdown(kernels[: arguments.top], KERNEL_COLUMNS), end="")
    if len(kernels) > arguments.top:
        print(f"\nNot listed: {counted(len(kernels) - arguments.top, 'more kernel')}.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
