"""What each kernel takes of a multiprocessor, from ptxas' own words: ``python bench/registers.py LOG...``.

A LOG is what ``nvcc -Xptxas -v`` wrote. Prints a line for each kernel, with its registers, shared memory and spills on
every architecture. It fails for what goes to memory and back in an inner loop, and for products of a warpgroup that
wait for one another: no test of the result can tell.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

# Every kernel: mangled name, architecture, bytes of stack, of spill stores and loads, registers, shared bytes.
KERNEL = re.compile(
    r"Compiling entry function '(\S+)' for 'sm_(\w+)'(?:(?!Compiling).)*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads(?:(?!Compiling).)*?"
    r"Used (\d+) registers(?:[^\n]*? (\d+) bytes smem)?",
    re.DOTALL,
)
# What ptxas says where it puts waits between products of a warpgroup, or cannot let them run side by side.
SERIALIZED = re.compile(r"\(C75\d\d\).* in function '(\S+)'")
# The library's sine of a float64 reduces huge angles by way of an array.
WITH_STACK = ("advance_kernel", "counter_noise_kernel", "rope_table_kernel")
_PREFIXES = re.compile(r"\((?:anonymous namespace)\)::|<unnamed>::|\becho::")
HEADING = "kernel: registers of a thread (!: bytes it spills)"


@dataclass(frozen=True)
class Usage:
    """Of one kernel on one architecture; bytes are a thread's, those of shared memory a block's (static ones only)."""

    registers: int
    shared: int
    stack: int
    spilled: int


def parse(log: str) -> dict[tuple[str, str], Usage]:
    """(mangled kernel, architecture) -> usage, of every kernel that the log tells of."""
    found: dict[tuple[str, str], Usage] = {}
    for kernel, arch, stack, stores, loads, registers, shared in KERNEL.findall(log):
        found[kernel, arch] = Usage(int(registers), int(shared or 0), int(stack), int(stores) + int(loads))
    return found


def short_name(demangled: str) -> str:
    """The name in the source: without return type, our own namespaces and parameters, ``flow_step_kernel<__half>``."""
    name = _PREFIXES.sub("", demangled).removeprefix("void ")
    depth = 0
    for place, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0 and place > 0:  # "(int)8" among the template's arguments is no parameter
            return name[:place]
    return name


def readable(mangled: list[str]) -> dict[str, str]:
    """Mangled name -> the name in the source."""
    demangler = shutil.which("c++filt") or shutil.which("cu++filt")
    if demangler is None:
        return {name: name for name in mangled}
    done = subprocess.run([demangler], input="\n".join(mangled), capture_output=True, text=True, check=True)
    return dict(zip(mangled, map(short_name, done.stdout.splitlines()), strict=True))


def table(usage: dict[tuple[str, str], Usage]) -> list[str]:
    """Lines: kernel, then ``registers`` or ``registers!spilled bytes`` under each architecture, then shared memory."""
    architectures = sorted({arch for _, arch in usage}, key=lambda arch: int(re.sub(r"\D", "", arch)))
    kernels: dict[str, dict[str, Usage]] = defaultdict(dict)
    names = readable(sorted({kernel for kernel, _ in usage}))
    for (kernel, arch), used in usage.items():
        kernels[names[kernel]][arch] = used
    width = max(map(len, [*kernels, HEADING]))
    lines = [f"{HEADING:{width}}" + "".join(f" {arch:>8}" for arch in architectures) + "   smem"]
    for name, of_arch in sorted(kernels.items()):
        cells = {arch: f"{used.registers}" + f"!{used.spilled}" * bool(used.spilled) for arch, used in of_arch.items()}
        shared = max(used.shared for used in of_arch.values())
        lines.append(f"{name:{width}}" + "".join(f" {cells.get(a, '-'):>8}" for a in architectures) + f" {shared:6}")
    return lines


def complaints(usage: dict[tuple[str, str], Usage], serialized: set[str]) -> list[str]:
    """What is wrong, a line each; ``serialized``: mangled kernels whose products of a warpgroup wait."""
    names = readable(sorted({kernel for kernel, _ in usage} | serialized))
    spilling = {names[kernel] for (kernel, _), used in usage.items() if used.spilled}
    stacked = {names[kernel] for (kernel, _), used in usage.items() if used.stack and not used.spilled}
    stacked = {name for name in stacked if not name.startswith(WITH_STACK)}
    return [
        *(f"{name} spills registers: it needs smaller tiles or looser launch bounds" for name in sorted(spilling)),
        *(f"{name} has variables in memory: which one of several is meant must be known" for name in sorted(stacked)),
        *(f"{names[kernel]}: products of a warpgroup wait for one another" for kernel in sorted(serialized)),
    ]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0].partition(":")[0])
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="what nvcc -Xptxas -v wrote")
    text = ""
    for log in parser.parse_args(argv).logs:
        try:
            text += log.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            print(f"registers.py: {log}: expected a log of nvcc -Xptxas -v, cannot read it: {why}", file=sys.stderr)
            return 2
    usage = parse(text)
    if not usage:
        print("registers.py: expected logs of nvcc -Xptxas -v, got none that names a kernel", file=sys.stderr)
        return 2
    print("\n".join(table(usage)))
    wrong = complaints(usage, set(SERIALIZED.findall(text)))
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
