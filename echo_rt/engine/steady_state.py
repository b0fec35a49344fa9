"""Asserts the promises of the steady state on every block, for debugging.

A block whose stages are all replayed allocates nothing, never waits for the device, and moves no buffer. The first two
are checked on a GPU, the third anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from echo_rt.engine.executor import Executor
from echo_rt.errors import SteadyStateError

_TORCHS_WORD = "synchronizing"  # in torch's message about a forbidden wait, in every release


class SteadyCheck:
    """Watches blocks as they begin; ``buffers`` returns the tensors whose addresses must never change."""

    def __init__(self, executor: Executor, device: torch.device, buffers: Callable[[], Mapping[str, Tensor]]) -> None:
        self._executor, self._device, self._buffers = executor, device, buffers
        self._addresses = self._now()
        self._steady = False  # whether all stages of the block before were replayed

    @contextmanager
    def block(self, index: int) -> Iterator[None]:
        """Check the work inside, which begins block ``index``; raises :class:`SteadyStateError` after it."""
        runs, replays = self._executor.runs, self._executor.replays
        allocations = self._allocations()
        with self._no_waiting(index):
            yield
        replayed = self._executor.runs - runs == self._executor.replays - replays
        made = self._allocations() - allocations
        if replayed and made:
            raise SteadyStateError(f"block {index}: expected no allocation on {self._device}, got {made}")
        now = self._now()
        moved = sorted(name for name in {*now, *self._addresses} if now.get(name) != self._addresses.get(name))
        if moved:
            raise SteadyStateError(f"block {index}: buffers have moved: {', '.join(moved)}")
        self._steady = replayed

    @contextmanager
    def _no_waiting(self, index: int) -> Iterator[None]:
        """Have torch raise where the host waits for the device, in a block that should be all replays."""
        if self._device.type != "cuda" or not self._steady:
            yield
            return
        found = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        except RuntimeError as error:
            if _TORCHS_WORD not in str(error):
                raise
            raise SteadyStateError(f"block {index}: expected no wait for {self._device}, got: {error}") from error
        finally:
            torch.cuda.set_sync_debug_mode(found)

    def disturbed(self) -> None:
        """Expect no steady state of the next block."""
        self._steady = False

    def _allocations(self) -> int:
        if self._device.type != "cuda":
            return 0
        return int(torch.cuda.memory_stats(self._device).get("allocation.all.allocated", 0))

    def _now(self) -> dict[str, int]:
        return {name: tensor.data_ptr() for name, tensor in self._buffers().items()}
