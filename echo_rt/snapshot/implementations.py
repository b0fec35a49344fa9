"""The libraries and kernels that a video is computed by, as its snapshots name them.

Two implementations of the same operation differ in the last bits, and the autotuner may pick another one later or on
another machine. So a video that is to go on bit for bit is computed by those that its snapshot names.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from echo_rt import attention, convolution
from echo_rt.autotune.tuner import Selection
from echo_rt.ops.backends import Backend

IMPLEMENTATIONS = "computed_by"  # entry of a snapshot's model: names of implementations by label
BACKEND = "backend"
ATTENTION, TEXT_ATTENTION, VAE_ATTENTION = "attention", "attention to the text", "attention of the VAE"


def convolution_label(shape: convolution.ConvolutionShape) -> str:
    """Label of all convolutions of a shape, which depends on the number of the decoder's tiles."""
    return f"convolution of {shape}"


def implementations_of(model: Mapping[str, Any]) -> dict[str, str]:
    """Return the implementations that a snapshot's model names, by label; an old snapshot has only a backend."""
    named = model.get(IMPLEMENTATIONS)
    pairs = named.items() if isinstance(named, dict) else ()
    known = {label: name for label, name in pairs if isinstance(label, str) and isinstance(name, str)}
    return {BACKEND: "torch"} | known  # the default of the versions that did not store it


@dataclass(frozen=True)
class Implementations:
    """A runtime's implementations by label; ``asked``: labels of those that its user asked for by name."""

    names: Mapping[str, str]
    asked: Collection[str]

    @classmethod
    def selected(
        cls,
        backend: Backend,
        over_cache: attention.AttentionSelection,
        over_text: attention.AttentionSelection,
        of_vae: attention.AttentionSelection | None,
        convolutions: Mapping[convolution.ConvolutionShape, convolution.ConvolutionSelection],
    ) -> Implementations:
        """Collect the selections of a whole model."""
        named: dict[str, Backend | Selection[Any] | None] = {
            BACKEND: backend,
            ATTENTION: over_cache,
            TEXT_ATTENTION: over_text,
            VAE_ATTENTION: of_vae,
            **{convolution_label(shape): selection for shape, selection in convolutions.items()},
        }
        present = {label: one for label, one in named.items() if one is not None}
        names = {label: one.name for label, one in present.items()}
        return cls(names, [label for label, one in present.items() if one.by_name])

    def conflict(self, model: Mapping[str, Any]) -> str | None:
        """Name an implementation that differs from the snapshot's though nobody asked for it, and the remedy."""
        for label, theirs in implementations_of(model).items():
            own = self.names.get(label, theirs)
            if own != theirs and label not in self.asked:
                return (
                    f"{label} was {theirs} for its video and is {own} here, which rounds otherwise: load the runtime "
                    "with like=snapshot to go on bit for bit, or with backend=, attention= and convolution= by name"
                )
        return None
