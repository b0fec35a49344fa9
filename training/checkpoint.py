"""The state of a training run on disk: whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from training.optimizer import MuonAndAdam


def save(
    path: Path, weights: Mapping[str, Tensor], optimizer: MuonAndAdam, step: int, **more: Mapping[str, Tensor]
) -> None:
    """Write everything that a run needs to go on from ``step``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    plain = {name: tensor.detach() for name, tensor in weights.items()}
    torch.save({"weights": plain, "optimizer": optimizer.state_dict(), "step": step, **more}, part)
    os.replace(part, path)


@torch.no_grad()
def load(path: Path, weights: Mapping[str, Tensor], optimizer: MuonAndAdam, **more: Mapping[str, Tensor]) -> int:
    """Copy a saved run into ``weights``, ``optimizer`` and ``more``; return its step, 0 where there is none."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    for name, tensor in weights.items():
        tensor.copy_(state["weights"][name])
    for key, tensors in more.items():
        for name, tensor in tensors.items():
            tensor.copy_(state[key][name])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])
