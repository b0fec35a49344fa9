"""PSNR and SSIM against values worked out by hand, and against a direct implementation, pixel by pixel."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from echo_rt.verify.decoder import psnr, ssim


def noise(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1


def plain_ssim(video: Tensor, reference: Tensor) -> float:
    """The published formula for values in 0..1, one window after the other, in Python's floats."""
    radius, sigma = 5, 1.5
    offsets = range(-radius, radius + 1)
    weights = {(r, c): math.exp(-(r * r + c * c) / (2 * sigma**2)) for r, c in product(offsets, offsets)}
    total = sum(weights.values())
    frames, height, width, channels = video.shape
    values = []
    for f, c in product(range(frames), range(channels)):
        x, y = video[f, :, :, c].tolist(), reference[f, :, :, c].tolist()
        for row, column in product(range(radius, height - radius), range(radius, width - radius)):
            points = [(w / total, x[row + r][column + k], y[row + r][column + k]) for (r, k), w in weights.items()]
            mx, my = sum(w * a for w, a, _ in points), sum(w * b for w, _, b in points)
            vx = sum(w * (a - mx) ** 2 for w, a, _ in points)
            vy = sum(w * (b - my) ** 2 for w, _, b in points)
            cov = sum(w * (a - mx) * (b - my) for w, a, b in points)
            c1, c2 = 0.01**2, 0.03**2
            values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2)))
    return sum(values) / len(values)


def test_psnr_by_hand() -> None:
    black, step = -torch.ones(2, 12, 12, 3), 2 / 255
    assert psnr(black, black + step) == pytest.approx(20 * math.log10(255), abs=1e-4)  # 48.13 dB: off by one byte
    assert psnr(black, -black) == 0
    assert psnr(black, black) == math.inf
    half = black.clone()
    half[1] += 2 * step  # the mean square of both frames counts: (0 + 4) / 2
    assert psnr(half, black) == pytest.approx(20 * math.log10(255) - 10 * math.log10(2), abs=1e-4)
    still = torch.zeros(1, 11, 11, 3)
    assert psnr(still.bfloat16(), still.half() + 0.5) == pytest.approx(20 * math.log10(4))


def test_beyond_the_range_nobody_sees_a_difference() -> None:
    white = torch.ones(1, 12, 12, 3)
    assert psnr(white, 3 * white) == math.inf and ssim(-white, -2 * white) == pytest.approx(1, abs=1e-12)
    assert psnr(2 * white, -2 * white) == 0
    assert math.isnan(psnr(white * math.nan, white)) and math.isnan(ssim(white * math.nan, white))


def test_ssim_of_flat_pictures_by_hand() -> None:
    """No variance: what is left is the comparison of the means, (2ab + c) / (a² + b² + c)."""
    flat, (a, b), c = torch.ones(1, 16, 16, 1, dtype=torch.float64), (0.4, 0.5), 0.01**2
    one, other = (2 * a - 1) * flat, (2 * b - 1) * flat
    assert ssim(one, other) == pytest.approx((2 * a * b + c) / (a**2 + b**2 + c), abs=1e-9)
    assert ssim(one, one) == pytest.approx(1, abs=1e-12)


def test_ssim_of_opposite_pictures_is_negative() -> None:
    checks = (torch.arange(16)[:, None] + torch.arange(16)) % 2
    picture = (2.0 * checks - 1)[None, :, :, None]
    assert ssim(picture, -picture) < -0.9
    grey = 0.1 * picture.double()
    assert ssim(grey, -grey) == pytest.approx(plain_ssim((grey + 1) / 2, (1 - grey) / 2), abs=1e-9)


@pytest.mark.parametrize("shape", [(1, 11, 11, 1), (2, 13, 17, 3)], ids=str)
def test_ssim_is_the_published_formula(shape: tuple[int, ...]) -> None:
    one, other = noise(*shape), noise(*shape, seed=1)
    other = 0.6 * one + 0.4 * other  # alike, but not very
    assert ssim(one, other) == pytest.approx(plain_ssim((one + 1) / 2, (other + 1) / 2), abs=1e-10)
    assert ssim(other, one) == pytest.approx(ssim(one, other), abs=1e-12)


def test_one_frame_of_many_counts_as_one() -> None:
    good, bad = noise(3, 12, 12, 3), noise(3, 12, 12, 3)
    bad[2] = noise(12, 12, 3, seed=1)
    assert ssim(bad, good) == pytest.approx((2 + ssim(bad[2:], good[2:])) / 3)


def test_frames_smaller_than_the_window_have_no_ssim() -> None:
    small = noise(1, 8, 32, 3)
    assert ssim(small, small) is None and psnr(small, small) == math.inf
    large = noise(1, 11, 32, 3)
    assert ssim(large, large) == pytest.approx(1)
