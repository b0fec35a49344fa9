"""Random tensors of any model: noise at the scale of real weights, which depends on a seed and names alone."""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

from echo_rt.config import TextEncoderConfig
from echo_rt.weights.shapes import Shapes, text_encoder_shapes
from echo_rt.weights.tensors import LazyTensors

Tensors = dict[str, Tensor]

_NORMS = ("norm", "gamma", "connector_proj.3")
_SMALL = 0.05  # spread of what is near a constant: norm weights, biases
_GATE, _GATE_BIAS = "gate_linear.bias", 2.0  # the memory's gate begins near "keep"


class Draw:
    """Normal random tensors that depend on a seed, a name and the kind of device, not on the order of drawing."""

    def __init__(self, seed: int | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64) -> None:
        self._seed, self._device, self._dtype = seed, device, dtype

    def __call__(self, name: str, *shape: int) -> Tensor:
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(f"{self._seed}/{name}".encode()))
        return torch.randn(shape, generator=generator, device=self._device, dtype=self._dtype)


def random_tensor(draw: Draw, name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor at the scale that keeps amplitudes: unit gain for matrices, near 1 for norms, near 0 for biases."""
    x = draw(name, *shape)
    if name.endswith(_GATE):
        return _SMALL * x + _GATE_BIAS
    if name.endswith(".bias"):
        return _SMALL * x
    if any(norm in name for norm in _NORMS):
        return 1 + _SMALL * x
    if name.endswith("modulation"):
        return x / math.sqrt(shape[-1])
    if name.endswith("query_init"):
        return x
    return x / math.sqrt(math.prod(shape[1:]))


def random_tensors(shapes: Shapes, draw: Draw) -> Tensors:
    """All tensors of ``shapes``."""
    return {name: random_tensor(draw, name, shape) for name, shape in shapes.items()}


def text_encoder_tensors(config: TextEncoderConfig, draw: Draw) -> Tensors:
    """The umT5 encoder."""
    return random_tensors(text_encoder_shapes(config), draw)


class RandomTensors(LazyTensors):
    """Random weights of these ``shapes``: float32 on ``device``, drawn anew whenever they are asked for.

    A model of any size can be made of them without anyone holding them in between.
    """

    def __init__(self, shapes: Shapes, device: torch.device, seed: int = 0) -> None:
        super().__init__(shapes)
        self._shapes, self._draw = shapes, Draw(seed, device, torch.float32)

    def __getitem__(self, name: str) -> Tensor:
        return random_tensor(self._draw, name, self._shapes[name])
