"""bench/float8_attention.py: each way of quantizing is attention, and takes the model's place only where it is told."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from closeness import relative_error
from float8_attention import CHOSEN, SCHEMES, Scheme, attending, truncated, worst
from torch import Tensor

from echo_rt.attention import exact_attention


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 2, 32, generator=generator) for n in (40, 300, 300))
    return q, k + 3 * torch.randn(2, 32, generator=generator), v  # keys with a mean


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_each_is_attention_but_for_rounding(scheme: Scheme) -> None:
    given = inputs()
    error = relative_error(scheme(*given), exact_attention(*given))
    assert 1e-3 < error < 0.2, "a term is missing, or nothing is quantized"


def test_without_rounding_it_is_exact_and_smoothing_changes_nothing() -> None:
    given, plain = inputs(), Scheme("", "none", "none", p=False)
    for scheme in (plain, dataclasses.replace(plain, smooth=True)):
        assert relative_error(scheme(*given), exact_attention(*given)) < 1e-5
    short, long = (dataclasses.replace(plain, sums=sums) for sums in ("short", "two-level"))
    errors = [relative_error(scheme(*given), exact_attention(*given)) for scheme in (short, long)]
    assert 1e-2 > errors[0] > errors[1] > 1e-5, "of fewer bits over more keys"


def test_a_sum_keeps_14_bits() -> None:
    assert truncated(torch.tensor([1 + 2.0**-13, 1 + 2.0**-14, -3.0])).tolist() == [1 + 2.0**-13, 1, -3]


def test_it_is_used_where_it_is_told_and_nowhere_after(golden_dir: Path) -> None:
    bundle = [golden_dir / "rollout_small"]
    errors = []
    for where in (lambda layer, step: False, lambda layer, step: (layer, step) == (0, 1), lambda layer, step: True):
        with attending(CHOSEN, where):
            errors.append(worst(bundle, "float32")["latents"])
    assert errors[0] < 1e-5 < errors[1] < errors[2] < 6e-2
    assert worst(bundle, "float32")["latents"] == errors[0]
