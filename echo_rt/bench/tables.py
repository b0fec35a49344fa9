"""The one writer of benchmark results: rows as an aligned Markdown table, as JSON under a header, and as bars.

The header says what a number was measured on; what cannot be had is None there, and ``missing`` says why. A table is
plain text that reads as well in a terminal as in a browser. Bars need matplotlib, an optional dependency.
"""

from __future__ import annotations

import datetime
import importlib.util
import io
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from echo_rt.errors import ConfigError, TargetError
from echo_rt.utils.atomic_file import reason, write_whole
from echo_rt.utils.build_info import __version__
from echo_rt.utils.wording import first_line

# Where the package lies: a checkout, or a folder of installed packages.
ROOT = Path(__file__).resolve().parents[2]
# Names the commit where the sources travel without their history: any text, "dirty" in it where that is so.
COMMIT_VARIABLE = "ECHO_RT_COMMIT"
# What nvidia-smi is asked for.
_OF_THE_DRIVER = {
    "driver": "driver_version",
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "max_sm_clock_mhz": "clocks.max.sm",
    "power_limit_w": "enforced.power.limit",
    "temperature_c": "temperature.gpu",
}
_WIDTH, _BAR = 9.0, 0.28  # inches of a chart


# ---- the header


def environment(device: str) -> dict[str, Any]:
    """The header for ``device`` (``cuda``, ``cuda:N`` or ``cpu``): plain JSON types."""
    import torch

    missing: list[str] = []
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    header: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "commit": _commit(missing),
        "echo_rt": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "kernels": _kernels(missing),
        "host": {"system": platform.platform(), "processor": cpu[1] if cpu else platform.processor()}
        | {"cores": os.cpu_count()},
        "gpu": _gpu(device, missing) if device.startswith("cuda") else None,
    }
    return header | {"missing": missing}


def summary_line(header: Mapping[str, Any]) -> str:
    """The header in one line, for the top of a table."""
    gpu, commit = header["gpu"], header["commit"] or "unknown"
    dirty = "+dirty" if commit.endswith("dirty") else ""
    place = f"no GPU: {header['host']['processor']}, {header['host']['cores']} cores" if gpu is None else ""
    words = [header["date"], f"commit {commit[:12]}{dirty}", place or f"{gpu['name']}, driver {gpu['driver']}"]
    words += [f"torch {header['torch']}", f"CUDA {header['cuda']}", f"cuDNN {header['cudnn']}"]
    return " · ".join([*words, f"echo-rt {header['echo_rt']}"])


def _output(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def _commit(missing: list[str]) -> str | None:
    """The commit, with ``+dirty`` where the tree differs from it."""
    if given := os.environ.get(COMMIT_VARIABLE):
        return given
    try:
        # An installed package may lie inside the working tree of someone else, whose commit is not ours.
        _output("git", "ls-files", "--error-unmatch", "echo_rt/__init__.py")
        return _output("git", "rev-parse", "HEAD") + ("+dirty" if _output("git", "status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError) as error:
        missing.append(f"commit: no git history here, and {COMMIT_VARIABLE} is not set ({type(error).__name__})")
        return None


def _kernels(missing: list[str]) -> dict[str, str] | None:
    try:
        import echo_rt._ops as ops
    except ImportError as error:
        missing.append(f"kernels: {first_line(error)}")
        return None
    return {"backend": ops.BACKEND, "architectures": ops.CUDA_ARCHS, "version": ops.VERSION}


def _gpu(device: str, missing: list[str]) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(device)
    facts: dict[str, Any] = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        **dict.fromkeys(_OF_THE_DRIVER),
    }
    # By identity: torch's numbers count what CUDA_VISIBLE_DEVICES leaves.
    command = ["nvidia-smi", f"--id=GPU-{properties.uuid}", "--format=csv,noheader,nounits"]
    try:
        cells = _output(*command, f"--query-gpu={','.join(_OF_THE_DRIVER.values())}").split(", ")
    except (OSError, subprocess.SubprocessError) as error:
        missing.append(f"driver, clocks and power: {first_line(error)}")
        return facts
    for name, cell in zip(_OF_THE_DRIVER, cells, strict=False):
        try:
            facts[name] = cell if name == "driver" else float(cell)
        except ValueError:
            missing.append(f"{name}: {cell}")
    return facts


# ---- tables


class Column(NamedTuple):
    """A column: the key of a row, its heading, and how a number is put; None: text, which is set to the left."""

    key: str
    heading: str
    form: str | None = None


def columns(*words: str) -> tuple[Column, ...]:
    """Columns from ``key|heading|format of a number``; those without a format are text."""
    return tuple(Column(*word.split("|")) for word in words)


Row = Mapping[str, Any]
Table = tuple[Sequence[Row], Sequence[Column]]


def _cell(row: Row, column: Column) -> str:
    if column.key not in row:
        raise ConfigError(f"a row lacks {column.key!r}; it has {', '.join(row)}")
    value = row[column.key]
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: "no"}[value]
    return format(value, column.form or "").replace("|", r"\|").replace("\n", " ")


def markdown(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """The table, with columns as wide as what they hold; None is a dash."""
    body = [[_cell(row, column) for column in columns] for row in rows]
    head = [column.heading for column in columns]
    # Three dashes, one of which may be the colon, are the least that Markdown takes for a rule.
    widths = [max(3, *map(len, cells)) for cells in zip(head, *body, strict=True)]
    rule = ["-" * w if c.form is None else "-" * (w - 1) + ":" for c, w in zip(columns, widths, strict=True)]

    def line(cells: Sequence[str]) -> str:
        placed = [
            f"{s:<{w}}" if c.form is None else f"{s:>{w}}" for s, c, w in zip(cells, columns, widths, strict=True)
        ]
        return f"| {' | '.join(placed)} |"

    return "\n".join([line(head), line(rule), *map(line, body)]) + "\n"


def results(
    title: str, header: Mapping[str, Any], tables: Mapping[str, Table], notes: Sequence[str] = (), **facts: Any
) -> tuple[dict[str, Any], str]:
    """The content of the JSON, and the page. ``tables``: by heading; ``facts``: further entries of the JSON."""
    rows = {heading: list(rows) for heading, (rows, _) in tables.items()}
    content = {"title": title, "environment": header, **facts, "tables": rows, "notes": list(notes)}
    parts = [f"# {title}\n", f"{summary_line(header)}\n"]
    for heading, table in tables.items():
        parts += [f"## {heading}\n", markdown(*table)]
    if notes:
        parts.append("".join(f"- {note}\n" for note in notes))
    # JSON has no infinity and no NaN: those become None.
    return msgspec.json.decode(msgspec.json.encode(content)), "\n".join(parts)


def write_results(folder: Path, name: str, content: Mapping[str, Any], page: str) -> str:
    """Write ``name.json`` and ``name.md`` into ``folder``, each whole or not at all; returns ``page``."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TargetError(f"{folder}: cannot make the folder: {reason(error)}") from None
    write_whole(folder / f"{name}.json", (json.dumps(content, indent=1) + "\n").encode())
    write_whole(folder / f"{name}.md", page.encode())
    return page


# ---- bars


def can_draw() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(path: Path, title: str, bars: Sequence[tuple[str, str, float, float]]) -> None:
    """Bars of (group, part, median, 99th percentile) in milliseconds, into a PNG; raises ``OutputError``."""
    # Figure itself, not pyplot: that one keeps every figure, and asks for a display.
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(_WIDTH, 1.5 + _BAR * len(bars)), layout="constrained")
    axis = figure.subplots()
    colours: dict[str, str] = {}
    for place, (_, part, median, p99) in enumerate(bars):
        label = "_again" if part in colours else part  # an underscore keeps it out of the legend
        colour = colours.setdefault(part, f"C{len(colours)}")
        axis.barh(place, median, xerr=[[0.0], [p99 - median]], label=label, color=colour, capsize=2)
        axis.annotate(f" {median:.3g}", (p99, place), va="center", fontsize=8)
    axis.set_yticks(range(len(bars)), [group for group, *_ in bars])
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_xlabel("ms a block, median; whisker: 99th percentile")
    axis.set_title(title)
    axis.legend(fontsize=8, loc="upper left")  # to find the "best" place takes long
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_whole(path, buffer.getvalue())
