"""What is measured of a GPU, and the goals of it: those of the performance page of the specification.

They are for one H200 at 832x480; predictions are those of docs/speed.md. ``gpu_table.py`` prints all of them, and
``echo-rt bench``, where it runs from a checkout, those of a block.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from operator import mul
from pathlib import Path
from statistics import fmean
from typing import Any


class Results:
    """The steps of a check, and what each of them wrote; ``LookupError`` for a figure that is not there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with (folder / "steps.tsv").open(encoding="utf-8", newline="") as file:
            self.steps = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))

    @property
    def header(self) -> dict[str, Any]:
        """The machine; the block's own header, if there is one, as it was read while the clocks were up."""
        header: dict[str, Any] = self.read("block", "block").get("environment") or self.read("machine", "environment")
        return header

    def state(self, step: str) -> str:
        """What became of the step: ``not reached`` where it has not ended."""
        return next((row["state"] for row in self.steps if row["step"] == step), "not reached")

    def read(self, step: str, name: str) -> dict[str, Any]:
        """What the step wrote as ``name``; empty where it did not."""
        path = self._folder / step / f"{name}.json"
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return content

    def rows(self, step: str, name: str, table: str, **keys: Any) -> list[dict[str, Any]]:
        """The rows of a table that have these values."""
        rows = self.read(step, name).get("tables", {}).get(table, [])
        return [row for row in rows if all(row[key] == value for key, value in keys.items())]

    def column(self, key: str, *place: str, **keys: Any) -> list[float]:
        """``key`` of all such rows; there is at least one, and each has it."""
        values = [row[key] for row in self.rows(*place, **keys)]
        if not values or None in values:
            raise LookupError(key)
        return values

    def part(self, step: str, variant: str, part: str, key: str = "ms") -> float:
        """A figure of a part of a block; ``part`` is how its name begins."""
        rows = self.rows(step, "block", "Block", variant=variant)
        return [float(row[key]) for row in rows if row["part"].startswith(part) and row[key] is not None][-1]

    def whole(self, key: str = "ms") -> float:
        """A figure of a whole block."""
        return self.part("block", "evolve", "whole", key)

    def memory_cost(self, step: str) -> float:
        """Percent by which a block is longer with the memory."""
        return 100 * (self.part(step, "evolve", "whole") / self.part(step, "off", "whole") - 1)

    def ceiling(self, unit: str) -> float:
        return self.column("value", "kernels", "kernel_times", "Ceilings", unit=unit)[0]

    def attention(self, place: str = "Attention", *, float8: bool) -> float:
        """TFLOP/s of the fastest attention; ``place``: its table."""
        rows = self.rows("attention", "attention", place)
        rates = [r["tflops"] for r in rows if r["dtype"].startswith("float8") == float8 and r["tflops"] is not None]
        return float(sorted(rates)[-1])

    def convolutions(self) -> float:
        """TFLOP/s of all calls of a block together."""
        place, op = ("kernels", "kernel_times", "Kernels"), "causal_conv_hopper"
        calls, flops, us = (self.column(key, *place, op=op) for key in ("calls", "flops", "median_us"))
        return float(sum(map(mul, calls, flops)) / sum(map(mul, calls, us))) / 1e6

    def golden(self) -> float:
        """Nothing, where not all of them have run."""
        if self.state("golden") not in ("passed", "failed"):
            raise LookupError("golden")
        return 100 * fmean(self.column("ok", "golden", "golden", "Bundles"))


def found(find: Callable[..., float], *given: Any) -> float | None:
    """``find(*given)`` of what a check left; None where the check did not come to it."""
    try:
        return find(*given)
    except (LookupError, TypeError, ZeroDivisionError):  # the second of a None, as a rehearsal has them
        return None


@dataclass(frozen=True)
class Figure:
    """A number that a check is for: how it is found, its goal, what was predicted, what others report."""

    what: str
    find: Callable[[Results], float]
    unit: str
    step: str
    goal: str = ""
    met: Callable[[float], bool] | None = None
    predicted: str = ""
    others: str = ""

    def verdict(self, value: float | None) -> str:
        """Whether the goal is met; empty where there is none."""
        return "" if self.met is None else "open" if value is None else "met" if self.met(value) else "unmet"


_PAPER = "the paper, H100: "
_KERNELS = ("kernels", "kernel_times", "Kernels")
FIGURES = (
    Figure("golden bundles as expected", Results.golden, "%", "golden", "all", lambda v: v == 100),
    Figure("whole block, bfloat16", Results.whole, "ms", "block", "at most 400, then 324", lambda v: v <= 400, "360",
           _PAPER + "649; with a tiny VAE FlashDreams 344, Self-Forcing 432, FastVideo 511"),
    Figure("video frames a second", lambda r: r.whole("fps"), "", "block", "30, then 37", lambda v: v >= 30, "33",
           _PAPER + "18.5"),
    Figure("p99 over median", lambda r: r.whole("p99_ms") / r.whole(), "", "block", "at most 1.05 over an hour",
           lambda v: v <= 1.05),
    Figure("transformer, all passes", lambda r: r.part("block", "evolve", "transformer"), "ms", "block",
           predicted="286"),
    Figure("VAE decode, in the block", lambda r: r.part("block", "evolve", "VAE"), "ms", "block", predicted="86"),
    Figure("VAE decode, alone", lambda r: r.column("ms", "vae", "vae", "Decoders", decoder="echo-rt")[0], "ms", "vae",
           "at most 100", lambda v: v <= 100, "86"),
    Figure("whole block, float8", lambda r: r.part("float8", "evolve", "whole"), "ms", "float8", "at most 270",
           lambda v: v <= 270, "274"),
    Figure("memory against no memory", lambda r: r.memory_cost("memory"), "% more", "memory", "at most 10.6",
           lambda v: v <= 10.6, "11.6 by arithmetic", _PAPER + "10.6"),
    Figure("growth of device memory", lambda r: r.read("block", "block")["resources"]["growth"], "bytes", "block", "0",
           lambda v: v == 0),
    Figure("peak of device memory", lambda r: r.read("block", "block")["resources"]["peak"] / 1e9, "GB", "block",
           "at most 12", lambda v: v <= 12, "11.4"),
    Figure("GPU idle in a replayed block", lambda r: 100 * r.read("profile", "block_profile")["idle"], "%", "profile",
           "under 2", lambda v: v < 2),
    Figure("attention over the cache, best", lambda r: r.attention(float8=False), "TFLOP/s", "attention",
           predicted="591", others="16k keys, H100: FlashAttention-3 648, cuDNN 595"),
    Figure("attention over the cache, float8", lambda r: r.attention(float8=True), "TFLOP/s", "attention",
           predicted="945", others="about 1150"),
    Figure("3x3 convolutions, our kernel", Results.convolutions, "TFLOP/s", "kernels", predicted="545"),
    Figure("memory-bound kernels, the slowest", lambda r: 100 * min(r.column("share", *_KERNELS, limit="memory")),
           "% of a copy", "kernels", "at least 85", lambda v: v >= 85),
    Figure("a large copy", lambda r: r.ceiling("GB/s"), "GB/s", "kernels", predicted="4300"),
    Figure("a large product, bfloat16", lambda r: r.ceiling("TFLOP/s"), "TFLOP/s", "kernels", predicted="790"),
)  # fmt: skip
# No figure of a check, which measures float8 with the memory alone.
_IN_FLOAT8 = Figure("memory against no memory, float8", lambda r: r.memory_cost("float8"), "% more", "float8",
                    "at most 8", lambda v: v <= 8)  # fmt: skip


class _Block(Results):
    """A ``block.json`` alone, whichever step it is asked of."""

    def __init__(self, content: dict[str, Any]) -> None:
        self._content = content

    def read(self, step: str, name: str) -> dict[str, Any]:
        return self._content if name == "block" else {}


def judge(content: dict[str, Any], *, float8: bool) -> list[dict[str, Any]]:
    """Every goal of a block with its value and verdict: ``met``, ``unmet``, or ``open`` where it was not measured."""
    steps, rows, block = {"block", "memory"} | ({"float8"} if float8 else set()), [], _Block(content)
    for figure in (*FIGURES, _IN_FLOAT8):
        if figure.met is not None and figure.step in steps:
            value = found(figure.find, block)
            goal, verdict = f"{figure.what}: {figure.goal}", figure.verdict(value)
            rows.append({"goal": goal, "value": value, "unit": figure.unit, "verdict": verdict})
    return rows
