"""The targets of a whole block on one H200, which ``echo-rt bench`` judges where it runs from a checkout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# The goal, the figure that it looks at, its unit, and the most that meets it.
_TARGETS = (
    ("whole block, at first: at most 400 ms (30 FPS)", "block_ms", "ms", 400),
    ("whole block, then: at most 324 ms (37 FPS)", "block_ms", "ms", 324),
    ("memory against no memory, same run: at most 10.6 % more time a block", "memory_cost", "%", 10.6),
    ("GPU idle inside a block: less than 2 %", "idle", "%", math.nextafter(2, 0)),
    ("block latency p99/p50: at most 1.05 (the goal speaks of an hour, the value is this run's)", "spread", "", 1.05),
    ("device memory in the steady state: constant to the byte", "growth", "bytes", 0),
    ("peak of device memory without the text encoder: at most 12 GB", "peak_gb", "GB", 12),
)
_IN_FLOAT8 = (
    ("whole block in float8: at most 270 ms (44 FPS)", "block_ms", "ms", 270),
    ("memory against no memory, same run, in float8: at most 8 % more time a block", "memory_cost", "%", 8),
)


def judge(achieved: Mapping[str, float | None], *, float8: bool = False) -> list[dict[str, Any]]:
    """Every target with its value and verdict: ``met``, ``unmet``, or ``open`` where it was not measured."""
    rows = []
    for goal, name, unit, most in (*_TARGETS, *_IN_FLOAT8) if float8 else _TARGETS:
        value = achieved[name]
        verdict = "open" if value is None else "met" if value <= most else "unmet"
        rows.append({"goal": goal, "value": value, "unit": unit, "verdict": verdict})
    return rows


def achieved(report: Any) -> dict[str, float | None]:
    """The figures that the goals look at, of a ``Report``: with the memory evolving; None where not measured."""
    run = report.run
    whole, p99 = (report.ms("evolve", report.whole, place) for place in (0, 1))
    without, idle = report.ms("off", report.whole), None
    for entry in run.measured:
        if entry.variant.name == "evolve":
            idle = 100 * entry.samples[report.ahead].idle
    of_evolve = run.entries[0].variant.name == "evolve"
    growth, peak = (run.resources[name] if of_evolve else None for name in ("growth", "peak"))
    return {
        "block_ms": whole,
        "memory_cost": None if whole is None or without is None else 100 * (whole / without - 1),
        "idle": idle,
        "spread": None if whole is None or p99 is None else p99 / whole,
        "growth": growth,
        "peak_gb": None if peak is None else peak / 1e9,
    }
