"""Faults that tests put into streams from outside; by name and block in :data:`FAULTS`."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from echo_rt.engine.executor import Event, Executor
from echo_rt.engine.rollout import Rollout

LATE = 3600.0  # seconds that a late block takes, by a clock that is put forward: no load makes another one so late
LOST = getattr(torch, "AcceleratorError", RuntimeError)  # what torch raises
ILLEGAL = "CUDA error: an illegal memory access was encountered"


def amid_every_block(patch: pytest.MonkeyPatch, act: Callable[[Rollout, int, int], Any]) -> None:
    """``act(rollout, block, step)`` before every denoising step of every stream; blocks by the state's numbers."""
    denoise = Rollout._denoise

    def watched(rollout: Rollout, step: int, *static_args: Any) -> None:
        act(rollout, rollout.state.block + 1, step)
        denoise(rollout, step, *static_args)

    patch.setattr(Rollout, "_denoise", watched)


def nan_in(patch: pytest.MonkeyPatch, block: int, times: int = 1) -> None:
    """The first ``times`` times that ``block`` is made, one of its values is NaN."""
    left = [times]

    def spoil(rollout: Rollout, at: int, step: int) -> None:
        if at == block and step == 0 and left[0]:
            left[0] -= 1
            rollout.state.x[0, 0, 0, 0] = float("nan")

    amid_every_block(patch, spoil)


def nan_again_and_again(patch: pytest.MonkeyPatch, every: int) -> None:
    """Of every so many blocks that are made, one has a NaN."""
    made = [0]

    def spoil(rollout: Rollout, at: int, step: int) -> None:
        made[0] += step == 0
        if step == 0 and made[0] % every == 0:
            rollout.state.x[0, 0, 0, 0] = float("nan")

    amid_every_block(patch, spoil)


def late_block(patch: pytest.MonkeyPatch, block: int) -> None:
    """``block`` takes :data:`LATE` seconds longer, once."""
    ahead = [0.0]

    def put_forward(rollout: Rollout, at: int, step: int) -> None:
        if at == block:
            ahead[0] = LATE

    def begin(event: Event) -> None:
        event.time = time.perf_counter() + ahead[0]

    amid_every_block(patch, put_forward)
    patch.setattr(Event, "__init__", begin)


def stop_amid(patch: pytest.MonkeyPatch, block: int) -> None:
    """The process is stopped amid ``block``, once, until somebody continues it."""
    left = [True]

    def stop(rollout: Rollout, at: int, step: int) -> None:
        if at == block and left.pop():
            left.append(False)
            os.kill(os.getpid(), signal.SIGSTOP)

    amid_every_block(patch, stop)


class LostDevice:
    """From ``block`` on, whatever is asked of the device raises, as after an illegal access; errors are numbered.

    ``later``: not at once but, as on a GPU, when something that comes after it is waited for.
    """

    def __init__(self, patch: pytest.MonkeyPatch, block: int, later: bool = False) -> None:
        self.errors = 0
        untold: set[float] = set()  # times of events behind the access

        def illegal_access(rollout: Rollout, at: int, step: int) -> None:
            if at < block:
                return
            if not later:
                self._raise()
            untold.add(time.perf_counter())

        def wait(event: Event, seconds: float | None = None) -> bool:
            if untold and event.time > min(untold):
                self._raise()
            return True

        amid_every_block(patch, illegal_access)
        patch.setattr(Event, "wait", wait)
        for name in ("run", "record", "eager", "synchronize", "close"):
            patch.setattr(Executor, name, self._refusing(getattr(Executor, name)))

    def _raise(self) -> None:
        self.errors += 1
        raise LOST(f"{ILLEGAL} (number {self.errors})\nCompile with TORCH_USE_CUDA_DSA to see more.")

    def _refusing(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def asked(executor: Executor, *arguments: Any, **options: Any) -> Any:
            if self.errors:
                self._raise()
            return method(executor, *arguments, **options)

        return asked


@contextmanager
def file_system_of(size: int | str, folder: Path) -> Iterator[Path]:
    """A file system of ``size`` bytes (or ``"2m,nr_inodes=40"``), mounted on the new ``folder``.

    Skips the test where nobody may mount one.
    """
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, leave: int = 0) -> Path:
    """A file that takes all the room there is in the file system of ``folder``, but for ``leave`` bytes."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        for size in (2**16, 2**12):
            try:
                while True:
                    file.write(bytes(size))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
        file.truncate(max(0, file.tell() - leave))
    return path


FAULTS: dict[str, Callable[[pytest.MonkeyPatch, int], Any]] = {
    "late": late_block,
    "lost": LostDevice,
    "lost, told later": partial(LostDevice, later=True),
    "nan": nan_in,
    "nans": nan_again_and_again,
    "stopped": stop_amid,
}
