"""Compiles echo_rt._C; everything else about the package is in pyproject.toml."""

from __future__ import annotations

import re
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import CompileError

ROOT = Path(__file__).parent


def listed(path: str) -> list[str]:
    """The lines of a list shared with CMakeLists.txt and the Makefile, without its comments."""
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def version() -> str:
    """The version, from the one file that has it; importing the package needs what is compiled here."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "echo_rt/build_info.py").read_text(encoding="utf-8"), re.M)
    if found is None:
        raise SystemExit("echo_rt/build_info.py must have a line __version__ = \"...\"")
    return found[1]


def headers() -> list[str]:
    """Every header: a change of one recompiles what may include it."""
    return sorted(str(p.relative_to(ROOT)) for folder in ("csrc", "bindings") for p in (ROOT / folder).rglob("*.h"))


class BuildExtension(build_ext):
    """Says what is missing where the compiler's own message does not."""

    def build_extensions(self) -> None:
        try:
            super().build_extensions()
        except CompileError as error:
            raise CompileError(
                f"echo-rt needs a C++17 compiler and Python's headers (Debian: apt-get install g++ python3-dev): {error}"
            ) from error


ParallelCompile("MAX_JOBS").install()
setup(
    ext_modules=[
        Pybind11Extension(
            "echo_rt._C",
            [source for source in listed("csrc/sources.txt") if source.endswith(".cpp")],
            include_dirs=["csrc"],
            depends=headers(),
            cxx_std=17,
            define_macros=[("ECHO_RT_VERSION", f'"{version()}"'), ("ECHO_RT_CUDA_ARCHS", '""')],
            extra_compile_args=["-Wall", "-Wextra"],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
