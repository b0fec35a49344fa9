"""Quantiles and outliers in bounded memory, against all the numbers at once."""

from __future__ import annotations

import json
import random

import pytest

from echo_rt.soak.interval import Histogram, Outliers


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99, 1.0])
def test_quantiles_are_right_to_a_thousandth(share: float) -> None:
    draw = random.Random(0)
    numbers = [draw.lognormvariate(-1.0, 0.3) for _ in range(5000)]
    histogram = Histogram.of(numbers)
    exact = sorted(numbers)[round(share * len(numbers)) - 1]
    quantile = histogram.quantile(share)
    assert quantile == pytest.approx(exact, rel=1e-3) and quantile <= exact
    assert len(histogram) < 3000


def test_parts_add_up_through_json() -> None:
    numbers, parts = [random.Random(seed).uniform(0.2, 0.4) for seed in range(400)], Histogram()
    for part in range(4):
        counted = Histogram.of(numbers[part::4])
        parts.update(Histogram.of_line(json.loads(json.dumps(counted))))
    assert parts == Histogram.of(numbers) and parts.total() == 400


def test_nothing_has_no_quantile() -> None:
    assert Histogram().quantile(0.5) is None
    assert Histogram.of([0.0]).quantile(0.5) == pytest.approx(1e-6, rel=1e-3)


def test_an_outlier_stands_out_of_the_blocks_before_it() -> None:
    outliers, noise = Outliers(), random.Random(0)
    scores = [outliers.zscore(noise.gauss(0.3, 0.01)) for _ in range(500)]
    assert scores[:64] == [None] * 64
    judged = [score for score in scores if score is not None]
    assert len(judged) == 436 and max(judged) < 6
    assert outliers.zscore(0.5) == pytest.approx(20, rel=0.3)


def test_equal_blocks_have_the_least_spread() -> None:
    outliers = Outliers()
    for _ in range(100):
        outliers.zscore(0.2)
    assert outliers.zscore(0.2) == 0
    assert outliers.zscore(0.21) == pytest.approx(5.0)  # 5 %, where the least spread is 1 %


def test_a_slow_drift_is_none() -> None:
    outliers = Outliers()
    scores = [outliers.zscore(0.2 + block * 1e-5) for block in range(5000)]
    assert max(score for score in scores if score is not None) < 3
