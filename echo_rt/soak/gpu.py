"""The health of a GPU as its driver tells it, through nvidia-ml-py."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import torch

from echo_rt.errors import BackendError

Figures = dict[str, int | None]

# What the driver puts before the identity of a whole board, and of a part of one.
_BOARD, _PARTITION = "GPU-", "MIG-"


class GpuHealth:
    """Temperature, clocks, power, energy and ECC counters of one GPU; a figure that it does not have is None.

    Raises :class:`BackendError` where the driver does not answer, does not know the device, or cannot be asked.
    """

    def __init__(self, device: torch.device) -> None:
        try:
            import pynvml
        except ImportError:
            raise BackendError(f"{device}: its health needs nvidia-ml-py: pip install nvidia-ml-py") from None
        self._nvml: Any = pynvml
        self._open = False
        try:
            pynvml.nvmlInit()
            self._open = True
            self._handle = self._find(str(torch.cuda.get_device_properties(device).uuid))
        except pynvml.NVMLError as error:
            self.close()
            raise BackendError(f"{device}: expected the driver to tell of its health, came: {error}") from None
        nvml, handle = self._nvml, self._handle
        self._readings: dict[str, Callable[[], int]] = {
            "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            "sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "clock_limits": lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(handle),
            "power_mw": lambda: nvml.nvmlDeviceGetPowerUsage(handle),
            "energy_mj": lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle),
            "ecc_corrected": lambda: self._ecc(nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED),
            "ecc_uncorrected": lambda: self._ecc(nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED),
        }

    def _find(self, identity: str) -> Any:
        """The driver's handle. Not by number: CUDA counts the visible devices, in an order of its own."""
        try:
            return self._nvml.nvmlDeviceGetHandleByUUID(f"{_BOARD}{identity.removeprefix(_BOARD)}")
        except self._nvml.NVMLError:
            return self._nvml.nvmlDeviceGetHandleByUUID(f"{_PARTITION}{identity.removeprefix(_PARTITION)}")

    def _ecc(self, kind: int) -> int:
        """Errors since the driver was loaded."""
        count: int = self._nvml.nvmlDeviceGetTotalEccErrors(self._handle, kind, self._nvml.NVML_VOLATILE_ECC)
        return count

    def read(self) -> Figures:
        """All figures now; ``clock_limits`` is the driver's bit field of what holds the clocks down."""
        figures: Figures = {}
        for name, reading in self._readings.items():
            figures[name] = None
            # Boards differ in what they count, and a partition of a board may not ask for all of it.
            with contextlib.suppress(self._nvml.NVMLError):
                figures[name] = int(reading())
        return figures

    def close(self) -> None:
        """May be called twice."""
        if self._open:
            self._open = False
            self._nvml.nvmlShutdown()


def gpu_health(device: torch.device) -> GpuHealth | None:
    """The health of ``device``; None where it is no GPU, and, with a warning, where the driver does not tell."""
    if device.type != "cuda":
        return None
    try:
        return GpuHealth(device)
    except BackendError as error:
        warnings.warn(f"{error}; its figures are left out", RuntimeWarning, stacklevel=2)
        return None
