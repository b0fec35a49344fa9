"""What the tests of soaks share: the smallest model, and a soak of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from echo_rt.config import MemoryConfig
from echo_rt.soak import SoakConfig
from echo_rt.soak.journal import Line, read_lines
from echo_rt.weights import tiny_model
from echo_rt.weights.tiny_model import CHECKPOINT_FILE

PROMPTS = ("a red fox in the snow", "the fox dives into a lake")
# For the versions that take minutes.
LONG = pytest.mark.skipif("ECHO_RT_LONG_SOAK" not in os.environ, reason="minutes long: set ECHO_RT_LONG_SOAK=1")
ONE_STEP = {"denoising_steps": [1000]}


def write_smallest(folder: Path) -> Path:
    """One layer, one token a frame: a block takes the time of a few hundred tiny operations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_model, "_TRANSFORMER", replace(tiny_model._TRANSFORMER, ffn_dim=128, num_layers=1))
        patch.setattr(tiny_model, "_MEMORY", MemoryConfig(layers=1))
        tiny_model.write_tiny_model(folder, width=16, height=16)
    return folder


def soak_of(model: Path, out: Path, **changes: Any) -> SoakConfig:
    """A soak on the CPU that reaches its first line at once; ``changes`` replace entries."""
    given: dict[str, Any] = dict(
        model=str(model),
        checkpoint=str(model / CHECKPOINT_FILE),
        out=str(out),
        device="cpu",
        overrides=ONE_STEP,
        interval=0.2,
        hash_every=1,
        plots=False,
    )
    return SoakConfig(**(given | changes))


def arguments(config: SoakConfig, *more: str) -> list[str]:
    """The command and the options of such a soak, without those that it leaves out."""
    command = ["soak", "--quiet", "--no-plots", "--set", "denoising_steps=1000"]
    places = ("model", "checkpoint", "out", "device")
    counts = ("interval", "hash_every", "snapshot_every", "seed", "blocks", "switch_every")
    for name in (*places, *counts, *(["keep"] if config.snapshot_every else [])):
        if getattr(config, name) is not None:
            command += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    return [*command, *(part for prompt in config.prompts for part in ("--prompt", prompt)), *more]


def wait_until(happened: Callable[[], bool], process: Any) -> None:
    """Until it has, which ``process`` (a Popen or a Life) brings about; fails where that ends first."""
    while not happened():
        assert process.poll() is None or happened(), f"ended by itself with {process.poll()}"
        time.sleep(0.01)


def lines_of(journal: Path) -> int:
    """How many lines it has so far."""
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def hashes(folder: Path) -> dict[int, str]:
    """Block -> hash, of blocks that were made twice the later one."""
    return {block: made for line in intervals(folder) for block, made in line["hashes"]}


def line_of(first: int, last: int, run: int = 1, **changes: Any) -> Line:
    """A line of blocks ``first .. last`` that keeps every promise; ``changes`` replace entries."""
    line: Line = {
        "run": run,
        "first_block": first,
        "block": last,
        "blocks": last - first + 1,
        "frame": 12 * (last + 1) - 3,
        "video_seconds": 0.75 * (last + 1),
        "elapsed": 1.0 * (last + 1),
        "fps": 16.5,
        "warm": first > 0,
        "latency": {"p50": 250.0, "p99": 251.0, "max": 300.0, "max_block": first, "bins": {"-1387": last - first + 1}},
        "switch_latency": {"blocks": 0, "max": None},
        "zscore": {"max": 2.0, "block": first, "judged": last - first + 1, "outliers": 0},
        "position": {"shift": first, "least_newest_id": 20, "most_newest_id": 20, "misplaced": []},
        "latents": {"mean": 0.1, "std": 1.0},
        "nonfinite": {"latent": 0, "video": 0, "block": None},
        "rollbacks": 0,
        "hashes": [],
        "compared": 0,
        "mismatches": [],
        "device": None,
        "host": {"rss": 500 * 2**20},
        "gpu": None,
        "snapshots": None,
    }
    return line | changes


def end_of(run: int, block: int, **changes: Any) -> Line:
    """The line of a process that has made the whole soak; ``changes`` replace entries."""
    figures = {"elapsed": 1.0 * block, "failure": None, "problem": None, "nonfinite_failure": False}
    return {"run": run, "block": block, "end": "complete", "compared": 0, "mismatches": []} | figures | changes


def intervals(folder: Path) -> list[Line]:
    return [line for line in read_lines(folder) if "blocks" in line]
