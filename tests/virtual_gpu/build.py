"""Builds what the virtual GPU is made of, into ``build/virtual_gpu``; what is there and current stays.

It needs a torch with CUDA, and nvcc with its headers: the kernels are compiled for GPUs, as their launches are tested,
and once more for the host, by which they are computed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from virtual_gpu.names import BUILD, EMULATED, ROOT, RUNTIME
from virtual_gpu.run import environment

HERE = Path(__file__).resolve().parent
TORCH = (2, 10)
CUDA = "13"  # whose runtime library this one replaces: the names of its functions change with the major version
CXX = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fPIC", "-fvisibility=hidden", "-pthread"]


def cuda_home() -> Path:
    """Where nvcc is, with CUDA's headers. What is missing is said in one line."""
    needed = f"the virtual GPU needs a torch >= {TORCH[0]}.{TORCH[1]} with CUDA {CUDA}, and nvcc"
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME
    except ImportError:
        sys.exit(f"{needed}; {sys.executable} has no torch")
    version = tuple(int(number) for number in torch.__version__.split(".")[:2])
    if version < TORCH or (torch.version.cuda or "").partition(".")[0] != CUDA:
        sys.exit(f"{needed}; {sys.executable} has torch {torch.__version__}")
    if CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").is_file():
        sys.exit(f"{needed}; set CUDA_HOME or put nvcc on the PATH")
    if not (Path(CUDA_HOME) / "include" / "cuda_runtime_api.h").is_file():
        sys.exit(f"{needed} with CUDA's headers, which {CUDA_HOME} has not; set CUDA_HOME")
    return Path(CUDA_HOME)


def build_library(target: Path, folder: Path, *flags: str) -> None:
    """A shared library of the sources in ``folder``."""
    newest = max(path.stat().st_mtime for path in folder.iterdir())
    if target.is_file() and target.stat().st_mtime > newest:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    sources = sorted(map(str, folder.glob("*.cpp")))
    subprocess.run([CXX, *FLAGS, *flags, "-shared", *sources, "-o", str(target), "-ldl"], check=True)


def build_extension(kind: str, variables: dict[str, str]) -> None:
    """``setup.py``'s own build, in folders of its own: what was built in the checkout stays as it is."""
    folders = ["--build-lib", str(BUILD / kind), "--build-temp", str(BUILD / f"{kind}-objects")]
    command = [sys.executable, "setup.py", "--quiet", "build_ext", *folders]
    subprocess.run(command, cwd=ROOT, env=variables | {"ECHO_RT_BUILD": kind}, check=True)


def main() -> None:
    include = cuda_home() / "include"
    build_library(RUNTIME, HERE / "runtime", f"-I{include}")
    build_library(BUILD / "libcuda.so.1", HERE / "driver")
    defined = f"{os.environ.get('CPPFLAGS', '')} -DECHO_RT_NAMESPACE={EMULATED}"
    build_extension("emulated", os.environ | {"CPPFLAGS": defined})
    # On the virtual GPU itself, for which setup.py then compiles: one architecture, instead of all.
    build_extension("cuda", environment())


if __name__ == "__main__":
    main()
