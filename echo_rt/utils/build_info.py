"""The version of echo-rt, and how its compiled part was built."""

from __future__ import annotations

from dataclasses import dataclass

from echo_rt.errors import BackendError

__version__ = "0.1.0"  # the only place: pyproject.toml, setup.py and CMakeLists.txt read it from here


@dataclass(frozen=True)
class BuildInfo:
    """How ``echo_rt._C`` was compiled; ``cuda_archs`` is empty for a build without CUDA kernels."""

    version: str
    compiler: str
    cxx_standard: int
    cuda_archs: tuple[str, ...]

    @property
    def is_current(self) -> bool:
        """Whether the extension was compiled from this version of echo-rt."""
        return self.version == __version__


def build_info() -> BuildInfo:
    """Return how the compiled part was built; ``BackendError`` without one."""
    try:
        from echo_rt import _C
    except ImportError as error:
        raise BackendError(f"echo_rt._C must be compiled (make install, or pip install .), but: {error}") from None
    return BuildInfo(**_C.build_info())
