"""Compiles echo_rt._C; everything else about the package is in pyproject.toml."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup
from setuptools.errors import CompileError

try:
    from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
except ImportError:
    raise SystemExit("to build without isolation, first: pip install setuptools pybind11") from None

ROOT = Path(__file__).parent
SOURCES = "csrc/sources.txt"
ARCHITECTURES = "csrc/architectures.txt"
VERSION = "echo_rt/build_info.py"


def text_of(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def listed(path: str) -> list[str]:
    """The lines of a list that CMakeLists.txt and the Makefile read too, without its comments."""
    return [line for line in text_of(path).splitlines() if line and not line.startswith("#")]


def version() -> str:
    """The version, read and not imported: the package needs what is compiled here."""
    found = re.search(r'^__version__ = "(.+)"', text_of(VERSION), re.MULTILINE)
    if found is None:
        raise SystemExit(f'{VERSION} must have a line __version__ = "..."')
    return found[1]


def headers() -> list[str]:
    paths = [path for folder in ("csrc", "bindings") for path in (ROOT / folder).rglob("*.*h")]
    return sorted(str(path.relative_to(ROOT)) for path in paths)


class BuildExtension(build_ext):
    """Says what is missing, which the compiler's own message does not."""

    def build_extensions(self) -> None:
        try:
            super().build_extensions()
        except CompileError as error:
            needed = "a C++17 compiler and Python's headers (on Debian: apt-get install g++ python3-dev)"
            raise CompileError(f"echo-rt needs {needed}; what came: {error}") from error


ParallelCompile("MAX_JOBS").install()
setup(
    ext_modules=[
        Pybind11Extension(
            "echo_rt._C",
            [source for source in listed(SOURCES) if source.endswith(".cpp")],
            include_dirs=["csrc"],
            # A change of any of these compiles anew, and a source distribution carries them.
            depends=[*headers(), SOURCES, ARCHITECTURES, VERSION],
            cxx_std=17,
            define_macros=[("ECHO_RT_VERSION", f'"{version()}"'), ("ECHO_RT_CUDA_ARCHS", '""')],
            extra_compile_args=["-Wall", "-Wextra"],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
