"""What a run achieves: the targets of a whole block on one H200, and a day at its pace, which is extrapolated."""

from __future__ import annotations

import math
from dataclasses import dataclass

from echo_rt.utils.wording import counted

_DAY = 24 * 3600.0
_JOULES_A_KWH = 3.6e6
SNAPSHOT_SECONDS = 3600.0  # between two snapshots


@dataclass(frozen=True)
class Achieved:
    """What targets look at; None where it was not measured."""

    block_ms: float | None
    memory_cost: float | None
    idle: float | None
    spread: float | None
    growth_bytes: int | None
    peak_bytes: int | None


@dataclass(frozen=True)
class Target:
    """A target and its verdict: ``met``, ``unmet``, or ``open`` where what it needs was not measured."""

    goal: str
    value: float | None
    unit: str
    verdict: str


# The target, its unit, what it looks at, and the most that meets it.
_TARGETS = (
    ("whole block, at first: at most 400 ms (30 FPS)", "ms", "block_ms", 400),
    ("whole block, then: at most 324 ms (37 FPS)", "ms", "block_ms", 324),
    ("memory against no memory, same run: at most 10.6 % more time a block", "%", "memory_cost", 10.6),
    ("GPU idle inside a block: less than 2 %", "%", "idle", math.nextafter(2, 0)),
    ("block latency p99/p50: at most 1.05 (the goal speaks of an hour, the value is this run's)", "", "spread", 1.05),
    ("device memory in the steady state: constant to the byte", "bytes", "growth_bytes", 0),
    ("peak of device memory without the text encoder: at most 12 GB", "GB", "peak_bytes", 12),
)
_FLOAT8_TARGET = ("whole block with float8 products: at most 270 ms (44 FPS)", "ms", "block_ms", 270)


def judge(achieved: Achieved, *, float8: bool = False) -> list[Target]:
    """Every target with its value and verdict; ``float8``: that of the float8 linear layers too."""
    found = []
    for goal, unit, name, most in (*_TARGETS, _FLOAT8_TARGET) if float8 else _TARGETS:
        value: float | None = getattr(achieved, name)
        if value is not None:
            value = 100 * value if unit == "%" else value / 1e9 if unit == "GB" else value
        found.append(Target(goal, value, unit, verdict(None if value is None else value <= most)))
    return found


def verdict(met: bool | None) -> str:
    """In one word; None: not measured."""
    return "open" if met is None else "met" if met else "unmet"


@dataclass(frozen=True)
class Figure:
    """One line: ``value`` is None where it was not measured."""

    what: str
    value: float | None
    unit: str
    how: str


def gigabytes(what: str, size: float | None, how: str) -> Figure:
    """A figure of ``size`` bytes."""
    return Figure(what, None if size is None else size / 1e9, "GB", how)


def a_day(
    *,
    blocks: int,
    seconds_a_block: float,
    frames_a_block: int,
    frame_rate: int,
    joules_a_block: float | None,
    frame_bytes: int,
    latent_bytes: int,
    snapshot_bytes: int,
    host_bytes: int | None,
    device_bytes: int | None,
) -> list[Figure]:
    """24 hours at the mean pace of a run of ``blocks`` blocks, each figure with how it comes about.

    Bytes are of one block's frames and latents, of one whole snapshot, and of what is resident.
    """
    count = _DAY / seconds_a_block
    frames = count * frames_a_block
    by = f"extrapolated from {counted(blocks, 'measured block')}"
    energy = None if joules_a_block is None else count * joules_a_block / _JOULES_A_KWH
    snapshots = _DAY / SNAPSHOT_SECONDS
    resident = f"measured after {counted(blocks, 'block')}, taken to stay"
    hourly = f"{snapshots:.0f} of {snapshot_bytes / 1e9:.3g} GB, one an hour, all kept; from the size of one"
    return [
        Figure("blocks", count, "", by),
        Figure("frames", frames, "", by),
        Figure("video", frames / frame_rate / 3600, "h", f"{by}; at {frame_rate} frames a second"),
        Figure("energy of the GPU", energy, "kWh", by if energy is not None else "no board told its energy"),
        gigabytes("frames, as bytes", count * frame_bytes, f"{by}; raw RGB: of an MP4 the content decides"),
        gigabytes("latents", count * latent_bytes, f"{by}; float32, as a file of latents holds them"),
        gigabytes("snapshots", snapshots * snapshot_bytes, hourly),
        gigabytes("host memory", host_bytes, resident),
        gigabytes("device memory", device_bytes, resident if device_bytes is not None else "there is no GPU"),
    ]
