"""Numbers that users may give: their bounds, in the words of a message, and how they are read."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Number:
    """Finite numbers in ``least .. most``, above 0 if ``positive``; ``words`` stand for further values."""

    kind: type[int] | type[float]
    named: str = ""  # what is expected, where the bounds alone say too little
    least: float = 0
    most: float = math.inf
    positive: bool = False
    words: Mapping[str, Any] = field(default_factory=dict)

    @property
    def expected(self) -> str:
        """Which values are allowed, in words."""
        bounds = "above 0" if self.positive else f"of {self.least:g} or more"
        limit = "" if self.most == math.inf else f" and at most {self.most:g}"
        named = self.named or f"{'an integer' if self.kind is int else 'a number'} {bounds}{limit}"
        return ", or ".join([named, *map(repr, self.words)])

    def allows(self, value: Any) -> bool:
        """Return whether ``value`` is one of these numbers, or what a word stands for."""
        if value is None or isinstance(value, str):
            return value in self.words.values()
        real = isinstance(value, int if self.kind is int else (int, float)) and not isinstance(value, bool)
        within = real and self.least <= value <= self.most and abs(value) < math.inf
        return bool(within and (value > 0 or not self.positive))

    def parse(self, text: str) -> Any:
        """Return the number or the word's value that ``text`` is; raises ``ValueError``."""
        if text in self.words:
            return self.words[text]
        try:
            value = self.kind(text)
        except ValueError:
            value = math.nan
        if not self.allows(value):
            raise ValueError(f"expected {self.expected}, got {reprlib.repr(text)}")
        return value
