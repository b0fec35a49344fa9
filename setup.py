"""Compiles echo_rt._C, and echo_rt._ops where torch is there; everything else about the package is in pyproject.toml.

The kernels in echo_rt._ops are compiled by nvcc where torch has CUDA and nvcc is there, and otherwise by the host's
compiler against csrc/emulation. ECHO_RT_BUILD=cuda, emulated or none demands one of the three; ECHO_RT_CUDA_ARCHS="80
90a" demands architectures in place of those of the GPUs seen. ECHO_RT_WHEEL=1 adds to the version what the kernels were
compiled for, as in 0.1.0+cu130.torch2.13, so that wheels of several builds can lie in one folder.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import setuptools
from setuptools import Extension, setup
from setuptools.command.egg_info import egg_info
from setuptools.errors import CompileError

TOOLS = 'pip install "setuptools>=77" "pybind11>=2.13" ninja'
try:
    from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
except ImportError:
    raise SystemExit(f"to build without isolation, first: {TOOLS}") from None
if int(setuptools.__version__.split(".")[0]) < 77:  # which would call the license in pyproject.toml an error
    raise SystemExit(f"expected setuptools 77 or newer, found {setuptools.__version__}: {TOOLS}")

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    torch = None

ROOT = Path(__file__).resolve().parent
SOURCES = "csrc/sources.txt"
ARCHITECTURES = "csrc/architectures.txt"
VERSION = "echo_rt/utils/build_info.py"
WARNINGS = ("-Wall", "-Wextra")


def text_of(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def listed(path: str) -> list[list[str]]:
    """The words of each line of a list that CMakeLists.txt and the Makefile read too, without its comments."""
    return [line.split() for line in text_of(path).splitlines() if line and not line.startswith("#")]


def sources_of(*modules: str) -> list[str]:
    return [source for module, source in listed(SOURCES) if module in modules]


def version() -> str:
    """The version, read and not imported: the package needs what is compiled here."""
    found = re.search(r'^__version__ = "(.+)"', text_of(VERSION), re.MULTILINE)
    if found is None:
        raise SystemExit(f'{VERSION} must have a line __version__ = "..."')
    return found[1]


def local_version() -> str:
    """What ECHO_RT_WHEEL=1 adds to the version: ``+cpu.torch2.13``, ``+cu130.torch2.13``, or ``+nokernels``."""
    if os.environ.get("ECHO_RT_WHEEL") != "1":
        return ""
    if BUILD == "none":
        return "+nokernels"
    device = f"cu{torch.version.cuda}".replace(".", "") if BUILD == "cuda" else "cpu"
    return f"+{device}.torch{'.'.join(torch.__version__.split('.')[:2])}"


def readme() -> str:
    """The README for readers outside the repository: relative links lead to the repository, if it has an address.

    The address is ``Repository`` in ``[project.urls]``. Without one, a link is its text, and a picture is left out.
    """
    found = re.search(r'^Repository = "(.+?)/?"', text_of("pyproject.toml"), re.MULTILINE)

    def absolute(link: re.Match[str]) -> str:
        picture, text, target = link.groups()
        if re.match(r"https?://|#", target):
            return link[0]
        if found is None:
            return "" if picture else text
        return f"{picture}[{text}]({found[1]}/{'raw' if picture else 'blob'}/HEAD/{target})"

    return re.sub(r"(!?)\[([^][]*)\]\(([^)]+)\)", absolute, text_of("README.md"))


def announce(text: str) -> None:
    """Show ``text`` on the terminal, if there is one: pip hides what a build prints, unless it fails."""
    try:
        with open("/dev/tty", "w", encoding="utf-8") as terminal:
            terminal.write(f"\n{text}\n")
    except OSError:
        print(text, file=sys.stderr)


def files_beside() -> list[str]:
    """All that takes part in compiling: a change of any compiles anew, and a source distribution carries it."""
    headers = [path for folder in ("csrc", "bindings") for path in (ROOT / folder).rglob("*.*h")]
    sources = [source for _, source in listed(SOURCES)]
    return sorted([*sources, *(str(path.relative_to(ROOT)) for path in headers), SOURCES, ARCHITECTURES, VERSION])


def chosen_build() -> str:
    """``cuda``, ``emulated`` or ``none``: what becomes of the kernels."""
    demanded = os.environ.get("ECHO_RT_BUILD")
    if demanded not in (None, "cuda", "emulated", "none"):
        raise SystemExit(f"ECHO_RT_BUILD must be cuda, emulated or none; got {demanded!r}")
    if demanded == "none" or (torch is None and demanded is None):
        return "none"
    if torch is None:
        raise SystemExit(f"ECHO_RT_BUILD={demanded} needs torch: install it, then build without isolation")
    nvcc = shutil.which("nvcc") or (cpp_extension.CUDA_HOME and shutil.which(f"{cpp_extension.CUDA_HOME}/bin/nvcc"))
    can_cuda = torch.version.cuda is not None and nvcc is not None
    if demanded == "cuda" and not can_cuda:
        raise SystemExit(f"ECHO_RT_BUILD=cuda needs nvcc (found: {nvcc}) and a CUDA torch (found: {torch.__version__})")
    build = demanded or ("cuda" if can_cuda else "emulated")
    headers = cpp_extension.CUDA_HOME and Path(cpp_extension.CUDA_HOME) / "include"
    if build == "cuda" and headers and not (headers / "cuda_bf16.h").exists():
        raise SystemExit(
            f"nvcc is {nvcc}, but {headers} has none of CUDA's headers: set CUDA_HOME to the toolkit's folder"
        )
    return build


def number(architecture: str) -> int:
    """``"90a"`` -> 90."""
    return int(re.sub(r"\D", "", architecture))


def demanded_architectures() -> list[str]:
    """Those that ECHO_RT_CUDA_ARCHS names, between spaces or commas; none where it is not set."""
    text = os.environ.get("ECHO_RT_CUDA_ARCHS")
    if text is None:
        return []
    names = text.replace(",", " ").split()
    every = [words[0] for words in listed(ARCHITECTURES)]
    if not names or not set(names) <= set(every):
        raise SystemExit(f"ECHO_RT_CUDA_ARCHS must name some of {', '.join(every)} ({ARCHITECTURES}); got {text!r}")
    return sorted(set(names), key=number)


def seen_architectures() -> list[str]:
    """The listed architecture that runs on the GPUs here; all listed ones where there is no GPU."""
    every = [words[0] for words in listed(ARCHITECTURES)]
    chosen = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        # Code of one architecture runs on later ones of the same generation.
        fitting = [a for a in every if number(a) // 10 == major and number(a) % 10 <= minor]
        if not fitting:
            raise SystemExit(f"GPU {index} is sm_{major}{minor}, and {ARCHITECTURES} has only {', '.join(every)}")
        chosen.append(max(fitting, key=number))
    return sorted(set(chosen), key=number) or every


BUILD = chosen_build()
DEMANDED = demanded_architectures()  # checked whatever is built, or a mistake would show on the next machine only
CUDA_ARCHS = (DEMANDED or seen_architectures()) if BUILD == "cuda" else []
NO_KERNELS = (
    "echo-rt is built without its kernels, because this build sees no torch; the torch backend runs. For the kernels,\n"
    f"with the torch of your environment: {TOOLS}; pip install --no-build-isolation ."
)
MACROS = [("ECHO_RT_VERSION", f'"{version()}"'), ("ECHO_RT_CUDA_ARCHS", f'"{" ".join(CUDA_ARCHS)}"')]


def core() -> Extension:
    return Pybind11Extension(
        "echo_rt._C",
        sources_of("_C"),
        include_dirs=[str(ROOT / "csrc")],
        depends=files_beside(),
        cxx_std=17,
        define_macros=MACROS,
        extra_compile_args=[*WARNINGS],
    )


def kernels() -> list[Extension]:
    """echo_rt._ops. torch chooses the C++ standard, as its headers need it."""
    common: dict[str, Any] = {
        "include_dirs": [str(ROOT / "csrc"), str(ROOT / "bindings")],
        "depends": files_beside(),
        "define_macros": [*MACROS, ("ECHO_RT_TORCH", f'"{torch.__version__}"')] if torch else [],
    }
    flags = ["-O2", "-g0", "-fvisibility=hidden", *WARNINGS]
    if BUILD == "cuda":
        gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHS]
        nvcc = ["-O3", "-lineinfo", "-Xcompiler", "-fvisibility=hidden,-Wall", *gencode]
        compile_args = {"cxx": flags, "nvcc": nvcc}
        return [
            cpp_extension.CUDAExtension("echo_rt._ops", sources_of("_ops"), extra_compile_args=compile_args, **common)
        ]
    if BUILD == "emulated":
        common["define_macros"] += [("ECHO_RT_EMULATED", None)]
        flags += ["-Wno-unknown-pragmas"]  # "#pragma unroll" is nvcc's
        sources = sources_of("_ops", "_emulation")
        return [cpp_extension.CppExtension("echo_rt._ops", sources, extra_compile_args=flags, **common)]
    return []


class BuildExtensions(cpp_extension.BuildExtension if BUILD != "none" else build_ext):  # type: ignore[misc]
    """Says what is missing, which the compiler's own message does not."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode:
            # pip's own is a new folder every time, in which everything would be compiled again.
            self.build_temp = str(ROOT / "build" / "editable")

    def build_extensions(self) -> None:
        if BUILD == "none" and not os.environ.get("ECHO_RT_BUILD"):
            announce(NO_KERNELS)
        if BUILD == "emulated":
            for extension in self.extensions:
                extension.sources = [self.host_source(source) for source in extension.sources]
        try:
            super().build_extensions()
        except (CompileError, RuntimeError) as error:  # torch's own build raises the latter
            needed = "a C++17 compiler and Python's headers (on Debian: apt-get install g++ python3-dev)"
            raise CompileError(f"echo-rt needs {needed}; what came: {error}") from error

    def host_source(self, source: str) -> str:
        """A kernel's source under a name that the host's compiler takes for C++."""
        if not source.endswith(".cu"):
            return source
        host = (Path(self.build_temp) / "emulated" / source).with_suffix(".cpp")
        text = f'#include "{ROOT / source}"\n'
        # Written only where it differs, or everything would be compiled each time.
        if not host.is_file() or host.read_text(encoding="utf-8") != text:
            host.parent.mkdir(parents=True, exist_ok=True)
            host.write_text(text, encoding="utf-8")
        return str(host)


class TaggedMetadata(egg_info):  # type: ignore[misc]
    """Adds :func:`local_version`; not an option, because the setup.cfg of a source distribution would replace it."""

    def finalize_options(self) -> None:
        self.tag_build = local_version()
        super().finalize_options()


if BUILD == "none":
    ParallelCompile("MAX_JOBS").install()
else:
    # Where pip puts ninja, which torch looks for on the PATH; without it nothing is compiled side by side.
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
setup(
    ext_modules=[core(), *kernels()],
    cmdclass={"build_ext": BuildExtensions, "egg_info": TaggedMetadata},
    long_description=readme(),
    long_description_content_type="text/markdown",
)
