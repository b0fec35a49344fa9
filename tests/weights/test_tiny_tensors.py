"""Random weights of any size, drawn when they are asked for."""

from __future__ import annotations

import pytest
import torch

from echo_rt.weights.tiny_tensors import RandomTensors

CPU = torch.device("cpu")


def test_random_tensors_depend_on_name_and_seed_alone() -> None:
    shapes = {"a.weight": (64, 1024), "b.weight": (64, 1024), "norm.weight": (4096,), "gate_linear.bias": (4096,)}
    tensors = RandomTensors(shapes, CPU)
    first = tensors["a.weight"]
    assert torch.equal(RandomTensors(dict(reversed(shapes.items())), CPU)["a.weight"], first)
    assert not torch.equal(tensors["b.weight"], first)
    assert not torch.equal(RandomTensors(shapes, CPU, seed=1)["a.weight"], first)
    assert float(first.std()) == pytest.approx(1 / 32, rel=0.05)
    assert float(tensors["norm.weight"].mean()) == pytest.approx(1, abs=0.01)
    assert float(tensors["gate_linear.bias"].mean()) == pytest.approx(2, abs=0.01)
    assert list(tensors) == list(shapes) and len(tensors) == 4 and "c" not in tensors
