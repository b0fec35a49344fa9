"""What a number was measured on: the header of every table. ``python bench/environment.py`` prints it as JSON.

What cannot be had is None, and ``missing`` says why: a header never guesses.
"""

from __future__ import annotations

import datetime
import importlib
import os
import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from echo_rt.utils.wording import first_line

# Where the package lies: a checkout, or a folder of installed packages.
ROOT = Path(__file__).resolve().parents[2]
# Names the commit where the sources travel without their history: any text, "dirty" in it where that is so.
COMMIT_VARIABLE = "ECHO_RT_COMMIT"


def environment(device: str) -> dict[str, Any]:
    """The header for ``device`` (``cuda``, ``cuda:N`` or ``cpu``): plain JSON types."""
    import torch

    from echo_rt.utils.build_info import __version__

    missing: list[str] = []
    header: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "commit": commit(missing),
        "echo_rt": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "kernels": _kernels(missing),
        "host": {"system": platform.platform(), "processor": _processor(), "cores": os.cpu_count()},
        "gpu": _gpu(device, missing) if device.startswith("cuda") else None,
    }
    return header | {"missing": missing}


def commit(missing: list[str]) -> str | None:
    """The commit, with ``+dirty`` where the tree differs from it."""
    given = os.environ.get(COMMIT_VARIABLE)
    if given:
        return given
    try:
        # An installed package may lie inside the working tree of someone else, whose commit is not ours.
        _git("ls-files", "--error-unmatch", "echo_rt/__init__.py")
        name = _git("rev-parse", "HEAD")
        return name + ("+dirty" if _git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError) as error:
        missing.append(f"commit: no git history here, and {COMMIT_VARIABLE} is not set ({type(error).__name__})")
        return None


def summary_line(header: dict[str, Any]) -> str:
    """The header in one line, for the top of a table."""
    gpu = header["gpu"]
    words = [header["date"], f"commit {(header['commit'] or 'unknown')[:12]}"]
    if header["commit"] and header["commit"].endswith("dirty"):
        words[-1] += "+dirty"
    if gpu is None:
        words.append(f"no GPU: {header['host']['processor']}, {header['host']['cores']} cores")
    else:
        words.append(f"{gpu['name']}, driver {gpu['driver']}")
    words += [f"torch {header['torch']}", f"CUDA {header['cuda']}", f"cuDNN {header['cudnn']}"]
    return " · ".join([*words, f"echo-rt {header['echo_rt']}"])


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def _kernels(missing: list[str]) -> dict[str, str] | None:
    try:
        import echo_rt._ops as library
    except ImportError as error:
        missing.append(f"kernels: {first_line(error)}")
        return None
    return {"backend": library.BACKEND, "architectures": library.CUDA_ARCHS, "version": library.VERSION}


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor()


def _gpu(device: str, missing: list[str]) -> dict[str, Any]:
    import torch

    place = torch.device(device)
    index = torch.cuda.current_device() if place.index is None else place.index
    properties = torch.cuda.get_device_properties(index)
    facts: dict[str, Any] = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "driver": None,
    }
    try:
        pynvml: Any = importlib.import_module("pynvml")
    except ImportError as error:
        missing.append(f"driver, clocks and power: {error}")
        return facts
    try:
        pynvml.nvmlInit()
        facts["driver"] = pynvml.nvmlSystemGetDriverVersion()
        # torch's numbers count what CUDA_VISIBLE_DEVICES leaves; the identity is the same for both.
        board = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
    except pynvml.NVMLError as error:
        missing.append(f"clocks and power: {error}")
        return facts
    readers: dict[str, Callable[[], Any]] = {
        "sm_clock_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(board, pynvml.NVML_CLOCK_SM),
        "memory_clock_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(board, pynvml.NVML_CLOCK_MEM),
        "max_sm_clock_mhz": lambda: pynvml.nvmlDeviceGetMaxClockInfo(board, pynvml.NVML_CLOCK_SM),
        "power_limit_w": lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(board) / 1000,
        "temperature_c": lambda: pynvml.nvmlDeviceGetTemperature(board, pynvml.NVML_TEMPERATURE_GPU),
    }
    for name, read in readers.items():
        try:
            facts[name] = read()
        except pynvml.NVMLError as error:
            facts[name] = None
            missing.append(f"{name}: {error}")
    pynvml.nvmlShutdown()
    return facts
