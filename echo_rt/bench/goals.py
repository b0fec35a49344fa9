"""The goals of a whole block, for one H200 in bfloat16 or float8, and what a run has to show for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


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
