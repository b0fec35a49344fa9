"""Benchmarks use the inputs that the tests use: tests/cases.py and tests/random_model.py."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
