"""Benchmarks use the inputs that the tests use: tests/cases.py and tests/random_model.py."""

from __future__ import annotations

import _checkout  # noqa: F401
