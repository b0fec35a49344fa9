"""By which libraries and kernels a video is computed, as its snapshots have it.

Two ways to compute the same differ in the last bits. Which one a model is given is the outcome of a trial, which may
be another one elsewhere or later; so a video that is to go on bit for bit is computed by those that its snapshot names.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from echo_rt import attention, convolution

WAYS = "computed_by"  # the fact of a model: names of kinds by labels
ATTENTION, TEXT_ATTENTION, VAE_ATTENTION = "attention", "attention to the text", "attention of the VAE"


def convolution_label(shape: convolution.ConvolutionShape) -> str:
    """Of all convolutions of a shape; decoding in another number of bands makes other shapes."""
    return f"convolution of {shape}"


def ways_of(model: Mapping[str, Any]) -> dict[str, str]:
    """Those of a snapshot's model, by their labels; none in snapshots of before they were kept."""
    ways = model.get(WAYS)
    pairs = ways.items() if isinstance(ways, dict) else ()
    return {label: name for label, name in pairs if isinstance(label, str) and isinstance(name, str)}


@dataclass(frozen=True)
class Ways:
    """The ways of a runtime, by their labels; ``asked``: the labels of those that its user asked for by name."""

    names: Mapping[str, str]
    asked: Collection[str]

    @classmethod
    def chosen(
        cls,
        over_cache: attention.Choice,
        over_text: attention.Choice,
        of_vae: attention.Choice | None,
        convolutions: Mapping[convolution.ConvolutionShape, convolution.Choice],
    ) -> Ways:
        """Those of the transformer, and of a decoder that has a choice."""
        names, asked = {}, []
        for label, choice in ((ATTENTION, over_cache), (TEXT_ATTENTION, over_text), (VAE_ATTENTION, of_vae)):
            if choice is None:
                continue
            names[label] = choice.attention.name
            asked += [label] * choice.by_name
        for shape, way in convolutions.items():
            names[convolution_label(shape)] = way.kind.name
            asked += [convolution_label(shape)] * way.by_name
        return cls(names, asked)

    def conflict(self, model: Mapping[str, Any]) -> str | None:
        """What is computed otherwise than in a snapshot's video, unasked, and what to do; None where nothing is."""
        for label, theirs in ways_of(model).items():
            own = self.names.get(label, theirs)
            if own != theirs and label not in self.asked:
                return (
                    f"its video was made with {label} by {theirs}, here it is by {own} and rounded otherwise: load the "
                    "runtime with like=snapshot to go on bit for bit, or with attention= and convolution= by name"
                )
        return None
