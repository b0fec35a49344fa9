"""Notes what is read from a set of weights: whether it is numbers at all, and which set it is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from echo_rt.errors import WeightsError

# Values of each tensor that count: a merged LoRA or another training step changes the first ones of a matrix too.
_VALUES = 64


class FingerprintedTensors(Mapping[str, Tensor]):
    """Passes tensors through, refuses what is not finite, and takes note of each one read.

    A NaN in a weight need not show in the video: torch's attention on a CPU turns NaN scores into zeros. So it is
    looked for here. ``source`` names the weights in the message of the :class:`WeightsError`.
    """

    def __init__(self, tensors: Mapping[str, Tensor], source: str) -> None:
        self._tensors = tensors
        self._source = source
        self._seen: dict[str, bytes] = {}

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise WeightsError(f"{self._source}: {bad} of {tensor.numel()} values of {name} are NaN or infinite")
        sample = tensor.flatten()[:_VALUES].to("cpu", torch.float32).contiguous()
        self._seen[name] = sample.numpy().tobytes()
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._tensors  # the inherited one reads the tensor, which may mean merging a LoRA into it

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def digest(self) -> str:
        """SHA-256 over the names and first values of the tensors read so far, whatever the order of reading."""
        digest = hashlib.sha256()
        for name in sorted(self._seen):
            digest.update(name.encode() + b"\0" + self._seen[name])
        return digest.hexdigest()
