"""Numbers that users give: what is allowed, as text and as a value, and how it is said."""

from __future__ import annotations

import math
from typing import Any

import pytest

from echo_rt.utils.number import Number

COUNT = Number(int, least=1)
SHARE = Number(float, most=1)
LENGTH = Number(float, positive=True, words={"off": None, "auto": "auto"})


@pytest.mark.parametrize(
    ("number", "text", "value"),
    [(COUNT, "7", 7), (SHARE, "0", 0.0), (SHARE, "1e-3", 1e-3), (LENGTH, "off", None), (LENGTH, "auto", "auto")],
)
def test_what_is_allowed(number: Number, text: str, value: Any) -> None:
    assert number.parse(text) == value and number.allows(value)


@pytest.mark.parametrize(
    ("number", "text", "value", "expected"),
    [
        (COUNT, "0", 0, "an integer of 1 or more"),
        (COUNT, "1.5", 1.5, "an integer of 1 or more"),
        (COUNT, "yes", True, "an integer of 1 or more"),
        (COUNT, "off", None, "an integer of 1 or more"),
        (SHARE, "1.01", 1.01, "a number of 0 or more and at most 1"),
        (SHARE, "nan", math.nan, "a number of 0 or more and at most 1"),
        (LENGTH, "0", 0, "a number above 0, or 'off', or 'auto'"),
        (LENGTH, "inf", math.inf, "a number above 0, or 'off', or 'auto'"),
        (LENGTH, "on", "on", "a number above 0, or 'off', or 'auto'"),
        (Number(float, "a finite one", least=-math.inf), "-inf", -math.inf, "a finite one"),
    ],
)
def test_what_is_not(number: Number, text: str, value: Any, expected: str) -> None:
    assert not number.allows(value)
    with pytest.raises(ValueError) as error:
        number.parse(text)
    assert str(error.value) == f"expected {expected}, got {text!r}"
