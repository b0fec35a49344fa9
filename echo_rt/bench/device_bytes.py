"""What one thing takes of a GPU's memory, by torch's allocator: what stays, and the most that was held meanwhile."""

from __future__ import annotations

import gc
from typing import Any

import torch


class DeviceBytes:
    """Bytes beyond those that were held when this was made; on a CPU, where nobody counts, None.

    ``cuda`` is ``torch.cuda``, or what a test puts in its place.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device, self._cuda = device, cuda
        gc.collect()
        self._before = self._held()

    def steady(self) -> int | None:
        """Held at this moment. From here on the most is looked for anew."""
        if self._device.type != "cuda":
            return None
        self._cuda.reset_peak_memory_stats(self._device)
        return self._held() - self._before

    def peak(self) -> int | None:
        """The most that was held since :meth:`steady` was asked."""
        if self._device.type != "cuda":
            return None
        self._cuda.synchronize(self._device)
        most: int = self._cuda.max_memory_allocated(self._device) - self._before
        return most

    def _held(self) -> int:
        if self._device.type != "cuda":
            return 0
        self._cuda.synchronize(self._device)
        held: int = self._cuda.memory_allocated(self._device)
        return held
