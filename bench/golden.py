"""Every golden bundle in every dtype on both backends: ``python bench/golden.py --out DIR`` writes golden.json.

What ``echo-rt verify`` does for one dtype and one backend, in one process. Bundles are those in tests/golden, in a
folder shared/golden inside or beside the checkout, and in $ECHO_RT_GOLDEN. Exit code 0 if all are as expected, 1 if
not, 2 for arguments that cannot be had.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import _checkout
import torch

from echo_rt.bench.environment import environment
from echo_rt.bench.tables import Column, check_results_folder, write_results
from echo_rt.cli.arguments import parse_path
from echo_rt.errors import BackendError, EchoError
from echo_rt.ops.backends import BACKENDS
from echo_rt.options import DTYPE_NAMES
from echo_rt.utils.device import parse_device
from echo_rt.utils.wording import with_type

# From which on tensor cores multiply float8. Not asked of echo_rt: a refusal there must not explain itself.
FLOAT8_CAPABILITY = (8, 9)
GOLDEN_VARIABLE = "ECHO_RT_GOLDEN"
COLUMNS = (
    Column("bundle", "bundle", text=True),
    Column("backend", "backend", text=True),
    Column("dtype", "dtype", text=True),
    Column("ok", "ok", text=True),
    Column("good", "within"),
    Column("tensors", "of"),
    Column("error", "worst error", ".1e"),
    Column("bound", "bound", ".1e"),
    Column("seconds", "s", ".1f"),
    Column("note", "", text=True),
)


@dataclass(frozen=True)
class Result:
    """One bundle in one dtype on one backend; ``error`` is that of the tensor furthest off, against its ``bound``."""

    bundle: str
    backend: str
    dtype: str
    ok: bool
    good: int
    tensors: int
    error: float | None
    bound: float | None
    seconds: float
    note: str = ""


def find_bundles(small: bool) -> list[Path]:
    """Folders of bundles, each once; ``small``: those that lie in this repository alone."""
    homes = [_checkout.ROOT / "tests" / "golden"]
    if not small:
        homes += [_checkout.ROOT / "shared" / "golden", _checkout.ROOT.parent / "shared" / "golden"]
        homes += [Path(home) for home in (os.environ.get(GOLDEN_VARIABLE),) if home]
    found: dict[bytes, Path] = {}
    for home in homes:
        for config in sorted(home.glob("*/config.json")):
            # The small ones lie in two places.
            found.setdefault(config.read_bytes(), config.parent)
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


def verify(bundle: Path, device: str, backend: str, dtype: str) -> Result:
    """Run one bundle; an error is a result too."""
    from echo_rt.verify.bundles import verify_bundle

    begun = time.monotonic()
    reason = refusal(bundle, device, backend, dtype)

    def result(ok: bool, note: str) -> Result:
        return Result(bundle.name, backend, dtype, ok, 0, 0, None, None, time.monotonic() - begun, note)

    try:
        report = verify_bundle(bundle, device=device, dtype=dtype, backend=backend)
    except BackendError as error:
        return result(bool(reason), f"refused, as it must be: {reason}" if reason else str(error))
    except (EchoError, RuntimeError) as error:  # the latter is how torch and its drivers fail
        return result(False, with_type(error))
    if reason:
        return result(False, f"expected a refusal of {dtype} ({reason}), it ran")
    # A NaN is further off than anything.
    worst = max(report.rows, key=lambda row: row.error / row.bound if row.error == row.error else float("inf"))
    good = sum(row.ok for row in report.rows)
    seconds = time.monotonic() - begun
    return Result(bundle.name, backend, dtype, report.passed, good, len(report.rows), worst.error, worst.bound, seconds)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=parse_path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu; default: cuda")
    parser.add_argument(
        "--backend", action="append", choices=BACKENDS, help="may be repeated; default: torch, and the device's kernels"
    )
    parser.add_argument("--dtype", action="append", choices=DTYPE_NAMES, help="may be repeated; default: all")
    parser.add_argument("--quick", action="store_true", help="only the small bundles in tests/golden")
    arguments = parser.parse_args(argv)
    backends = arguments.backend or ["torch", "emulated" if arguments.device == "cpu" else "cuda"]
    results: list[Result] = []

    def save(passed: bool) -> str:
        table = {"Bundles": (results, COLUMNS)}
        return write_results(arguments.out, "golden", "Golden bundles", facts, table, page=False, passed=passed)

    try:
        check_results_folder(arguments.out)
        parse_device(arguments.device)  # or every bundle would tell that there is no such device
        facts = environment(arguments.device)
        for bundle in find_bundles(arguments.quick):
            for backend in backends:
                for dtype in arguments.dtype or DTYPE_NAMES:
                    results.append(verify(bundle, arguments.device, backend, dtype))
                    print(f"{bundle.name}, {backend}, {dtype}: {'ok' if results[-1].ok else 'OFF'}", flush=True)
                    save(False)  # the time may run out
        passed = bool(results) and all(result.ok for result in results)
        print(save(passed))
    except EchoError as error:
        print(f"golden.py: {error}", file=sys.stderr)
        return 2
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
