"""What ``echo-rt doctor`` looks at. Every check reports what it found and never raises."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from echo_rt.errors import EchoError
from echo_rt.utils.build_info import __version__, build_info
from echo_rt.utils.wording import first_line

if TYPE_CHECKING:
    import torch

    from echo_rt import attention, convolution

Status = Literal["ok", "absent", "missing"]  # absent: can be done without

_OLDEST_PYTHON = (3, 10)
_LOW_DISK_GIB = 1.0

# Module, distribution, what it is for, whether generate needs it.
_DEPENDENCIES = (
    ("torch", "torch", "tensors, attention, the torch backend", True),
    ("numpy", "numpy", "frames on their way to a file", True),
    ("safetensors", "safetensors", "weights, latents, prompt embeddings", True),
    ("transformers", "transformers", "the umT5 text encoder and its tokenizer", True),
    ("ftfy", "ftfy", "cleaning prompts as in training", True),
    ("av", "av", "PyAV: H.264, MP4 and PNG", True),
    ("rich", "rich", "progress that is drawn", False),
    ("nvtx", "nvtx", "named ranges in Nsight", False),
    ("pynvml", "nvidia-ml-py", "driver and memory of NVIDIA GPUs", False),
    ("matplotlib", "matplotlib", "pictures of soak and bench", False),
    ("prometheus_client", "prometheus-client", "figures of soak --port", False),
)

_BACKENDS = {
    "torch": "plain torch, on any device",
    "emulated": "the kernels executed on the CPU, for tests: slow",
    "cuda": "the kernels on a GPU",
}


@dataclass(frozen=True)
class Fact:
    """One line of the report; ``advice`` says what to do about what is not there."""

    group: str
    name: str
    value: str
    status: Status = "ok"
    advice: str = ""


def gather() -> list[Fact]:
    """All facts, in the order in which to read them."""
    checks = (_system, _echo_rt, _dependencies, _torch, _nvml, _compilers, _attention, _convolution, _encoder)
    return [fact for check in checks for fact in check()]


def _system() -> Iterator[Fact]:
    python_ok = sys.version_info >= _OLDEST_PYTHON
    oldest = ".".join(map(str, _OLDEST_PYTHON))
    yield Fact(
        "system",
        "Python",
        platform.python_version(),
        "ok" if python_ok else "missing",
        "" if python_ok else f"install Python {oldest} or newer",
    )
    yield Fact("system", "platform", f"{platform.platform()}, {os.cpu_count()} CPU cores")
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    enough = free >= _LOW_DISK_GIB
    yield Fact(
        "system",
        "free disk here",
        f"{free:.1f} GiB",
        "ok" if enough else "absent",
        "" if enough else "make room, or write the video elsewhere with --output",
    )


def _echo_rt() -> Iterator[Fact]:
    yield Fact("echo-rt", "version", __version__)
    try:
        built = build_info()
    except EchoError as error:
        advice = "generate needs it: install a C++ compiler, then echo-rt again (pip install .)"
        yield Fact("echo-rt", "compiled part", first_line(error), "missing", advice)
    else:
        cuda = f"CUDA for {', '.join(built.cuda_archs)}" if built.cuda_archs else "no CUDA kernels"
        advice = "" if built.is_current else f"it is of version {built.version}: install again"
        value = f"{built.compiler}, C++{built.cxx_standard}, {cuda}"
        yield Fact("echo-rt", "compiled part", value, "ok" if built.is_current else "absent", advice)
    try:
        from echo_rt.ops.backends import available_backends
    except (ImportError, OSError) as error:
        yield Fact("echo-rt", "backends", first_line(error), "missing", "install what is missing below")
        return
    backends = available_backends()
    for name, state in backends.items():
        if state == "available":
            yield Fact("echo-rt", f"backend {name}", f"available ({_BACKENDS[name]})")
        else:
            yield Fact("echo-rt", f"backend {name}", "no", "missing" if name == "torch" else "absent", state)
    yield from _default_backend()


def _default_backend() -> Iterator[Fact]:
    """Which backend a model is given on the best device where none is named, and why."""
    from echo_rt.ops.backends import BACKEND_VARIABLE, BACKENDS, choose_backend

    named = os.environ.get(BACKEND_VARIABLE)
    try:
        backend = choose_backend(None, _best_device())
    except EchoError as error:  # only the environment's can be refused
        why = first_line(error).removeprefix(f"{BACKEND_VARIABLE}: ")
        advice = f"set it to another of {', '.join(BACKENDS)}, or unset it: {why}"
        yield Fact("echo-rt", BACKEND_VARIABLE, str(named), "missing", advice)
        return
    if named:
        yield Fact("echo-rt", BACKEND_VARIABLE, named)
    why, _, advice = backend.reason.partition("; ")
    yield Fact("echo-rt", "default backend", f"{backend.name}: {why}", "absent" if backend.fallback else "ok", advice)


def _dependencies() -> Iterator[Fact]:
    for module, distribution, purpose, required in _DEPENDENCIES:
        problem = ""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(module)
        except Exception as error:  # a broken installation can raise anything
            problem = "not installed" if isinstance(error, ModuleNotFoundError) else first_line(error)
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            version = "" if problem else "of unknown version"
        if not problem:
            yield Fact("packages", distribution, f"{version} ({purpose})")
            continue
        value = f"{version}: {problem}" if version else f"{problem} ({purpose})"
        install = f"pip install {distribution}"
        if required:
            yield Fact("packages", distribution, value, "missing", install)
        else:
            yield Fact("packages", distribution, value, "absent", f"optional: {install}")


def _torch() -> Iterator[Fact]:
    try:
        import torch
    except (ImportError, OSError):
        return  # said among the packages
    yield Fact("GPU", "torch is built for", f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only")
    if not torch.cuda.is_available():
        advice = (
            "generate runs on the CPU, slowly; for real time, an NVIDIA GPU with a recent driver"
            if torch.version.cuda
            else "generate runs on the CPU, slowly; for a GPU, install a CUDA build of torch"
        )
        yield Fact("GPU", "torch sees", "no GPU", "absent", advice)
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        value = (
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )
        yield Fact("GPU", f"cuda:{index}", value)
    yield from _cudnn()


def _cudnn() -> Iterator[Fact]:
    """The convolution library of torch, which between two releases is wrong in 16 bits."""
    import torch

    from echo_rt.utils.device import warn_of_faulty_convolutions

    number = torch.backends.cudnn.version()
    if number is None:
        yield Fact("GPU", "cuDNN", "not there", "absent", "convolutions will be slow: install a torch that has it")
        return
    version = f"{number // 10_000}.{number // 100 % 100}.{number % 100} ({number})"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        warn_of_faulty_convolutions(torch.device("cuda"), torch.bfloat16)
    if said:
        yield Fact("GPU", "cuDNN", version, "absent", first_line(said[0].message))
    else:
        yield Fact("GPU", "cuDNN", version)


def _nvml() -> Iterator[Fact]:
    """What the driver says, which torch cannot when it is built without CUDA."""
    try:
        import pynvml
    except ImportError:
        return  # said among the packages
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        yield Fact("GPU", "NVIDIA driver", first_line(error), "absent", "needed only for a GPU: install the driver")
        return
    try:
        yield Fact("GPU", "NVIDIA driver", pynvml.nvmlSystemGetDriverVersion())
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            value = f"{pynvml.nvmlDeviceGetName(handle)}, {memory.free / 2**30:.0f} GiB of memory free"
            yield Fact("GPU", f"board {index}", value)
    except pynvml.NVMLError as error:
        yield Fact("GPU", "boards", first_line(error), "absent", "the driver does not answer: see nvidia-smi")
    finally:
        pynvml.nvmlShutdown()


def _compilers() -> Iterator[Fact]:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    for name, program, line, advice in (
        ("nvcc", nvcc, "release", "needed only to build CUDA kernels: install the CUDA toolkit, or set CUDA_HOME"),
        ("C++ compiler", compiler, "", "needed only to build the compiled part: install g++ or clang++"),
    ):
        if program is None:
            yield Fact("build tools", name, "not found", "absent", advice)
            continue
        try:
            output = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=20).stdout
        except (OSError, subprocess.SubprocessError) as error:
            yield Fact("build tools", name, f"{program}: {first_line(error)}", "absent", advice)
            continue
        lines = [text.strip() for text in output.splitlines() if line in text]
        yield Fact("build tools", name, lines[0] if lines else program)


def _attention() -> Iterator[Fact]:
    """Which libraries of attention work on the best device, and which one a model would be given there."""
    try:
        from echo_rt.attention import available_attention, implementations
        from echo_rt.ops.backends import load_ops
    except (ImportError, OSError):
        return
    every = [implementations(load_ops(name)) for name in _gpu_backends()]
    device = yield from _tried("attention", lambda device: available_attention(device, every[-1]))
    if device is not None:
        yield from _chosen_attention(device, every)


def _convolution() -> Iterator[Fact]:
    """Which ways to compute the decoder's convolutions work on the best device, and which ones are chosen there."""
    try:
        from echo_rt.convolution import available_convolutions, implementations
        from echo_rt.ops.backends import load_ops
    except (ImportError, OSError):
        return
    every = [implementations(load_ops(name)) for name in _gpu_backends()]
    device = yield from _tried("convolution", lambda device: available_convolutions(device, every[-1]))
    if device is not None:
        yield from _chosen_convolutions(device, every)


def _gpu_backends() -> list[str]:
    """Those that models on a GPU may have; what is chosen for a model depends on its own."""
    from echo_rt.ops.backends import available_backends

    return [name for name in ("torch", "cuda") if available_backends()[name] == "available"]


def _best_device() -> torch.device:
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _tried(
    subject: str, available: Callable[[torch.device], dict[str, str]]
) -> Generator[Fact, None, torch.device | None]:
    """What works on the best device, which is returned if anything does."""
    device = _best_device()
    try:
        states = available(device)
    except Exception as error:  # of the driver: the GPU may be full, or in an error state
        yield Fact(subject, f"on {device}", first_line(error), "missing", "see nvidia-smi, and free the GPU")
        return None
    for name, state in states.items():
        why, _, advice = state.partition("; ")
        if state == "available":
            yield Fact(subject, name, f"works on {device}")
        else:
            yield Fact(subject, name, why, "absent", advice or "another one is used")
    if "available" not in states.values():
        yield Fact(subject, "any of them", f"none works on {device}", "missing", "install torch again")
        return None
    return device


def _chosen_attention(device: torch.device, every: Sequence[Sequence[attention.AttentionCandidate]]) -> Iterator[Fact]:
    from echo_rt.attention import cache_file, known_selections

    cache = cache_file()
    chosen = dict.fromkeys(known for candidates in every for known in known_selections(device, cache, candidates))
    for name, reason in chosen:
        yield Fact("attention", "chosen", f"{name}: {reason}")
    if not chosen:
        advice = "it is measured when a model is loaded" + ("" if cache else "; to remember it, set ECHO_RT_CACHE_DIR")
        yield Fact("attention", "chosen", "not measured yet", "absent", advice)
    elif cache and device.type == "cuda":
        yield Fact("attention", "remembered in", f"{cache} (without it, measured anew)")


def _chosen_convolutions(
    device: torch.device, every: Sequence[Sequence[convolution.ConvolutionCandidate]]
) -> Iterator[Fact]:
    """The decoder has dozens: how many of them are computed in which way."""
    from echo_rt.convolution import cache_file, known_selections

    cache, name = cache_file(), "convolutions chosen"
    chosen = Counter(name for candidates in every for name, _ in known_selections(device, cache, candidates))
    if device.type != "cuda":
        yield Fact("convolution", name, f"{' and '.join(chosen)}: torch's own on a {device.type.upper()}")
    elif not chosen:
        advice = "it is measured when a model is loaded" + ("" if cache else "; to remember it, set ECHO_RT_CACHE_DIR")
        yield Fact("convolution", name, "not measured yet", "absent", advice)
    else:
        shapes = ", ".join(f"{kind} for {count}" for kind, count in chosen.most_common())
        yield Fact("convolution", name, f"{shapes} of {chosen.total()} shapes, as {cache} remembers")


def _encoder() -> Iterator[Fact]:
    try:
        import av
        import numpy as np
    except ImportError:
        return
    name, advice = "H.264 encoder libx264", "install PyAV from its own wheels: pip install --force-reinstall av"
    try:
        encoder = av.CodecContext.create("libx264", "w")
        encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = 64, 64, "yuv420p", Fraction(1)
        frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24").reformat(format="yuv420p")
        frame.pts = 0
        packets = [*encoder.encode(frame), *encoder.encode(None)]
    except (av.FFmpegError, ValueError) as error:
        yield Fact("video", name, first_line(error), "missing", advice)
        return
    libraries = ", ".join(
        f"{key} {'.'.join(map(str, av.library_versions[key]))}" for key in ("libavcodec", "libavformat")
    )
    if packets:
        yield Fact("video", name, f"works ({libraries})")
    else:
        yield Fact("video", name, "made no packet", "missing", advice)
