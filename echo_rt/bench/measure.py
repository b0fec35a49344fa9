"""What is done with a runner: a turn of blocks, held against the torch backend, measured beside others' code."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from echo_rt.bench.environment import ROOT
from echo_rt.bench.rig import Parts, Rig
from echo_rt.bench.timing import Sample, intervals
from echo_rt.engine.executor import Lane
from echo_rt.errors import EchoError
from echo_rt.utils.wording import with_type
from echo_rt.verify.bundles import bound_between

# The board's counter of energy, in joules.
Joules = Callable[[], float | None]
BASELINES = ("diffusers AutoencoderKLWan", "diffusers WanTransformer3DModel", "FlashDreams")
_SCRIPT = "bench/baselines.py"
# Elements that are widened to float64 at a time: the KV buffer of a large model would not fit in that precision.
_CHUNK = 2**26


def take_turn(rig: Rig, lookahead: int, blocks: int, sample: Sample, joules: Joules) -> None:
    """Make ``blocks`` blocks that count towards ``sample``; the rig is idle before and after.

    Blocks that are begun ahead come sooner the first time, so one more than that many do not count. The energy is that
    of one block more than those that count, so that reading it falls into no time that counts.
    """
    since = rig.executor.mark(Lane.MAIN)
    warm = [rig.block(lookahead) for _ in range(lookahead)]
    before = joules()
    warm.append(rig.block(lookahead))
    measured = [rig.block(lookahead) for _ in range(blocks)]
    after = joules()
    ahead = rig.in_flight_spans()
    rig.drain()
    times = [intervals(block.spans, since) for block in (*warm, *measured)]
    every = [each for block in times for each in block] + intervals(ahead, since)
    sample.add_turn(times[len(warm) - 1], times[len(warm) :], every)
    sample.add_energy(None if before is None or after is None else after - before, blocks + 1)


def difference(actual: Tensor, expected: Tensor) -> float:
    """``‖actual - expected‖ / ‖expected‖``; for whole numbers the share of elements that differ."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("nan")
    if not expected.is_floating_point():
        return float((actual != expected).double().mean()) if expected.numel() else 0.0
    apart = size = 0.0
    pieces = zip(actual.reshape(-1).split(_CHUNK), expected.reshape(-1).split(_CHUNK), strict=True)
    for a, e in pieces:
        wide = e.double()
        apart += float((a.double() - wide).square().sum())
        size += float(wide.square().sum())
    return 0.0 if apart == 0.0 else (apart / size) ** 0.5 if size else float("inf")


@dataclass(frozen=True)
class Exactness:
    """Relative errors of a block against the torch backend's, and the bound that both are held to."""

    latents: float
    frames: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.latents <= self.bound and self.frames <= self.bound  # NaN is not


def compare_block(rig: Rig, reference: Rig, seed: int, dtype: torch.dtype) -> Exactness:
    """The same steady block by both, memory update included where there is one, from what ``rig`` has come to."""
    reference.adopt(rig, seed)
    ours, theirs = rig.block(0).made, reference.block(0).made
    rig.drain()
    reference.drain()
    return Exactness(
        difference(ours.latents, theirs.latents),
        difference(ours.frames.float(), theirs.frames.float()),
        bound_between(dtype),
    )


@dataclass(frozen=True)
class Baseline:
    """Another's code. ``call`` does the work once; it stands ``beside`` our figure ``decode`` or ``pass``."""

    name: str
    what: str
    beside: str
    call: Callable[[], object]
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound  # NaN is not


@dataclass(frozen=True)
class Missing:
    """A baseline that is not in the run, and why."""

    name: str
    why: str

    @classmethod
    def because(cls, name: str, error: Exception) -> Missing:
        """One that raised ``error``."""
        return cls(name, str(error) if isinstance(error, EchoError) else f"did not run: {with_type(error)}")


LEFT_OUT = tuple(Missing(name, "left out by --no-peers") for name in BASELINES)


def find_baselines(parts: Parts, prompt_embeds: Tensor, seed: int) -> tuple[list[Baseline], list[Missing]]:
    """The baselines that ``bench/baselines.py`` of a checkout finds; none is installed with this package."""
    script = ROOT / _SCRIPT
    if not script.is_file():
        why = f"only a checkout has {_SCRIPT}, which runs it; this package was installed without"
        return [], [Missing(name, why) for name in BASELINES]
    spec = importlib.util.spec_from_file_location("baselines", script)
    assert spec is not None and spec.loader is not None  # it is a Python file
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: tuple[list[Baseline], list[Missing]] = module.find_baselines(parts, prompt_embeds, seed)
    return found
