"""By which libraries and kernels a video is computed, as its snapshots have it.

Two ways to compute the same differ in the last bits. Which one a model is given depends on the machine and on a trial,
which may find another one later; so a video that is to go on bit for bit is computed by those that its snapshot names.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from echo_rt import attention, convolution
from echo_rt.autotune.tuner import Selection
from echo_rt.ops.backends import Backend

WAYS = "computed_by"  # the fact of a model: names of implementations by labels
BACKEND = "backend"
ATTENTION, TEXT_ATTENTION, VAE_ATTENTION = "attention", "attention to the text", "attention of the VAE"


def convolution_label(shape: convolution.ConvolutionShape) -> str:
    """Of all convolutions of a shape; decoding in another number of bands makes other shapes."""
    return f"convolution of {shape}"


def ways_of(model: Mapping[str, Any]) -> dict[str, str]:
    """Those of a snapshot's model, by their labels; in one of before they were kept, the backend alone."""
    ways = model.get(WAYS)
    pairs = ways.items() if isinstance(ways, dict) else ()
    known = {label: name for label, name in pairs if isinstance(label, str) and isinstance(name, str)}
    return {BACKEND: "torch"} | known  # which it was unless somebody named another, before it was kept


@dataclass(frozen=True)
class Ways:
    """The ways of a runtime, by their labels; ``asked``: the labels of those that its user asked for by name."""

    names: Mapping[str, str]
    asked: Collection[str]

    @classmethod
    def chosen(
        cls,
        backend: Backend,
        over_cache: attention.AttentionSelection,
        over_text: attention.AttentionSelection,
        of_vae: attention.AttentionSelection | None,
        convolutions: Mapping[convolution.ConvolutionShape, convolution.ConvolutionSelection],
    ) -> Ways:
        """Those of the whole model, of its transformer, and of a decoder that has a choice."""
        named: dict[str, Backend | Selection[Any] | None] = {
            BACKEND: backend,
            ATTENTION: over_cache,
            TEXT_ATTENTION: over_text,
            VAE_ATTENTION: of_vae,
            **{convolution_label(shape): selection for shape, selection in convolutions.items()},
        }
        there = {label: one for label, one in named.items() if one is not None}
        names = {label: one.name for label, one in there.items()}
        return cls(names, [label for label, one in there.items() if one.by_name])

    def conflict(self, model: Mapping[str, Any]) -> str | None:
        """What is computed otherwise than in a snapshot's video, unasked, and what to do; None where nothing is."""
        for label, theirs in ways_of(model).items():
            own = self.names.get(label, theirs)
            if own != theirs and label not in self.asked:
                return (
                    f"{label} was {theirs} for its video and is {own} here, which rounds otherwise: load the runtime "
                    "with like=snapshot to go on bit for bit, or with backend=, attention= and convolution= by name"
                )
        return None
