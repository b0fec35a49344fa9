"""A report of Nsight Compute as two tables: ``python bench/nsight/kernel_table.py CSV`` (kernel.sh calls it).

The first has a row for each kernel: medians over its launches. The second says what its warps waited for. CSV is what
``ncu --import REPORT --csv --page raw --print-units base`` prints: a row a launch, a column a metric; before the header
lines of ncu itself, behind it one row of units. A metric that a GPU does not have is ``n/a``.
"""

from __future__ import annotations

import argparse
import csv
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import _checkout  # noqa: F401
from registers import short_name

from echo_rt.bench.tables import columns, markdown
from echo_rt.errors import ConfigError, EchoError

KERNEL = "Kernel Name"
# Units by what they measure, as releases of ncu have spelled them.
_SECONDS = {"ns": 1e-9, "nsecond": 1e-9, "us": 1e-6, "usecond": 1e-6, "ms": 1e-3, "msecond": 1e-3, "s": 1, "second": 1}
_BYTES = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
_PERCENT = {"%": 0.01}
# Column of the table -> metric, its units (None: any), and what the table's unit is of the base unit.
_METRICS: dict[str, tuple[str, dict[str, float] | None, float]] = {
    "microseconds": ("gpu__time_duration.sum", _SECONDS, 1e6),
    "megabytes_read": ("dram__bytes_read.sum", _BYTES, 1e-6),
    "megabytes_written": ("dram__bytes_write.sum", _BYTES, 1e-6),
    "dram": ("gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed", _PERCENT, 1),
    "l2": ("lts__t_sector_hit_rate.pct", _PERCENT, 1),
    "tensor": ("sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active", _PERCENT, 1),
    "occupancy": ("sm__warps_active.avg.pct_of_peak_sustained_active", _PERCENT, 1),
    "registers": ("launch__registers_per_thread", None, 1),
}
METRICS = tuple(metric for metric, _, _ in _METRICS.values())
# For each instruction issued, the cycles that a warp spent in a state: the section WarpStateStats has them.
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+?)(?<!_not_issued)_per_issue_active\.ratio")
KERNEL_COLUMNS = columns(
    "kernel|kernel", "launches|launches|", "microseconds|µs|.1f", "megabytes_read|DRAM read MB|.2f",
    "megabytes_written|written MB|.2f", "dram|of DRAM's peak|.0%", "l2|L2 hits|.0%", "tensor|tensor pipe|.0%",
    "occupancy|occupancy|.0%", "registers|registers|.0f",
)  # fmt: skip
STALL_COLUMNS = columns(
    "kernel|kernel", "reason|state of its warps", "cycles|cycles an instruction|.2f", "share|of all|.0%"
)


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: values by the table's columns and in its units; None where the GPU counts no such."""

    kernel: str
    values: dict[str, float | None]
    stalls: dict[str, float]


def read_launches(lines: Iterable[str], source: str) -> list[Launch]:
    """Every launch in the report; ``source`` is named in errors.

    :class:`ConfigError` for text that is no such report, columns that are missing, units and numbers that are unknown.
    """
    rows = list(csv.reader(line for line in lines if line.startswith('"')))
    if not rows or rows[0][:1] != ["ID"]:
        raise ConfigError(f'{source}: expected CSV of ncu, whose header begins with "ID"; got none')
    header, body = rows[0], rows[1:]
    if "Metric Name" in header:
        raise ConfigError(f"{source}: expected the raw page of ncu (--page raw), got the details page")
    stalls = {match[1]: match[0] for match in map(STALL.fullmatch, header) if match}
    missing = [name for name in (KERNEL, *METRICS) if name not in header] + ([] if stalls else [STALL.pattern])
    if missing:
        raise ConfigError(f"{source}: lacks the columns {', '.join(missing)}")
    if not body or body[0][0] != "":
        came = "a launch" if body else "nothing"
        raise ConfigError(f"{source}: expected a row of units behind the header, got {came}")
    if uneven := [row for row in body if len(row) != len(header)]:
        raise ConfigError(f"{source}: expected {len(header)} columns in every row, got {len(uneven[0])}: is it whole?")
    if len(body) == 1:
        raise ConfigError(f"{source}: expected at least one launch, got none: was a kernel profiled?")
    units = dict(zip(header, body[0], strict=True))

    def number(row: dict[str, str], name: str, scales: dict[str, float] | None) -> float | None:
        if row[name] in ("n/a", ""):
            return None
        if scales is not None and units[name] not in scales:
            raise ConfigError(f"{source}: {name}: expected a unit of {', '.join(scales)}; got {units[name]!r}")
        try:
            return float(row[name].replace(",", "")) * (scales[units[name]] if scales else 1)
        except ValueError:
            kernel = short_name(row[KERNEL])
            raise ConfigError(f"{source}: {name} of {kernel}: expected a number, got {row[name]!r}") from None

    launches = []
    for cells in body[1:]:
        row = dict(zip(header, cells, strict=True))
        values = {}
        for column, (name, scales, scale) in _METRICS.items():
            value = number(row, name, scales)
            values[column] = None if value is None else value * scale
        waits = {reason: value for reason, name in stalls.items() if (value := number(row, name, None)) is not None}
        launches.append(Launch(short_name(row[KERNEL]), values, waits))
    return launches


def _median(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.median(there) if there else None


def _by_kernel(launches: Sequence[Launch]) -> dict[str, list[Launch]]:
    """In the order of their first launch."""
    names = dict.fromkeys(launch.kernel for launch in launches)
    return {name: [launch for launch in launches if launch.kernel == name] for name in names}


def kernel_rows(launches: Sequence[Launch]) -> list[dict[str, Any]]:
    """A row for each kernel; what the GPU does not count is None."""
    rows = []
    for kernel, same in _by_kernel(launches).items():
        medians = {column: _median(launch.values[column] for launch in same) for column in _METRICS}
        rows.append({"kernel": kernel, "launches": len(same), **medians})
    return rows


def stall_rows(launches: Sequence[Launch], top: int) -> list[dict[str, Any]]:
    """The ``top`` states in which each kernel's warps spent most cycles; ``share``: of the cycles of all states."""
    rows = []
    for kernel, same in _by_kernel(launches).items():
        reasons = {reason for launch in same for reason in launch.stalls}
        cycles = {reason: _median(launch.stalls.get(reason) for launch in same) or 0.0 for reason in reasons}
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
        print(",".join(METRICS))
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
