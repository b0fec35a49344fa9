"""Memory of the process, and of the device through torch's allocator. Nothing here waits for the device."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import torch

_STATM = Path("/proc/self/statm")
_KIBIBYTE = 1024  # the unit of ru_maxrss on Linux


def host_memory() -> dict[str, int | None]:
    """Bytes: ``rss`` now (None where there is no /proc), ``peak`` of the process so far."""
    rss = None
    if _STATM.exists():
        rss = int(_STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {"rss": rss, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIBIBYTE}


def device_memory(device: torch.device) -> dict[str, int] | None:
    """What torch's allocator holds on a GPU, and how often it has asked the driver; None for a CPU.

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
