"""Names that the parts of the virtual GPU know each other by. Nothing here needs torch."""

from __future__ import annotations

import os
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD = ROOT / "build" / "virtual_gpu"
RUNTIME = BUILD / "libvirtual_gpu.so"

# Environment: when work runs, and the seed of a random order.
POLICY = "ECHO_RT_VIRTUAL_GPU_POLICY"
SEED = "ECHO_RT_VIRTUAL_GPU_SEED"
POLICIES = ("random", "lazy", "eager")

# What the emulated kernels register their operators as, beside those for CUDA.
EMULATED = "echo_rt_emulated"


def active() -> bool:
    """Whether this process has the virtual GPU."""
    return str(RUNTIME) in os.environ.get("LD_PRELOAD", "").split()


def extension(build: str, module: str) -> Path:
    """Where the compiled module of ``echo_rt`` is, of the build ``cuda`` or ``emulated``."""
    return BUILD / build / "echo_rt" / f"{module}{EXTENSION_SUFFIXES[0]}"
