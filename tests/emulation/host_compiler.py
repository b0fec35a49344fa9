"""The host's compiler, for what the tests of the emulation build: with and without the sanitizers."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
CSRC = ROOT / "csrc"

FLAGS = ("-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-DECHO_RT_EMULATED", f"-I{CSRC}")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1")


def compiler() -> str:
    """The host's C++ compiler; without one the extension itself could not have been built."""
    candidates = [os.environ.get("CXX", ""), "g++", "c++", "clang++"]
    found = next((path for path in map(shutil.which, candidates) if path), None)
    if found is None:
        pytest.skip("no C++ compiler: set CXX or put g++ on the PATH")
    return found


def compile_to(target: Path, *arguments: str | Path) -> None:
    done = subprocess.run([compiler(), *arguments, "-o", target], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def require_sanitizers(factory: pytest.TempPathFactory) -> None:
    """Skips the test where the compiler has none."""
    folder = factory.mktemp("probe")
    (folder / "probe.cpp").write_text("int main() {}\n")
    probe = [compiler(), *SANITIZERS, str(folder / "probe.cpp"), "-o", str(folder / "probe")]
    if subprocess.run(probe, capture_output=True, timeout=60).returncode != 0:
        pytest.skip("the compiler has no sanitizers")


def build(factory: pytest.TempPathFactory, kind: str, sources: Iterable[Path], *flags: str) -> Path:
    """A program of ``sources`` and the emulation, compiled once for all workers of a test run."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "emulation"
    folder.mkdir(exist_ok=True)
    program = folder / kind
    with (folder / f"{kind}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            every = [*sorted((CSRC / "emulation").glob("*.cpp")), *sources]
            objects = [folder / f"{kind}.{source.name}.o" for source in every]
            with ThreadPoolExecutor(2) as pool:
                jobs = [
                    pool.submit(compile_to, target, *FLAGS, *flags, "-x", "c++", "-c", source)
                    for source, target in zip(every, objects, strict=True)
                ]
            for job in jobs:
                job.result()
            compile_to(program, *flags, *objects, "-pthread")
    return program
