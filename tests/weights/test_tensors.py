"""What is read is numbers, and which numbers is noted."""

from __future__ import annotations

import math

import pytest
import torch

from echo_rt.errors import WeightsError
from echo_rt.weights.tensors import FingerprintedTensors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_found_and_counted(dtype: torch.dtype, bad: float) -> None:
    tensor = torch.zeros(5, 7, dtype=dtype)
    tensor[1, 2] = tensor[4, 6] = bad
    with pytest.raises(WeightsError, match=r"^here: 2 of 35 values of w are NaN or infinite$"):
        FingerprintedTensors({"w": tensor}, "here")["w"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_largest_numbers_are_numbers(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    tensors = {
        "w": torch.tensor([limits.max, limits.min, 0], dtype=dtype),
        "none": torch.zeros(0),
        "one": torch.ones(()),
    }
    read = FingerprintedTensors(tensors, "here")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_the_digest_is_of_names_and_values_whatever_the_order() -> None:
    tensors = {"a": torch.ones(3), "b": torch.zeros(2)}

    def digest(tensors: dict[str, torch.Tensor], order: str) -> str:
        read = FingerprintedTensors(tensors, "here")
        for name in order:
            read[name]
        return read.digest()

    assert digest(tensors, "ab") == digest(tensors, "ba")
    others = [digest(tensors, "a"), digest(tensors | {"a": torch.full((3,), 1.001)}, "ab")]
    assert len({digest(tensors, "ab"), *others}) == 3
