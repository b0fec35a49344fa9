"""PSNR and SSIM against values worked out by hand, and against a direct implementation, pixel by pixel."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from echo_rt.errors import ConfigError
from echo_rt.verify.decoder import compare_videos, psnr, ssim


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def plain_ssim(video: Tensor, reference: Tensor, peak: float) -> float:
    """The published formula, one window after the other, in Python's floats."""
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
            c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
            values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2)))
    return sum(values) / len(values)


def test_psnr_by_hand() -> None:
    black, one = torch.zeros(2, 12, 12, 3, dtype=torch.uint8), torch.ones(2, 12, 12, 3, dtype=torch.uint8)
    assert psnr(black, one) == pytest.approx(20 * math.log10(255))  # 48.13 dB: off by one everywhere
    assert psnr(black, 255 * one) == 0
    assert psnr(one, one) == math.inf
    half = one.clone()
    half[1] = 3  # the mean square of both frames counts: (0 + 4) / 2
    assert psnr(half, one) == pytest.approx(20 * math.log10(255) - 10 * math.log10(2))


def test_the_range_of_floating_point_is_two() -> None:
    still = torch.zeros(1, 11, 11, 3)
    assert psnr(still + 0.02, still) == pytest.approx(40, abs=1e-5)  # 2 / 0.02 is a hundred
    assert psnr(still.bfloat16(), still.half() + 0.5) == pytest.approx(20 * math.log10(4))
    # A byte is 2/255 of it, so both ranges say the same of the same picture.
    one, other = noise(1, 12, 13, 3), noise(1, 12, 13, 3, seed=1)
    for measure in (psnr, ssim):
        assert measure(one / 127.5 - 1, other / 127.5 - 1) == pytest.approx(measure(one, other), abs=1e-5)


def test_beyond_the_range_nobody_sees_a_difference() -> None:
    white = torch.ones(1, 12, 12, 3)
    assert psnr(white, 3 * white) == math.inf and ssim(-white, -2 * white) == pytest.approx(1, abs=1e-12)
    assert psnr(2 * white, -2 * white) == 0
    assert math.isnan(psnr(white * math.nan, white)) and math.isnan(ssim(white * math.nan, white))


def test_ssim_of_flat_pictures_by_hand() -> None:
    """No variance: what is left is the comparison of the means, (2ab + c) / (a² + b² + c)."""
    flat = torch.ones(1, 16, 16, 1, dtype=torch.uint8)
    c = (0.01 * 255) ** 2
    assert ssim(100 * flat, 120 * flat) == pytest.approx((2 * 100 * 120 + c) / (100**2 + 120**2 + c), abs=1e-9)
    assert ssim(100 * flat, 100 * flat) == pytest.approx(1, abs=1e-12)


def test_ssim_of_opposite_pictures_is_negative() -> None:
    checks = (torch.arange(16)[:, None] + torch.arange(16)) % 2
    picture = (2.0 * checks - 1)[None, :, :, None]
    assert ssim(picture, -picture) < -0.9
    grey = 0.1 * picture.double()
    assert ssim(grey, -grey) == pytest.approx(plain_ssim((grey + 1) / 2, (1 - grey) / 2, 1), abs=1e-9)


@pytest.mark.parametrize("shape", [(1, 11, 11, 1), (2, 13, 17, 3)], ids=str)
def test_ssim_is_the_published_formula(shape: tuple[int, ...]) -> None:
    one, other = noise(*shape), noise(*shape, seed=1)
    other = (0.6 * one.float() + 0.4 * other.float()).byte()  # alike, but not very
    assert ssim(one, other) == pytest.approx(plain_ssim(one, other, 255), abs=1e-10)
    assert ssim(other, one) == pytest.approx(ssim(one, other), abs=1e-12)


def test_one_frame_of_many_counts_as_one() -> None:
    good, bad = noise(3, 12, 12, 3), noise(3, 12, 12, 3)
    bad[2] = noise(12, 12, 3, seed=1)
    assert ssim(bad, good) == pytest.approx((2 + ssim(bad[2:], good[2:])) / 3)


def test_frames_smaller_than_the_window_have_no_ssim() -> None:
    small = noise(1, 8, 32, 3)
    assert compare_videos(small, small).ssim is None and compare_videos(small, small).psnr == math.inf
    large = noise(1, 11, 32, 3)
    assert compare_videos(large, large).ssim == pytest.approx(1)


@pytest.mark.parametrize(
    ("video", "reference", "words"),
    [
        (noise(2, 12, 12, 3), noise(1, 12, 12, 3), r"\[2, 12, 12, 3\] and \[1, 12, 12, 3\]"),
        (noise(12, 12, 3), noise(12, 12, 3), r"one shape \[F, H, W, C\]"),
        (noise(0, 12, 12, 3), noise(0, 12, 12, 3), r"one shape \[F, H, W, C\]"),
        (noise(1, 12, 12, 3), noise(1, 12, 12, 3).float(), "got torch.uint8 and torch.float32"),
        (noise(1, 12, 12, 3).int(), noise(1, 12, 12, 3).int(), "got torch.int32"),
    ],
    ids=["length", "rank", "empty", "kinds", "integers"],
)
def test_videos_that_cannot_be_compared(video: Tensor, reference: Tensor, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        compare_videos(video, reference)
