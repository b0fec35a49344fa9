"""Muon for matrices and Adam for the rest, in one object with one state to save.

Muon (Keller Jordan, 2024): momentum, made orthogonal by a few Newton-Schulz steps, is the update of a matrix. A
convolution's weight is the matrix ``[out, everything else]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class MuonAndAdam:
    """Updates ``parameters`` in place; those named in ``adam``, and all that are no matrices, by Adam."""

    def __init__(
        self, parameters: Mapping[str, Tensor], *, muon_rate: float, adam_rate: float, adam: Iterable[str] = ()
    ) -> None:
        chosen = set(adam)
        self._matrices = {n: p for n, p in parameters.items() if p.dim() > 1 and n not in chosen}
        others = [p for n, p in parameters.items() if n not in self._matrices]
        self._momentum = {name: torch.zeros_like(tensor) for name, tensor in self._matrices.items()}
        self._adam = torch.optim.AdamW(others, lr=adam_rate, betas=(0.9, 0.98), weight_decay=0.0)
        self._muon_rate, self._adam_rate = muon_rate, adam_rate
        self._all = list(parameters.values())

    @torch.no_grad()
    def step(self, scale: float = 1.0) -> float:
        """Clip the gradients to a norm of 1, update with learning rates times ``scale``; return the norm before."""
        norm = float(torch.nn.utils.clip_grad_norm_(self._all, 1.0))
        for group in self._adam.param_groups:
            group["lr"] = scale * self._adam_rate
        self._adam.step()
        for name, tensor in self._matrices.items():
            if tensor.grad is None:  # the memory's, of clips too short for it
                continue
            momentum = self._momentum[name].lerp_(tensor.grad, 0.05)
            update = orthogonal(tensor.grad.lerp(momentum, 0.95).flatten(1)).view_as(tensor)
            rows, columns = tensor.flatten(1).shape
            tensor.sub_(update, alpha=scale * self._muon_rate * max(1.0, rows / columns) ** 0.5)
        for tensor in self._all:
            tensor.grad = None
        return norm

    def state_dict(self) -> dict[str, Any]:
        return {"momentum": self._momentum, "adam": self._adam.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, tensor in state["momentum"].items():
            self._momentum[name].copy_(tensor)
        self._adam.load_state_dict(state["adam"])


def orthogonal(matrix: Tensor) -> Tensor:
    """Return the nearest semi-orthogonal matrix, roughly: singular values between 0.7 and 1.2."""
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(_ITERATIONS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if tall else x
