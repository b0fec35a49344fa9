"""Reads what ``ncu --import REPORT --csv --page raw --print-units base`` prints: a row a launch, a column a metric.

Before the header stand lines of ncu itself; behind it one row of units. A metric that a GPU does not have is ``n/a``.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass

from kernel_names import short_name

from echo_rt.errors import ConfigError

KERNEL = "Kernel Name"
TIME = "gpu__time_duration.sum"
READ = "dram__bytes_read.sum"
WRITTEN = "dram__bytes_write.sum"
DRAM_SHARE = "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed"
L2_HITS = "lts__t_sector_hit_rate.pct"
TENSOR_SHARE = "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active"
OCCUPANCY = "sm__warps_active.avg.pct_of_peak_sustained_active"
REGISTERS = "launch__registers_per_thread"
METRICS = (TIME, READ, WRITTEN, DRAM_SHARE, L2_HITS, TENSOR_SHARE, OCCUPANCY, REGISTERS)
# For each instruction issued, the cycles that a warp spent in a state: the section WarpStateStats has them.
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+?)(?<!_not_issued)_per_issue_active\.ratio")

# Units by what they measure, as releases of ncu have spelled them.
_SECONDS = {"ns": 1e-9, "nsecond": 1e-9, "us": 1e-6, "usecond": 1e-6, "ms": 1e-3, "msecond": 1e-3, "s": 1, "second": 1}
_BYTES = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
_PERCENT = {"%": 0.01}
_UNITS = {TIME: _SECONDS, READ: _BYTES, WRITTEN: _BYTES} | dict.fromkeys(
    (DRAM_SHARE, L2_HITS, TENSOR_SHARE, OCCUPANCY), _PERCENT
)


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: seconds, bytes, shares (0..1) and counts by metric; None where the GPU has no such."""

    kernel: str
    metrics: dict[str, float | None]
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
    missing = [name for name in (KERNEL, *METRICS) if name not in header]
    if not stalls:
        missing.append(STALL.pattern)
    if missing:
        raise ConfigError(f"{source}: lacks the columns {', '.join(missing)}")
    if not body or body[0][0] != "":
        raise ConfigError(
            f"{source}: expected a row of units behind the header, got {'a launch' if body else 'nothing'}"
        )
    uneven = next((row for row in body if len(row) != len(header)), None)
    if uneven is not None:
        raise ConfigError(f"{source}: expected {len(header)} columns in every row, got {len(uneven)}: is it whole?")
    units = dict(zip(header, body[0], strict=True))
    launches = []
    for cells in body[1:]:
        row = dict(zip(header, cells, strict=True))
        kernel = short_name(row[KERNEL])
        values = {name: _number(row[name], units[name], name, kernel, source) for name in (*METRICS, *stalls.values())}
        waits = {reason: value for reason, name in stalls.items() if (value := values[name]) is not None}
        launches.append(Launch(kernel, {name: values[name] for name in METRICS}, waits))
    if not launches:
        raise ConfigError(f"{source}: expected at least one launch, got none: was a kernel profiled?")
    return launches


def _number(text: str, unit: str, name: str, kernel: str, source: str) -> float | None:
    if text in ("n/a", ""):
        return None
    scales = _UNITS.get(name)
    if scales is not None and unit not in scales:
        raise ConfigError(f"{source}: {name}: expected a unit of {', '.join(scales)}; got {unit!r}")
    try:
        return float(text.replace(",", "")) * (scales[unit] if scales else 1)
    except ValueError:
        raise ConfigError(f"{source}: {name} of {kernel}: expected a number, got {text!r}") from None
