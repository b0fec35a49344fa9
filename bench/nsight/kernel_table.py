"""A report of Nsight Compute as two tables: ``python bench/nsight/kernel_table.py CSV`` (kernel.sh calls it).

The first has a row for each kernel: medians over its launches. The second says what its warps waited for.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _bench  # noqa: F401
import ncu_csv
from ncu_csv import Launch, read_launches

from echo_rt.bench.tables import Column, markdown
from echo_rt.errors import EchoError

KERNEL_COLUMNS = (
    Column("kernel", "kernel", text=True),
    Column("launches", "launches"),
    Column("microseconds", "µs", ".1f"),
    Column("megabytes_read", "DRAM read MB", ".2f"),
    Column("megabytes_written", "written MB", ".2f"),
    Column("dram", "of DRAM's peak", ".0%"),
    Column("l2", "L2 hits", ".0%"),
    Column("tensor", "tensor pipe", ".0%"),
    Column("occupancy", "occupancy", ".0%"),
    Column("registers", "registers", ".0f"),
)
STALL_COLUMNS = (
    Column("kernel", "kernel", text=True),
    Column("reason", "state of its warps", text=True),
    Column("cycles", "cycles an instruction", ".2f"),
    Column("share", "of all", ".0%"),
)


def _median(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.median(there) if there else None


def _by_kernel(launches: Sequence[Launch]) -> dict[str, list[Launch]]:
    """In the order of their first launch."""
    found: dict[str, list[Launch]] = {}
    for launch in launches:
        found.setdefault(launch.kernel, []).append(launch)
    return found


def kernel_rows(launches: Sequence[Launch]) -> list[dict[str, Any]]:
    """A row for each kernel; what the GPU does not count is None."""
    rows = []
    for kernel, same in _by_kernel(launches).items():

        def median(name: str, scale: float = 1.0, same: list[Launch] = same) -> float | None:
            found = _median([launch.metrics[name] for launch in same])
            return None if found is None else found * scale

        rows.append(
            {
                "kernel": kernel,
                "launches": len(same),
                "microseconds": median(ncu_csv.TIME, 1e6),
                "megabytes_read": median(ncu_csv.READ, 1e-6),
                "megabytes_written": median(ncu_csv.WRITTEN, 1e-6),
                "dram": median(ncu_csv.DRAM_SHARE),
                "l2": median(ncu_csv.L2_HITS),
                "tensor": median(ncu_csv.TENSOR_SHARE),
                "occupancy": median(ncu_csv.OCCUPANCY),
                "registers": median(ncu_csv.REGISTERS),
            }
        )
    return rows


def stall_rows(launches: Sequence[Launch], top: int) -> list[dict[str, Any]]:
    """The ``top`` states in which each kernel's warps spent most cycles; ``share``: of the cycles of all states."""
    rows = []
    for kernel, same in _by_kernel(launches).items():
        reasons = {reason for launch in same for reason in launch.stalls}
        cycles = {reason: _median([launch.stalls.get(reason) for launch in same]) or 0.0 for reason in reasons}
        every = sum(cycles.values())
        for reason in sorted(cycles, key=lambda reason: (-cycles[reason], reason))[:top]:
            share = cycles[reason] / every if every else None
            rows.append({"kernel": kernel, "reason": reason, "cycles": cycles[reason], "share": share})
    return rows


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, nargs="?", metavar="CSV", help="the raw page of a report, from kernel.sh")
    parser.add_argument("--metrics", action="store_true", help="print what ncu must be asked for, and no table")
    parser.add_argument("--stalls", type=int, default=5, metavar="N", help="states of a kernel's warps; default: 5")
    arguments = parser.parse_args(argv)
    if arguments.metrics:
        print(",".join(ncu_csv.METRICS))
        return 0
    if arguments.report is None:
        parser.error("expected CSV, or --metrics")
    try:
        text = arguments.report.read_text(encoding="utf-8")
        launches = read_launches(text.splitlines(), arguments.report.name)
    except OSError as error:
        print(f"kernel_table.py: {arguments.report}: cannot be read: {error.strerror}", file=sys.stderr)
        return 2
    except (UnicodeDecodeError, EchoError) as error:
        print(f"kernel_table.py: {error}", file=sys.stderr)
        return 2
    print(markdown(kernel_rows(launches), KERNEL_COLUMNS))
    print(markdown(stall_rows(launches, arguments.stalls), STALL_COLUMNS), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
