"""Tells one set of weights from another without reading files twice."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

# Values of each tensor that count: a merged LoRA or another training step changes the first ones of a matrix too.
_VALUES = 64


class FingerprintedTensors(Mapping[str, Tensor]):
    """Passes tensors through and takes note of each one read."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._seen: dict[str, bytes] = {}

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
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
