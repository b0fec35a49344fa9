"""compute-sanitizer over the two kernels that synchronize most: ``python bench/sanitizer.py memcheck|racecheck``.

First the tool has to find a planted mistake (sanitizer.cu): one that is asked for kernels by a wrong name, or cannot
see into this device, reports no error either. Then it watches the tests of ``causal_conv_hopper`` and
``memory_attention``. Exit code 0 if the mistake was found and the kernels have none, 1 if not, 2 without the tools.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from _checkout import ROOT

SOURCE = Path(__file__).with_name("sanitizer.cu")
# Tool -> the mistake it must find, the summary of a run without mistakes, and that of one with some.
TOOLS = {
    "memcheck": ("beyond", "ERROR SUMMARY: 0 errors", r"ERROR SUMMARY: [1-9]"),
    "racecheck": ("race", "RACECHECK SUMMARY: 0 hazards", r"RACECHECK SUMMARY: [1-9]"),
}
TESTS = ("tests/ops/test_ops.py", "tests/ops/test_ops_convolution.py")
# One dtype, and sizes that end in time: instrumented code is many times slower.
CHOSEN = "cuda and bfloat16 and (hopper or memory_attention and head-128)"


def find_program(name: str) -> str | None:
    """A program of the CUDA toolkit: on the PATH, or where the toolkit lies."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [f"{home}/{part}" for home in homes if home for part in ("bin", "compute-sanitizer")]
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), *folders]))


def watched(sanitizer: str, tool: str, command: Sequence[str]) -> str:
    """Run ``command`` under ``tool``, which sees our kernels alone; returns what both said."""
    words = [sanitizer, "--tool", tool, "--kernel-regex", "kns=echo", *command]
    # In torch's pool an access beyond one tensor lies within the next.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    print(done.stdout, flush=True)
    return done.stdout


def main(argv: Sequence[str]) -> int:
    if len(argv) != 1 or argv[0] not in TOOLS:
        print(f"sanitizer.py: expected one of {', '.join(TOOLS)}, found {' '.join(argv) or 'none'}", file=sys.stderr)
        return 2
    (tool,) = argv
    mistake, clean, dirty = TOOLS[tool]
    nvcc, sanitizer = find_program("nvcc"), find_program("compute-sanitizer")
    if nvcc is None or sanitizer is None:
        missing = [name for name, path in (("nvcc", nvcc), ("compute-sanitizer", sanitizer)) if path is None]
        print(f"sanitizer.py: not found on the PATH or under CUDA_HOME: {', '.join(missing)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "planted")
        done = subprocess.run([nvcc, "-lineinfo", "-arch=native", "-o", program, str(SOURCE)])
        if done.returncode:
            print(f"sanitizer.py: nvcc ended with {done.returncode}", file=sys.stderr)
            return 1
        if re.search(dirty, watched(sanitizer, tool, [program, mistake])) is None:
            print(f"{tool}: the planted mistake was NOT found")
            return 1
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, "-k", CHOSEN]
    text = watched(sanitizer, tool, pytest)
    right = clean in text and re.search(r"\b[1-9]\d* passed", text) is not None and " failed" not in text
    print(f"{tool}: the planted mistake was found; {'no mistake' if right else 'NOT clean'} in {CHOSEN!r}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
