"""Memory of the process and of the device, and the health of the GPU. Nothing here waits for the device."""

from __future__ import annotations

import contextlib
import os
import resource
import warnings
from pathlib import Path
from typing import Any

import torch

from echo_rt.utils.atomic_file import reason

_STATM = Path("/proc/self/statm")
_KIBIBYTE = 1024  # the unit of ru_maxrss on Linux

# The driver's prefixes for the identity of a whole GPU, and of a partition of one.
_PREFIXES = ("GPU-", "MIG-")
# Figures of a GPU: the driver's function and the names of its arguments, without their beginnings (nvmlDevice, NVML_).
# ECC errors are counted since the driver was loaded.
_READINGS = {
    "temperature_c": ("GetTemperature", "TEMPERATURE_GPU"),
    "sm_clock_mhz": ("GetClockInfo", "CLOCK_SM"),
    "memory_clock_mhz": ("GetClockInfo", "CLOCK_MEM"),
    "clock_limits": ("GetCurrentClocksEventReasons",),
    "power_mw": ("GetPowerUsage",),
    "energy_mj": ("GetTotalEnergyConsumption",),
    "ecc_corrected": ("GetTotalEccErrors", "MEMORY_ERROR_TYPE_CORRECTED", "VOLATILE_ECC"),
    "ecc_uncorrected": ("GetTotalEccErrors", "MEMORY_ERROR_TYPE_UNCORRECTED", "VOLATILE_ECC"),
}


def host_memory() -> dict[str, Any]:
    """Bytes: ``rss`` now, ``peak`` so far. ``rss`` is None without /proc, or one more file; ``unread`` says why."""
    figures: dict[str, Any] = {"rss": None, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIBIBYTE}
    try:
        figures["rss"] = int(_STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError as error:
        figures["unread"] = reason(error)
    return figures


def device_memory(device: torch.device) -> dict[str, int] | None:
    """Figures of torch's allocator on a GPU; None for a CPU.

    Bytes: ``allocated`` by tensors, ``reserved`` from the driver, ``peak`` of allocated since the last call. Counts
    since the start: ``allocations`` of tensors, ``driver_allocations``, ``retries`` after a full device, ``ooms``.
    """
    if device.type != "cuda":
        return None
    stats = torch.cuda.memory_stats(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {
        "allocated": stats["allocated_bytes.all.current"],
        "reserved": stats["reserved_bytes.all.current"],
        "peak": stats["allocated_bytes.all.peak"],
        "allocations": stats["allocation.all.allocated"],
        "driver_allocations": stats.get("num_device_alloc", stats["segment.all.allocated"]),
        "retries": stats["num_alloc_retries"],
        "ooms": stats["num_ooms"],
    }


class GpuHealth:
    """What the driver of one GPU reports; ``nvml.NVMLError`` where it does not answer or does not know the device."""

    def __init__(self, nvml: Any, device: torch.device) -> None:
        self._nvml = nvml
        nvml.nvmlInit()
        # By identity: CUDA numbers only the visible devices, in another order.
        identity = str(torch.cuda.get_device_properties(device).uuid)
        for prefix in _PREFIXES:
            try:
                self._handle = nvml.nvmlDeviceGetHandleByUUID(prefix + identity.removeprefix(prefix))
                return
            except nvml.NVMLError as error:
                problem = error
        nvml.nvmlShutdown()
        raise problem

    def read(self) -> dict[str, int | None]:
        """Return all figures, None for those that this GPU lacks; ``clock_limits`` is the driver's bit field."""
        figures = dict.fromkeys(_READINGS)
        for name, (function, *constants) in _READINGS.items():
            arguments = [getattr(self._nvml, f"NVML_{constant}") for constant in constants]
            # GPUs differ in what they count, and a partition may not ask for all of it.
            with contextlib.suppress(self._nvml.NVMLError):
                figures[name] = int(getattr(self._nvml, f"nvmlDevice{function}")(self._handle, *arguments))
        return figures

    def close(self) -> None:
        """Release the driver."""
        self._nvml.nvmlShutdown()


def gpu_health(device: torch.device) -> GpuHealth | None:
    """Return the health of ``device``; None for a CPU and, with a warning, where the driver does not answer."""
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        problem = "needs nvidia-ml-py: pip install nvidia-ml-py"
    else:
        try:
            return GpuHealth(pynvml, device)
        except pynvml.NVMLError as error:
            problem = f"the driver does not report it: {error}"
    warnings.warn(f"{device}: GPU health {problem}; its figures are left out", RuntimeWarning, stacklevel=2)
    return None
