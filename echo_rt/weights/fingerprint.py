"""A record of what is read from a set of weights: finite numbers only, and a digest that tells which set it is."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from echo_rt.errors import WeightsError
from echo_rt.weights.tensors import LazyTensors, lazy

# Values of each tensor that count: a merged LoRA or another training step changes the first ones of a matrix too.
_VALUES = 64


class FingerprintedTensors(LazyTensors):
    """A view that refuses tensors with NaN or infinite values and records each one read.

    A NaN in a weight need not show in the video: torch's attention on a CPU turns NaN scores into zeros. So it is
    looked for here. ``source`` names the weights in the message of the :class:`WeightsError`.
    """

    def __init__(self, tensors: Mapping[str, Tensor], source: str) -> None:
        super().__init__(lazy(tensors).entries)
        self.source = source
        self._seen: dict[str, bytes] = {}

    def __getitem__(self, name: str) -> Tensor:
        entry = self.entries[name]
        tensor = entry.read()
        # In one pass; NaN if any value is. ``isfinite`` would write a tensor of bools.
        ends = torch.aminmax(tensor) if tensor.numel() else ()
        if not all(math.isfinite(end.item()) for end in ends):
            bad = int((~torch.isfinite(tensor)).sum())
            raise WeightsError(f"{self.source}: {bad} of {tensor.numel()} values of {name} are NaN or infinite")
        # What is computed at load may be rounded otherwise elsewhere: then it is told by what it is computed of.
        samples = [origin.flatten()[:_VALUES].to("cpu", torch.float32) for origin in entry.origins() or [tensor]]
        self._seen[name] = b"".join(sample.contiguous().numpy().tobytes() for sample in samples)
        return tensor

    def digest(self) -> str:
        """SHA-256 over the names and first values of the tensors read so far, whatever the order of reading."""
        digest = hashlib.sha256()
        for name in sorted(self._seen):
            digest.update(name.encode() + b"\0" + self._seen[name])
        return digest.hexdigest()
