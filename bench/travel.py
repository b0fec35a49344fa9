"""Gather the wheels that a GPU machine without a network lacks: ``python bench/travel.py`` puts them in build/travel.

Such a machine has torch, numpy, safetensors, transformers and pytest, and takes a limited number of bytes: this
checkout (what git tracks, and what it neither tracks nor ignores) and the wheels. Exit code 0 if all of it is within
the limit, 1 if not, or where a wheel cannot be had; 2 for arguments that cannot be.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

from _checkout import ROOT

# In this order; wcwidth is what ftfy needs, cuda-core and cuda-pathfinder what nvmath-python needs beside what a torch
# with CUDA brings. Versions are those that pyproject.toml asks for, else the newest.
WHEELS = (
    *("nvtx", "ftfy", "wcwidth", "nvidia-ml-py", "nvidia-cudnn-frontend"),
    *("nvmath-python", "cuda-core", "cuda-pathfinder"),
)
IF_IT_FITS = "av"  # writes videos, which no check of a GPU needs
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
MIB = 2**20


def requirement(name: str) -> str:
    """``name`` with the versions that pyproject.toml asks for, if it does."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(rf'"({re.escape(name)}[<>=!~][^"]*)"', text)
    return name if found is None else found[1]


def fetch(requirements: list[str], folder: Path, python: str) -> None:
    """Wheels for a ``python`` on x86_64 Linux, without what they need in turn; raises ``CalledProcessError``."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python, *(f"--platform={platform}" for platform in PLATFORMS)]
    subprocess.run([*command, "--dest", str(folder), *requirements], check=True)


def tree_bytes(root: Path) -> int:
    """Bytes on the disk of all files in ``root`` that git does not ignore; raises ``CalledProcessError``."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=root, check=True, capture_output=True).stdout.split(b"\0")
    files = {root / name.decode() for name in names if name}
    return sum(file.lstat().st_size for file in files if file.is_symlink() or file.exists())


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--python", default="3.12", metavar="VERSION", help="of the machine")
    parser.add_argument("--limit", type=float, default=60.0, metavar="MIB", help="of all together")
    options = parser.parse_args(arguments)
    folder = root / "build" / "travel"  # which git ignores: else its bytes would be counted twice
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    try:
        fetch([requirement(name) for name in (*WHEELS, IF_IT_FITS)], folder, options.python)
        sizes = {"this checkout": tree_bytes(root)}
    except (subprocess.CalledProcessError, OSError) as error:
        print(f"travel.py: error: {error}", file=sys.stderr)
        return 1
    sizes |= {wheel.name: wheel.stat().st_size for wheel in sorted(folder.glob("*.whl"))}
    for name in [name for name in sizes if name.startswith(f"{IF_IT_FITS}-")]:
        if sum(sizes.values()) > options.limit * MIB:
            (folder / name).unlink()
            print(f"left out, as it does not fit: {name}, {sizes.pop(name) / MIB:.2f} MiB")
    total = sum(sizes.values())
    for name, size in [*sizes.items(), (f"all, of {options.limit:g} MiB", total)]:
        print(f"{size / MIB:8.2f} MiB  {name}")
    if total > options.limit * MIB:
        print(f"travel.py: error: {total / MIB:.2f} MiB pass the limit of {options.limit:g} MiB", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
