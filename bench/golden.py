"""Every golden bundle in every dtype on both backends: ``python bench/golden.py --out DIR`` writes golden.json and .md.

What ``echo-rt verify`` does for one dtype and one backend, in one process. Bundles are those in tests/golden, in a
folder shared/golden inside or beside the checkout, and in $ECHO_RT_GOLDEN. Exit code 0 if all are as expected, 1 if
not, 2 for arguments that cannot be had.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import _checkout
import torch

from echo_rt.bench.tables import columns, environment
from echo_rt.errors import BackendError, EchoError
from echo_rt.options import DTYPE_NAMES
from echo_rt.utils.device import parse_device
from echo_rt.utils.wording import with_type
from echo_rt.verify.bundles import verify_bundle

# From which on tensor cores multiply float8. Not asked of echo_rt: a refusal there must not explain itself.
FLOAT8_CAPABILITY = (8, 9)
GOLDEN_VARIABLE = "ECHO_RT_GOLDEN"
COLUMNS = columns(
    "bundle|bundle", "backend|backend", "dtype|dtype", "ok|ok", "good|within|", "tensors|of|",
    "error|worst error|.1e", "bound|bound|.1e", "seconds|s|.1f", "note|",
)  # fmt: skip


def find_bundles(small: bool) -> list[Path]:
    """Folders of bundles but those of recipes, each once; ``small``: those that lie in this repository alone."""
    more = ["shared/golden", "../shared/golden", *map(os.path.abspath, filter(None, [os.environ.get(GOLDEN_VARIABLE)]))]
    found: dict[bytes, Path] = {}
    for home in ("tests/golden", *([] if small else more)):
        for config in sorted((_checkout.ROOT / home).glob("*/config.json")):
            found.setdefault(config.read_bytes(), config.parent)  # the small ones lie in two places
    return list(found.values())


def refusal(bundle: Path, device: str, backend: str, dtype: str) -> str:
    """Why it must be refused here, "" where it must run: by the kernels' tensor cores, or by those of the GPU."""
    flat = json.loads((bundle / "config.json").read_text(encoding="utf-8"))
    if backend != "torch" and dtype == "float32" and flat.get("memory") is not None:
        return "kernels update a memory in 16 bits"
    if dtype == "float8" and device.startswith("cuda"):
        found = torch.cuda.get_device_capability(device)
        if found < FLOAT8_CAPABILITY:
            needed, own = ("{}.{}".format(*capability) for capability in (FLOAT8_CAPABILITY, found))
            return f"float8 needs compute capability {needed}, this GPU has {own}"
    return ""


def verify(bundle: Path, device: str, backend: str, dtype: str) -> dict[str, Any]:
    """Run one bundle; a row, whose ``error`` is that of the tensor furthest off. An error is a result too."""
    begun, reason = time.monotonic(), refusal(bundle, device, backend, dtype)
    row: dict[str, Any] = {"bundle": bundle.name, "backend": backend, "dtype": dtype, "ok": False, "good": 0}
    row |= {"tensors": 0, "error": None, "bound": None, "note": ""}
    try:
        report = verify_bundle(bundle, device=device, dtype=dtype, backend=backend)
        if reason:
            row["note"] = f"expected a refusal of {dtype} ({reason}), it ran"
        else:
            # A NaN is further off than anything.
            worst = max(report.rows, key=lambda row: row.error / row.bound if row.error == row.error else float("inf"))
            row |= {"ok": report.passed, "good": sum(each.ok for each in report.rows), "tensors": len(report.rows)}
            row |= {"error": worst.error, "bound": worst.bound}
    except BackendError as error:
        row |= {"ok": bool(reason), "note": f"refused, as it must be: {reason}" if reason else str(error)}
    except (EchoError, RuntimeError) as error:  # the latter is how torch and its drivers fail
        row["note"] = with_type(error)
    return row | {"seconds": time.monotonic() - begun}


def run(arguments: argparse.Namespace) -> tuple[bool, str]:
    """Verify and write; whether all bundles are as expected, and the page."""
    parse_device(arguments.device)  # or every bundle would tell that there is no such device
    backends = ("torch", "emulated" if arguments.device == "cpu" else "cuda")
    header, rows = environment(arguments.device), list[dict[str, Any]]()
    save = partial(_checkout.save, arguments.out, "golden", "Golden bundles", header, {"Bundles": (rows, COLUMNS)})
    for bundle, *way in itertools.product(find_bundles(arguments.quick), backends, DTYPE_NAMES):
        rows.append(verify(bundle, arguments.device, *way))
        print(f"{', '.join([bundle.name, *way])}: {'ok' if rows[-1]['ok'] else 'OFF'}", flush=True)
        save(passed=False)  # the time may run out
    passed = bool(rows) and all(row["ok"] for row in rows)
    return passed, save(passed=passed)


def main(argv: Sequence[str]) -> int:
    parser = _checkout.parser(__doc__, sizes=False)
    parser.add_argument("--quick", action="store_true", help="only the small bundles in tests/golden")
    return _checkout.run(__file__, run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
