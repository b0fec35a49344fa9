"""A fast runtime that computes something else is no result: every variant is held against the torch backend first."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from echo_rt.bench.agreement import difference
from echo_rt.bench.rig import Rig
from echo_rt.verify.bundles import bound_between


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
