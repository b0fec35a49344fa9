"""What a run achieves: the targets of a whole block on one H200, and a day at its pace, which is extrapolated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from echo_rt.utils.wording import counted

_DAY = 24 * 3600.0
_JOULES_A_KWH = 3.6e6
SNAPSHOT_SECONDS = 3600.0  # between two snapshots


@dataclass(frozen=True)
class Achieved:
    """What goals look at; None where it was not measured."""

    block_ms: float | None
    memory_cost: float | None
    idle: float | None
    spread: float | None
    growth_bytes: int | None
    peak_bytes: int | None


@dataclass(frozen=True)
class Goal:
    """A goal and its verdict: ``met``, ``unmet``, or ``open`` where what it needs was not measured."""

    goal: str
    value: float | None
    unit: str
    verdict: str


@dataclass(frozen=True)
class _Rule:
    goal: str
    unit: str
    value: Callable[[Achieved], float | None]
    met: Callable[[float], bool]


_FLOAT8_RULE = _Rule(
    "whole block with float8 products: at most 270 ms (44 FPS)", "ms", lambda a: a.block_ms, lambda v: v <= 270
)
_RULES = (
    _Rule("whole block, at first: at most 400 ms (30 FPS)", "ms", lambda a: a.block_ms, lambda v: v <= 400),
    _Rule("whole block, then: at most 324 ms (37 FPS)", "ms", lambda a: a.block_ms, lambda v: v <= 324),
    _Rule(
        "memory against no memory, same run: at most 10.6 % more time a block",
        "%",
        lambda a: None if a.memory_cost is None else 100 * a.memory_cost,
        lambda v: v <= 10.6,
    ),
    _Rule(
        "GPU idle inside a block: less than 2 %",
        "%",
        lambda a: None if a.idle is None else 100 * a.idle,
        lambda v: v < 2,
    ),
    _Rule(
        "block latency p99/p50: at most 1.05 (the goal speaks of an hour, the value is this run's)",
        "",
        lambda a: a.spread,
        lambda v: v <= 1.05,
    ),
    _Rule(
        "device memory in the steady state: constant to the byte", "bytes", lambda a: a.growth_bytes, lambda v: v == 0
    ),
    _Rule(
        "peak of device memory without the text encoder: at most 12 GB",
        "GB",
        lambda a: None if a.peak_bytes is None else a.peak_bytes / 1e9,
        lambda v: v <= 12,
    ),
)


def judge(achieved: Achieved, *, float8: bool = False) -> list[Goal]:
    """Every goal with its value and verdict; ``float8``: that of the float8 linear layers too."""
    goals = []
    for rule in (*_RULES, _FLOAT8_RULE) if float8 else _RULES:
        value = rule.value(achieved)
        verdict = "open" if value is None else "met" if rule.met(value) else "unmet"
        goals.append(Goal(rule.goal, value, rule.unit, verdict))
    return goals


@dataclass(frozen=True)
class Measured:
    """Means and sizes of a run. Bytes are of one block's frames and latents, and of one whole snapshot."""

    blocks: int
    seconds_a_block: float
    frames_a_block: int
    frame_rate: int
    joules_a_block: float | None
    frame_bytes: int
    latent_bytes: int
    snapshot_bytes: int
    host_bytes: int | None
    device_bytes: int | None


@dataclass(frozen=True)
class Figure:
    """One line: ``value`` is None where it was not measured."""

    what: str
    value: float | None
    unit: str
    how: str


def a_day(run: Measured) -> list[Figure]:
    """24 hours at the mean pace of ``run``, each figure with how it comes about."""
    blocks = _DAY / run.seconds_a_block
    frames = blocks * run.frames_a_block
    by = f"extrapolated from {counted(run.blocks, 'measured block')}"
    energy = None if run.joules_a_block is None else blocks * run.joules_a_block / _JOULES_A_KWH
    snapshots = _DAY / SNAPSHOT_SECONDS
    resident = f"measured after {counted(run.blocks, 'block')}, taken to stay"
    return [
        Figure("blocks", blocks, "", by),
        Figure("frames", frames, "", by),
        Figure("video", frames / run.frame_rate / 3600, "h", f"{by}; at {run.frame_rate} frames a second"),
        Figure("energy of the GPU", energy, "kWh", by if energy is not None else "no board told its energy"),
        Figure(
            "frames, as bytes", blocks * run.frame_bytes / 1e9, "GB", f"{by}; raw RGB: of an MP4 the content decides"
        ),
        Figure("latents", blocks * run.latent_bytes / 1e9, "GB", f"{by}; float32, as a file of latents holds them"),
        Figure(
            "snapshots",
            snapshots * run.snapshot_bytes / 1e9,
            "GB",
            f"{snapshots:.0f} of {run.snapshot_bytes / 1e9:.3g} GB, one an hour, all kept; from the size of one",
        ),
        Figure("host memory", None if run.host_bytes is None else run.host_bytes / 1e9, "GB", resident),
        Figure(
            "device memory",
            None if run.device_bytes is None else run.device_bytes / 1e9,
            "GB",
            resident if run.device_bytes is not None else "there is no GPU",
        ),
    ]
