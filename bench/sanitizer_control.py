"""Whether compute-sanitizer finds what it should on this machine: ``python bench/sanitizer_control.py``.

A tool that is asked for kernels by the wrong name, or that cannot see into this device, reports no error either. So the
same flags are tried on planted mistakes (sanitizer_control.cu). Exit code 0 if both are found, 1 if not, 2 without the
tools that this takes.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from gpu_stages import find_program, sanitizer_command

SOURCE = Path(__file__).with_name("sanitizer_control.cu")
# Tool -> the mistake it must find, and how it says so.
PLANTED = {
    "memcheck": ("beyond", r"ERROR SUMMARY: [1-9]"),
    "racecheck": ("race", r"RACECHECK SUMMARY: [1-9]"),
}


def main() -> int:
    nvcc, sanitizer = find_program("nvcc"), find_program("compute-sanitizer")
    if nvcc is None or sanitizer is None:
        missing = [name for name, path in (("nvcc", nvcc), ("compute-sanitizer", sanitizer)) if path is None]
        print(f"sanitizer_control.py: not found on the PATH or under CUDA_HOME: {', '.join(missing)}", file=sys.stderr)
        return 2
    folder = Path(tempfile.mkdtemp(prefix="sanitizer-control-"))
    try:
        program = folder / "control"
        built = subprocess.run([nvcc, "-lineinfo", "-arch=native", "-o", str(program), str(SOURCE)])
        if built.returncode != 0:
            print(f"sanitizer_control.py: nvcc ended with {built.returncode}", file=sys.stderr)
            return 1
        found = [finds(sanitizer, tool, program) for tool in PLANTED]
    finally:
        shutil.rmtree(folder)
    return 0 if all(found) else 1


def finds(sanitizer: str, tool: str, program: Path) -> bool:
    """Whether ``tool`` reports the mistake that is planted for it."""
    mistake, words = PLANTED[tool]
    command = [*sanitizer_command(sanitizer, tool), str(program), mistake]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    found = re.search(words, done.stdout) is not None
    print(f"{tool}: the planted mistake was {'found' if found else 'NOT found'}")
    return found


if __name__ == "__main__":
    sys.exit(main())
