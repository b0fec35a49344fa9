"""A golden bundle's folder: ``config.json`` (its ``kind`` says what it is), ``weights``, ``inputs``, ``expected``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from echo_rt.errors import WeightsError
from echo_rt.weights.files import check_tensors, open_tensors
from echo_rt.weights.fingerprint import FingerprintedTensors
from echo_rt.weights.shapes import Shapes

RECIPE = "recipe"
FLOAT8_KINDS = ("rollout", RECIPE)  # those with linear layers that float8 is about
KINDS = ("rollout", "vae", "text_encoder", RECIPE)


@dataclass(frozen=True)
class Bundle:
    """A bundle and how it is run; ``backend`` and ``graphs`` as in :meth:`Runtime.from_pretrained`.

    A bundle of kind ``recipe`` names published files in place of ``weights``.
    """

    folder: Path
    config: Mapping[str, Any]
    inputs: Mapping[str, Tensor]
    expected: Mapping[str, Tensor]
    device: torch.device
    dtype: torch.dtype
    backend: str | None
    graphs: bool | None
    float8_except: Sequence[str]

    def weights(self, shapes: Shapes) -> FingerprintedTensors:
        """Open the weights; raises ``WeightsError`` unless they have these ``shapes``."""
        path = self.folder / "weights.safetensors"
        tensors = open_tensors(path)
        check_tensors(tensors, shapes, str(path))
        return FingerprintedTensors(tensors, str(path))

    def path(self, name: str) -> Path:
        """The file or folder that ``config.json`` names, relative to the bundle."""
        path = self.config[name]
        if not isinstance(path, str):
            raise WeightsError(f"{self.folder}/config.json: expected {name} to be a path, got {path!r}")
        return self.folder / path

    def input(self, name: str, rank: int | None = None) -> Tensor:
        """An input on the host; raises ``WeightsError`` if it is absent or has another number of dimensions."""
        place = f"{self.folder}/inputs.safetensors"
        if name not in self.inputs:
            raise WeightsError(f"{place}: expected a tensor {name!r}, and it is not there")
        tensor = self.inputs[name]
        if rank is not None and tensor.ndim != rank:
            raise WeightsError(f"{place}: expected {name} with {rank} dimensions, got {list(tensor.shape)}")
        return tensor

    def noise(self, block: int, shape: Sequence[int]) -> Tensor:
        """The bundle's noise ``[steps, B, C, h, w]`` of a block, used in place of the counter-based generator's."""
        names = [f"noise.{block}", *(f"renoise.{block}.{step}" for step in range(shape[0] - 1))]
        for name in names:
            if (found := tuple(self.input(name).shape)) != tuple(shape[1:]):
                raise WeightsError(f"{self.folder}: {name} has shape {found}, a block has {tuple(shape[1:])}")
        return torch.stack([self.input(name) for name in names]).float()

    def script(self) -> tuple[int, list[int]]:
        """The number of blocks, and the blocks that begin with another prompt."""
        blocks, switches = self.config["num_blocks"], self.config.get("prompt_switch_blocks", [])
        whole = [n for n in (blocks, *switches) if isinstance(n, int) and n >= 0] if isinstance(switches, list) else []
        if not whole or len(whole) != 1 + len(switches):
            raise WeightsError(
                f"{self.folder}/config.json: expected num_blocks and prompt_switch_blocks as whole numbers, "
                f"got {blocks!r} and {switches!r}"
            )
        return blocks, switches


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json``; raises ``WeightsError`` unless it is that of a bundle."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        why = f"config.json cannot be read: {error.strerror}"
        raise WeightsError(f"{folder} is not a golden bundle ({why}), nor a model with a VAE") from None
    except ValueError as error:
        raise WeightsError(f"{path}: expected JSON, got {error}") from None
    kind = config.get("kind") if isinstance(config, dict) else None
    if kind not in KINDS:
        raise WeightsError(f"{path}: expected a kind of {', '.join(KINDS)}; got {kind!r}")
    return dict(config)


def find_bundles(folder: Path) -> list[Path]:
    """List the folders at and below ``folder`` whose ``config.json`` has a ``kind``, in order of their names."""
    return sorted(Path(place) for place, _, files in os.walk(folder) if "config.json" in files and _has_kind(place))


def _has_kind(folder: str) -> bool:
    try:
        config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # somebody else's file
    return isinstance(config, dict) and "kind" in config
