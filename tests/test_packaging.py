"""What is shipped, what is compiled, and what an import costs."""

from __future__ import annotations

import ast
import importlib
import os
import re
import runpy
import shutil
import subprocess
import sys
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
import torch

import echo_rt
from echo_rt.ops.backends import available_backends
from echo_rt.utils.build_info import BuildInfo, __version__, build_info

ROOT = Path(__file__).parent.parent


def execute(*command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    words = [str(c) for c in command]
    # In a session of its own: what setup.py shows on a terminal goes to standard error without one.
    return subprocess.run(
        words,
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=300,
        start_new_session=True,
    )


def run(*command: str | Path, **variables: str) -> str:
    """What the command printed; where it failed, the test fails with all of it."""
    done = execute(*command, **variables)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


def listed(path: str) -> list[str]:
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the metadata of the package, and in ``lib`` the Python files that a wheel carries."""
    folder = tmp_path_factory.mktemp("packed")
    run(
        sys.executable,
        "setup.py",
        "--quiet",
        "egg_info",
        "--egg-base",
        folder,
        "build_py",
        "--build-lib",
        folder / "lib",
    )
    return folder


@pytest.fixture(scope="module")
def metadata(packed: Path) -> Message:
    return Parser().parsestr((packed / "echo_rt.egg-info" / "PKG-INFO").read_text(encoding="utf-8"))


def test_the_version_has_one_place(metadata: Message) -> None:
    assert metadata["Version"] == __version__ == build_info().version
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "echo_rt/__init__.py"):
        assert f'"{__version__}"' not in (ROOT / name).read_text(encoding="utf-8"), name


def test_a_stale_extension_is_noticed() -> None:
    assert build_info().is_current
    assert not BuildInfo(version=__version__ + ".old", compiler="gcc", cxx_standard=17, cuda_archs=()).is_current


def test_the_extension_says_how_it_was_built() -> None:
    info = build_info()
    assert info.cxx_standard >= 17
    assert re.search(r"\d+\.\d+", info.compiler)
    assert set(info.cuda_archs) <= set(listed("csrc/architectures.txt"))


def test_the_wheel_carries_every_file_of_the_package_and_the_type_hints(packed: Path) -> None:
    package = ROOT / "echo_rt"
    made = ("*.so", "*.pyc", "__pycache__")
    wanted = {p.relative_to(package) for p in package.rglob("*") if p.is_file() and not any(map(p.match, made))}
    carried = packed / "lib" / "echo_rt"
    assert {Path("py.typed"), Path("_C.pyi")} < wanted
    assert wanted == {p.relative_to(carried) for p in carried.rglob("*") if p.is_file()}
    # No competitor is installed: others' code is driven by bench/ of a checkout.
    assert not {"baselines.py", "library_calls.py"} & {p.name for p in packed.rglob("*.py")}
    sources = "".join(p.read_text(encoding="utf-8") for p in carried.rglob("*.py"))
    for theirs in ("AutoencoderKLWan(", "WanTransformer3DModel(", "flashdreams", "feat_cache"):
        assert theirs not in sources, theirs


def test_the_source_distribution_carries_what_is_compiled(packed: Path) -> None:
    carried = set((packed / "echo_rt.egg-info" / "SOURCES.txt").read_text(encoding="utf-8").splitlines())
    suffixes = (".cpp", ".cu", ".cuh", ".h")
    compiled = [p for folder in ("csrc", "bindings") for p in (ROOT / folder).rglob("*") if p.suffix in suffixes]
    wanted = {str(p.relative_to(ROOT)) for p in compiled} | {"csrc/sources.txt", "csrc/architectures.txt", "LICENSE"}
    assert wanted <= carried, wanted - carried


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no checkout")
def test_the_source_distribution_carries_the_whole_checkout(packed: Path) -> None:
    carried = set((packed / "echo_rt.egg-info" / "SOURCES.txt").read_text(encoding="utf-8").splitlines())
    tracked = {line for line in run("git", "ls-files").splitlines() if (ROOT / line).is_file()}
    assert {"docs/index.md", "docs/examples/window.py", "tests/test_packaging.py", "Makefile"} <= tracked
    assert tracked - carried == {".ci/run", ".gitignore"}


# Import name -> distribution, where they differ.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "cudnn": "nvidia-cudnn-frontend",
    "nvmath": "nvmath-python",
    "pynvml": "nvidia-ml-py",
    "prometheus_client": "prometheus-client",
    "markdown_it": "markdown-it-py",
    "starlette": "fastapi",  # is a part of it, as pydantic
    "pydantic": "fastapi",
    "typing_extensions": "torch",
}
# What a plain installation has, and what its largest packages are for.
BASE = {
    "torch",
    "numpy",
    "safetensors",
    "msgspec",
    "click",
    "transformers",  # umT5 and its tokenizer: every prompt
    "ftfy",  # every prompt
    "av",  # every MP4
    "pillow",  # contact sheets, pictures of chunks
    "markdown-it-py",  # the page of a soak; rich brings it anyway
    "rich",  # progress of generate; transformers brings it too
    "nvidia-ml-py",  # the driver's version in the autotuner's cache, of every command on a GPU
}


def requirements(metadata: Message) -> dict[str, str]:
    """Distribution -> the extra that has it, empty for a plain installation's."""
    found: dict[str, str] = {}
    for text in metadata.get_all("Requires-Dist", []):
        name, extra = re.match(r"[\w.-]+", text), re.search(r'extra == "(\w+)"', text)
        assert name is not None
        found.setdefault(name[0], "" if extra is None else extra[1])
    return found


def test_a_plain_installation_has_what_generate_needs_and_extras_the_rest(metadata: Message) -> None:
    required = requirements(metadata)
    assert {name for name, extra in required.items() if not extra} == BASE
    imported = set()
    for path in (ROOT / "echo_rt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(str(node.module).partition(".")[0])
    imported -= {"echo_rt", *sys.stdlib_module_names}
    # transformers brings the libraries of Hugging Face.
    known = {*required, "huggingface_hub"}
    assert {"torch", "nvtx", "gguf"} <= imported
    assert {name for name in imported if DISTRIBUTIONS.get(name, name) not in known} == set()


SETUP = """
import pathlib, runpy, setuptools, sys
read, address = pathlib.Path.read_text, {address!r}
def with_address(path, *given, **options):
    return read(path, *given, **options) + (address if path.name == "pyproject.toml" else "")
pathlib.Path.read_text = with_address
setuptools.setup = lambda **options: print(options["long_description"])
runpy.run_path("setup.py")
"""


@pytest.mark.parametrize("address", ["", '\nRepository = "https://forge.invalid/echo-rt/"\n'])
def test_links_of_the_readme_work_outside_the_repository(address: str) -> None:
    text = run(sys.executable, "-c", SETUP.format(address=address), ECHO_RT_BUILD="none")
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    links = dict(re.findall(r"\[([^][]*)\]\(([^)]+)\)", text))
    assert all(target.startswith("https://") for target in links.values()), links
    assert links["Echo-Infinity"] == "https://arxiv.org/abs/2606.04527"
    assert "In your own program" in text
    of_the_page = "https://forge.invalid/echo-rt/blob/HEAD/docs/embedding.md" if address else None
    assert links.get("In your own program") == of_the_page


def test_the_version_of_a_wheel_says_what_its_kernels_were_compiled_with(tmp_path: Path) -> None:
    variables = {"ECHO_RT_WHEEL": "1", "ECHO_RT_BUILD": "emulated"}
    run(sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", tmp_path, **variables)
    text = (tmp_path / "echo_rt.egg-info" / "PKG-INFO").read_text(encoding="utf-8")
    minor = ".".join(torch.__version__.split(".")[:2])
    assert Parser().parsestr(text)["Version"] == f"{__version__}+cpu.torch{minor}"


@pytest.mark.parametrize(
    ("old", "words"),
    [("setuptools.__version__ = '65.5.0'", "found 65.5.0"), ("sys.modules['pybind11.setup_helpers'] = None", "first")],
)
def test_old_or_missing_build_tools_are_told_in_a_line(old: str, words: str) -> None:
    program = f"import runpy, setuptools, sys; {old}; sys.argv[1:] = ['--version']; runpy.run_path('setup.py')"
    done = execute(sys.executable, "-c", program, ECHO_RT_BUILD="none")
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert words in done.stderr and 'pip install "setuptools>=77" "pybind11>=2.13" ninja' in done.stderr


WITHOUT_TORCH = """
import runpy, sys
from setuptools.command import build_ext
sys.modules["torch"] = None
build_ext.build_ext.build_extensions = lambda self: None
sys.argv[1:] = ["--quiet", "build_ext", "--build-temp", {folder!r}, "--build-lib", {folder!r}]
runpy.run_path("setup.py")
"""


@pytest.mark.parametrize("demanded", [False, True])
def test_a_build_that_sees_no_torch_says_how_to_get_the_kernels(
    demanded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ECHO_RT_BUILD", raising=False)
    variables = {"ECHO_RT_BUILD": "none"} if demanded else {}
    done = execute(sys.executable, "-c", WITHOUT_TORCH.format(folder=str(tmp_path)), **variables)
    assert done.returncode == 0, done.stderr
    assert ("pip install --no-build-isolation ." in done.stderr) != demanded


def test_the_environment_that_a_wheel_is_tried_in_has_torch_and_what_it_requires_alone() -> None:
    closure = runpy.run_path(str(ROOT / "tests" / "build_wheel.py"))["closure"]("torch")
    assert {"torch", "sympy"} <= closure
    assert not closure & {"numpy", "transformers", "av", "echo-rt"}


def test_building_needs_no_torch() -> None:
    requires = re.search(r"^requires = \[(.*)\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert requires is not None
    assert re.findall(r'"([a-z0-9]+)', requires[1]) == ["setuptools", "pybind11"]


def test_the_console_script_names_a_function(packed: Path) -> None:
    entries = (packed / "echo_rt.egg-info" / "entry_points.txt").read_text(encoding="utf-8")
    found = re.search(r"^echo-rt = ([\w.]+):(\w+)$", entries, re.MULTILINE)
    assert found is not None, entries
    assert callable(getattr(importlib.import_module(found[1]), found[2]))


def test_every_source_is_in_the_list_and_every_listed_one_is_there() -> None:
    there = {
        str(path.relative_to(ROOT))
        for folder in ("csrc", "bindings")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".cpp", ".cu")
    }
    lines = listed("csrc/sources.txt")
    assert {line.split()[1] for line in lines} == there
    assert {line.split()[0] for line in lines} == {"_C", "_emulation", "_ops"}
    assert lines == sorted(set(lines))


def test_the_kernels_say_what_they_were_built_for() -> None:
    backends = {name for name, status in available_backends().items() if status == "available"}
    if backends == {"torch"}:
        pytest.skip("this build has no kernels")
    from echo_rt import _ops

    assert backends == {"torch", _ops.BACKEND}
    assert tuple(_ops.CUDA_ARCHS.split()) == build_info().cuda_archs
    assert bool(_ops.CUDA_ARCHS) == (_ops.BACKEND == "cuda")


@pytest.mark.parametrize(
    ("build", "words"),
    [("opencl", "ECHO_RT_BUILD must be cuda, emulated or none; got 'opencl'"), ("cuda", "needs nvcc")],
)
def test_a_build_that_cannot_be_is_refused(build: str, words: str) -> None:
    if build == "cuda" and torch.version.cuda is not None:
        pytest.skip("it can be here")
    done = execute(sys.executable, "setup.py", "--version", ECHO_RT_BUILD=build)
    assert done.returncode != 0
    assert words in done.stderr


CHOOSE = """
import runpy, sys
import torch
from setuptools import Extension
from torch.utils import cpp_extension
torch.version.cuda, gpus = "13.0", {gpus}
torch.cuda.device_count, torch.cuda.get_device_capability = lambda: len(gpus), lambda index: gpus[index]
cpp_extension.CUDAExtension = lambda name, sources, **options: print(options["extra_compile_args"]["nvcc"])
sys.argv[1:] = ["--version"]
print(*runpy.run_path("setup.py")["CUDA_ARCHS"])
"""


@pytest.mark.parametrize(
    ("demanded", "gpus", "chosen"),
    [
        (None, [], "80 86 89 90a 100 120"),
        (None, [(9, 0), (8, 7), (9, 0)], "86 90a"),
        ("90a", [(8, 0)], "90a"),
        ("90a, 80 90a", [], "80 90a"),
    ],
)
def test_the_architectures_that_are_compiled_for(
    demanded: str | None,
    gpus: list[tuple[int, int]],
    chosen: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("ECHO_RT_CUDA_ARCHS", raising=False)
    (tmp_path / "nvcc").touch(mode=0o755)
    variables = {} if demanded is None else {"ECHO_RT_CUDA_ARCHS": demanded}
    path = os.pathsep.join((str(tmp_path), os.environ["PATH"]))
    done = execute(sys.executable, "-c", CHOOSE.format(gpus=gpus), ECHO_RT_BUILD="cuda", PATH=path, **variables)
    assert done.returncode == 0, done.stderr
    *_, flags, _, found = done.stdout.splitlines()
    assert found == chosen
    assert re.findall(r"arch=compute_(\w+),code=sm_\1'", flags) == chosen.split()


@pytest.mark.parametrize("demanded", ["90a 90", ""])
def test_architectures_that_cannot_be_are_refused(demanded: str) -> None:
    done = execute(sys.executable, "setup.py", "--version", ECHO_RT_BUILD="none", ECHO_RT_CUDA_ARCHS=demanded)
    words = (
        f"must name some of {', '.join(listed('csrc/architectures.txt'))} (csrc/architectures.txt); got {demanded!r}"
    )
    assert done.returncode != 0 and done.stderr == f"ECHO_RT_CUDA_ARCHS {words}\n"


def test_a_kernel_that_spills_fails_the_check(tmp_path: Path) -> None:
    log = tmp_path / "log"
    text = """ptxas info    : Compiling entry function '_Z4scanILi8EEvPf' for 'sm_90a'
ptxas info    : Function properties for _Z4scanILi8EEvPf
    0 bytes stack frame, SPILLS bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 4096 bytes smem
"""
    for spills, code, cell in (("0", 0, r"\b168 +4096$"), ("12", 1, r"\b168!12 +4096$")):
        log.write_text(text.replace("SPILLS", spills), encoding="utf-8")
        done = execute(sys.executable, "bench/registers.py", log)
        assert done.returncode == code, done.stderr
        assert re.search(cell, done.stdout, re.MULTILINE), done.stdout
    log.write_text("nothing", encoding="utf-8")
    assert execute(sys.executable, "bench/registers.py", log).returncode == 2
    done = execute(sys.executable, "bench/registers.py", tmp_path / "none")
    assert done.returncode == 2 and "none: expected a log of nvcc" in done.stderr and "Traceback" not in done.stderr
    done = execute(sys.executable, "bench/registers.py", "--help")
    assert done.returncode == 0 and "LOG" in done.stdout


def test_kernels_know_neither_torch_nor_python() -> None:
    files = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert files
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            found = re.search(r"torch|ATen|\bc10\b|pybind|Python\.h", line)
            assert found is None, f"{path.relative_to(ROOT)}:{number}: {line}"


IMPORT = """
import sys
import echo_rt
import torch
heavy = {"transformers", "diffusers", "av", "accelerate", "flash_attn", "rich", "nvtx", "ftfy"} & set(sys.modules)
print(sorted(heavy), torch.cuda.is_initialized())
"""


def test_an_import_makes_no_cuda_context_and_loads_nothing_heavy() -> None:
    assert run(sys.executable, "-c", IMPORT).split() == ["[]", "False"]
    assert Path(echo_rt.__file__).parent == ROOT / "echo_rt", "the tests must run against this checkout"


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
def test_cmake_configures_and_its_tests_pass(tmp_path: Path) -> None:
    # Without CUDA, which `make kernels` compiles; the module is what setup.py builds, from the same list.
    run("cmake", "-S", ROOT, "-B", tmp_path, f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_CUDA_COMPILER=NOTFOUND")
    run("cmake", "--build", tmp_path, "--target", "ring_layout_test")
    assert "100% tests passed" in run("ctest", "--test-dir", tmp_path)


def test_an_editable_install_is_a_path_that_type_checkers_follow() -> None:
    """The default is an import hook, in which mypy and pyright find no module, whatever ``py.typed`` says."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^\[tool\.distutils\.editable_wheel\]\nmode = "compat"', project, re.M)
    assert (Path(echo_rt.__file__).parent / "py.typed").exists()
