"""Weights that are on no disk: each tensor is drawn on the device at the moment that it is asked for."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from echo_rt.weights.shapes import Shapes

_NORMS = ("norm", "gamma", "connector_proj.3")
_SMALL = 0.05  # spread of what is near a constant: norm weights, biases
_GATE, _GATE_BIAS = "gate_linear.bias", 2.0  # the memory's gate is trained from near "keep"


class RandomTensors(Mapping[str, Tensor]):
    """Tensors of these names and shapes, float32 on ``device``, at scales that keep a model's amplitudes.

    A tensor depends on the seed, its name and the kind of device, and on nothing that was asked for before: two models
    made from it have the same weights, without anyone holding them in between.
    """

    def __init__(self, shapes: Shapes, device: torch.device, seed: int = 0) -> None:
        self._shapes, self._device, self._seed = shapes, device, seed

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(f"{self._seed}/{name}".encode()))
        x = torch.randn(shape, generator=generator, device=self._device, dtype=torch.float32)
        if name.endswith(".bias"):
            return x.mul_(_SMALL).add_(_GATE_BIAS if name == _GATE else 0.0)
        if any(norm in name for norm in _NORMS):
            return x.mul_(_SMALL).add_(1.0)
        if name.endswith("modulation"):
            return x.div_(math.sqrt(shape[-1]))
        if name.endswith("query_init"):
            return x
        return x.div_(math.sqrt(math.prod(shape[1:])))

    def __contains__(self, name: object) -> bool:
        return name in self._shapes  # the inherited one would draw the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)
