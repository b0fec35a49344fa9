"""Runtimes and child processes: what works in a fork or a spawned one, and what is refused there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import forking
import pytest
import torch
from streaming import load

import echo_rt
from echo_rt.errors import BackendError
from echo_rt.weights.tiny_model import CHECKPOINT_FILE

LONG = 60.0  # seconds; only a deadlock takes that long


@pytest.fixture(scope="module")
def children(small_model: Path) -> dict[str, str]:
    """What came of each use in a child process; see ``forking.py``."""
    done = subprocess.run(
        [sys.executable, forking.__file__, small_model, small_model / CHECKPOINT_FILE],
        capture_output=True,
        text=True,
        timeout=3 * LONG,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(echo_rt.__file__).parent.parent),
            "OMP_NUM_THREADS": "2",
            "OMP_WAIT_POLICY": "passive",  # or two threads on a busy core would spin at each other
        },
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_a_runtime_can_be_loaded_in_a_child(children: dict[str, str]) -> None:
    here = children["here"]
    assert len(here) == 64
    for where in ("loaded in a fork", "spawned", "here, after all that"):
        assert children[where] == here, where


def test_where_torch_would_hang_in_a_fork_loading_is_refused(children: dict[str, str]) -> None:
    refused = children["loaded in a fork of one that has loaded"]
    assert refused.startswith("BackendError: this process was forked from one that has loaded a runtime")
    assert "'spawn', or call torch.set_num_threads(1)" in refused and "\n" not in refused
    assert len(children["the same with one thread"]) == 64


def test_a_runtime_stays_with_its_process(children: dict[str, str]) -> None:
    for use in ("next", "snapshot", "set_prompt", "encode_prompt", "runtime.stream", "a loop that goes on"):
        assert children[use].startswith("StreamError: the "), (use, children[use])
        assert "a fork of it: load a runtime in the process that uses it" in children[use]
    assert children["close"] == "(None, None)"


@pytest.mark.parametrize("device", [None, "cuda", "cuda:0"])
def test_a_fork_of_a_process_that_uses_cuda_is_told_so(
    small_model: Path, device: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not that there is no GPU; and the CPU is not taken in its place."""
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with pytest.raises(BackendError, match=r"forked from one that uses CUDA, .*'spawn'$") as error:
        load(small_model, device=device)
    assert "\n" not in str(error.value)
