"""``echo-rt doctor``: what is wrong here and how to mend it, then what is installed, built and working."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
import platform
import shlex
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from echo_rt.cli.arguments import Arguments
from echo_rt.cli.stdio import say
from echo_rt.errors import EchoError
from echo_rt.recipes import RECIPES
from echo_rt.utils.build_info import __version__, build_info
from echo_rt.utils.signals import StopRequest
from echo_rt.utils.wording import first_line

if TYPE_CHECKING:
    import torch

DESCRIPTION = """
Show what is wrong on this machine and how to mend it, then what is installed, built and working. What only a GPU can
use is left out where there is none. Exit codes: 0 generate can run; 1 it cannot.
"""
_MARKS = {"ok": "✓", "absent": "-", "missing": "✗"}
_TITLES = {"missing": "what keeps generate from running", "absent": "what could be better"}  # by status
_LOW_DISK_GIB = 1.0
_MOST_REASONS = 4  # of shapes that the autotuner has measured; more are counted
_ATTENTION = ("echo_rt.attention", "chosen")
_LINEAR = ("echo_rt.model.linear_products", "linear layers chosen")
_CONVOLUTION = ("echo_rt.convolution", "convolutions chosen")

# Module, distribution, what it is for, whether generate needs it.
_NEEDED = "needed"
# Module, distribution, what it is for; the extra that has it, or nothing for what every installation has.
_DEPENDENCIES = (
    ("torch", "torch", "tensors, attention, the torch backend", _NEEDED),
    ("numpy", "numpy", "video frames", _NEEDED),
    ("safetensors", "safetensors", "weights, latents, prompt embeddings", _NEEDED),
    ("transformers", "transformers", "the umT5 text encoder and its tokenizer", _NEEDED),
    ("ftfy", "ftfy", "cleaning of prompts", _NEEDED),
    ("av", "av", "PyAV: H.264, MP4 and PNG", _NEEDED),
    ("msgspec", "msgspec", "configs, journals and indices", _NEEDED),
    ("rich", "rich", "progress bars", ""),
    ("pynvml", "nvidia-ml-py", "driver and memory of NVIDIA GPUs", ""),
    ("nvtx", "nvtx", "named ranges in Nsight", "profile"),
    ("matplotlib", "matplotlib", "plots of soak and bench", "soak"),
    ("prometheus_client", "prometheus-client", "soak --port", "soak"),
    ("gguf", "gguf", "weights in GGUF files", "gguf"),
    ("nvmath", "nvmath-python", "cuBLASLt's algorithms for linear layers", "cublaslt"),
    ("fastapi", "fastapi", "serve", "serve"),
    ("uvicorn", "uvicorn", "serve", "serve"),
    ("aiortc", "aiortc", "serve: WebRTC", "serve"),
    ("websockets", "websockets", "serve, echo_rt.client", "serve"),
    ("httpx", "httpx", "echo_rt.client", "client"),
    ("ray", "ray", "serve --ray", "ray"),
    ("PIL", "pillow", "contact sheets", ""),
)


class Fact(NamedTuple):
    """One line of the report: "missing" keeps generate from running, "absent" does not; ``advice`` says what to do."""

    name: str
    value: str
    status: str = "ok"
    advice: str = ""


def _checked(name: str, value: str, ok: bool, advice: str, *, needed: bool = False) -> Fact:
    return Fact(name, value) if ok else Fact(name, value, "missing" if needed else "absent", advice)


def run(arguments: Arguments, report: dict[str, Any], stop: StopRequest) -> int:
    """Gather the facts and print them; 0 if ``generate`` can run."""
    with stop.importing():
        facts = gather()
    missing = [fact.name for _, fact in facts if fact.status == "missing"]
    report["ok"] = not missing
    report["facts"] = [{"group": group, **fact._asdict()} for group, fact in facts]
    if not arguments.json:
        say(*_page(facts), f"generate cannot run: {', '.join(missing)}" if missing else "generate can run")
    return 1 if missing else 0


def gather() -> list[tuple[str, Fact]]:
    """Run all checks and return the facts with their groups."""
    return [(group, fact) for group, check, needs in CHECKS if not any(map(_problem_of, needs)) for fact in check()]


def _problem_of(module: str) -> str:
    """Why ``module`` cannot be imported; empty if it can."""
    disabled = logging.root.manager.disable
    logging.disable()  # what a library has to say about it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except Exception as error:  # a broken installation can raise anything
        return "not installed" if isinstance(error, ModuleNotFoundError) else first_line(error)
    finally:
        logging.disable(disabled)
    return ""


def _page(facts: Sequence[tuple[str, Fact]]) -> Iterator[str]:
    # Plain text: the package that draws tables may be the missing one.
    width = max(len(fact.name) for _, fact in facts)
    grouped: dict[str, list[str]] = {title: [] for title in _TITLES.values()}
    for group, fact in facts:
        lines = grouped.setdefault(_TITLES.get(fact.status, group), [])
        advice = f"    {'':<{width}}  -> {fact.advice}" if fact.advice else ""
        if advice and lines[-1:] == [advice]:  # said once for all
            lines.pop()
        lines.append(f"  {_MARKS[fact.status]} {fact.name:<{width}}  {fact.value}")
        lines += [advice] if advice else []
    for title, lines in grouped.items():
        yield from [title, *lines] if lines else []


# ---- the checks: each yields what it found and what can apply here, and raises nothing


def _system() -> Iterator[Fact]:
    yield Fact("Python", platform.python_version())
    yield Fact("platform", f"{platform.platform()}, {os.cpu_count()} CPU cores")
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    advice = "make room, or write the video elsewhere with --output"
    yield _checked("free disk here", f"{free:.1f} GiB", free >= _LOW_DISK_GIB, advice)


def _compiled_part() -> Iterator[Fact]:
    yield Fact("version", __version__)
    yield Fact("recipes", ", ".join(RECIPES))
    try:
        built = build_info()
    except EchoError as error:
        advice = "generate needs it: install a C++ compiler, then echo-rt again (pip install .)"
        yield Fact("compiled part", first_line(error), "missing", advice)
        return
    cuda = f"CUDA for {', '.join(built.cuda_archs)}" if built.cuda_archs else "no CUDA kernels"
    value = f"{built.compiler}, C++{built.cxx_standard}, {cuda}"
    yield _checked("compiled part", value, built.is_current, f"it is of version {built.version}: install again")


def _compilers() -> Iterator[Fact]:
    """What echo-rt is built with; what is not there is told where it would have to be built again."""
    try:
        built = build_info()
        needed = not built.is_current or (_sees_gpu() and not built.cuda_archs)
    except EchoError:
        needed = True
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    for name, programs, advice in (
        ("nvcc", ("nvcc", f"{home}/bin/nvcc"), "CUDA kernels: install the CUDA toolkit, or set CUDA_HOME"),
        ("C++ compiler", ("c++", "g++", "clang++"), "the compiled part: install g++ or clang++"),
    ):
        found = next(filter(None, map(shutil.which, programs)), None)
        if found or needed:
            yield _checked(name, found or "not found", bool(found), f"needed only to build {advice}")


def _backends() -> Iterator[Fact]:
    """Backends, and the default one on the best device with the reason."""
    from echo_rt.ops.backends import BACKEND_VARIABLE, BACKENDS, available_backends, choose_backend

    missed = {"torch", "cuda"} if _sees_gpu() else {"torch"}  # what is built for tests alone is missed by nobody
    for name, state in available_backends().items():
        there = state == "available"
        if there or name in missed:
            yield _checked(f"backend {name}", state if there else "no", there, state, needed=name == "torch")
    named = os.environ.get(BACKEND_VARIABLE)
    try:
        backend = choose_backend(None, _best_device())
    except EchoError as error:  # only the environment's choice can be refused
        why = first_line(error).removeprefix(f"{BACKEND_VARIABLE}: ")
        advice = f"set it to another of {', '.join(BACKENDS)}, or unset it: {why}"
        yield Fact(BACKEND_VARIABLE, str(named), "missing", advice)
        return
    if named:
        yield Fact(BACKEND_VARIABLE, named)
    why, _, advice = backend.reason.partition("; ")
    yield Fact("default backend", f"{backend.name}: {why}", "absent" if backend.fallback else "ok", advice)


def _packages() -> Iterator[Fact]:
    for module, distribution, purpose, extra in _DEPENDENCIES:
        problem = _problem_of(module)
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            version = "" if problem else "of unknown version"
        value = f"{version}: {problem}" if version and problem else f"{version or problem} ({purpose})"
        needed = extra == _NEEDED
        package = shlex.quote(f"echo-rt[{extra}]") if extra and not needed else distribution
        install = ("" if needed else "optional: ") + f"pip install {package}"
        yield _checked(distribution, value, not problem, install, needed=needed)


def _torch() -> Iterator[Fact]:
    """GPUs as torch sees them, and cuDNN, of which some releases compute wrong 16-bit convolutions."""
    import torch

    from echo_rt.utils.device import warn_of_faulty_convolutions

    yield Fact("torch is built for", f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only")
    if not torch.cuda.is_available():
        remedy = "generate runs on the CPU, slowly; for real time, use an NVIDIA GPU with a recent driver"
        remedy += "" if torch.version.cuda else ", and a CUDA build of torch"
        yield Fact("torch sees", "no GPU", "absent", remedy)
        return
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        capability = f"compute capability {gpu.major}.{gpu.minor}"
        yield Fact(f"cuda:{index}", f"{gpu.name}, {capability}, {gpu.total_memory / 2**30:.0f} GiB")
    number = torch.backends.cudnn.version()
    if number is None:
        yield Fact("cuDNN", "not there", "absent", "convolutions will be slow: install a torch with cuDNN")
        return
    version = f"{number // 10_000}.{number // 100 % 100}.{number % 100} ({number})"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_faulty_convolutions(torch.device("cuda"), torch.bfloat16)
    yield _checked("cuDNN", version, not caught, first_line(caught[0].message) if caught else "")


def _sees_gpu() -> bool:
    """Whether torch sees a GPU, or the driver does, which a torch without CUDA does not ask."""
    seen = not _problem_of("torch") and _best_device().type == "cuda"
    return seen or any(fact.status == "ok" for fact in _driver())


def _driver() -> Iterator[Fact]:
    """NVIDIA driver and boards; nothing where there is no driver."""
    if _problem_of("pynvml"):
        return
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return
    try:
        yield Fact("NVIDIA driver", pynvml.nvmlSystemGetDriverVersion())
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            free = pynvml.nvmlDeviceGetMemoryInfo(handle).free / 2**30
            yield Fact(f"board {index}", f"{pynvml.nvmlDeviceGetName(handle)}, {free:.0f} GiB of memory free")
    except pynvml.NVMLError as error:
        yield Fact("boards", first_line(error), "absent", "the driver does not answer: see nvidia-smi")
    finally:
        pynvml.nvmlShutdown()


def _autotuned(family: str, name: str) -> Iterator[Fact]:
    """Which implementations of a ``family`` work on the best device, and what the autotuner has selected there."""
    from echo_rt.ops.backends import available_backends, load_ops

    module = importlib.import_module(family)
    backends = [backend for backend in ("torch", "cuda") if available_backends()[backend] == "available"]
    device = _best_device()
    every = [module.probes(device, load_ops(backend)) for backend in backends]
    states: dict[str, str] = {}
    try:
        for kind, state in (item for tuner in every[-1] for item in tuner.available().items()):
            # A name of causal and of enlarging convolutions is listed once where its state is the same.
            states[kind if states.get(kind, state) == state else f"{kind} (enlarging)"] = state
    except Exception as error:  # of the driver: the GPU may be full, or in an error state
        yield Fact(f"on {device}", first_line(error), "missing", "see nvidia-smi, and free the GPU")
        return
    for kind, state in states.items():
        there, (why, _, advice) = state == "available", state.partition("; ")
        if there or device.type == "cuda":
            yield _checked(kind, f"works on {device}" if there else why, there, advice or "another one is used")
    if "available" not in states.values():
        yield Fact("any of them", f"none works on {device}", "missing", "install torch again")
        return
    cache = module.cache_folder()
    chosen = list(dict.fromkeys(one for tuners in every for tuner in tuners for one in tuner.known(cache)))
    where = f" (remembered in {cache})" if cache and device.type == "cuda" else ""
    if not chosen:
        advice = "it is measured when a model is loaded" + ("" if cache else "; to remember it, set ECHO_RT_CACHE_DIR")
        yield Fact(name, "not measured yet", "absent", advice)
    elif len(chosen) <= _MOST_REASONS:
        kinds: dict[str, list[str]] = {}
        for kind, reason in chosen:
            kinds.setdefault(reason, []).append(kind)
        yield from (Fact(name, f"{', '.join(named)}: {reason}{where}") for reason, named in kinds.items())
    else:  # a decoder has convolutions of dozens of shapes
        counts = Counter(kind for kind, _ in chosen).most_common()
        shapes = ", ".join(f"{kind} for {count}" for kind, count in counts)
        yield Fact(name, f"{shapes} of {len(chosen)} shapes{where}")


def _best_device() -> torch.device:
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _encoder() -> Iterator[Fact]:
    from echo_rt.output.video import check_encoding

    problem = ""
    try:
        check_encoding()
    except EchoError as error:
        problem = first_line(error)
    advice = "install PyAV from its own wheels: pip install --force-reinstall av"
    yield _checked("H.264 encoder libx264", problem or "works", not problem, advice, needed=True)


# The report's groups in their order, what fills them, and the modules that this needs. A module that cannot be imported
# is reported among the packages.
CHECKS: tuple[tuple[str, Callable[[], Iterator[Fact]], tuple[str, ...]], ...] = (
    ("system", _system, ()),
    ("echo-rt", _compiled_part, ()),
    ("echo-rt", _backends, ("torch", "echo_rt.ops.backends")),
    ("packages", _packages, ()),
    ("GPU", _torch, ("torch",)),
    ("GPU", _driver, ()),
    ("build tools", _compilers, ()),
    ("attention", partial(_autotuned, *_ATTENTION), ("echo_rt.attention",)),
    ("linear layers", partial(_autotuned, *_LINEAR), ("echo_rt.model.linear_products", "nvmath")),
    ("convolution", partial(_autotuned, *_CONVOLUTION), ("echo_rt.convolution",)),
    ("video", _encoder, ("av", "echo_rt.output.video")),
)
