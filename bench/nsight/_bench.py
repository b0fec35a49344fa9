"""Importing this lets the scripts here use those of the folder above, and through them the package of this checkout."""

from __future__ import annotations

import sys
from pathlib import Path

_BENCH = str(Path(__file__).resolve().parent.parent)
if _BENCH not in sys.path:
    sys.path.insert(1, _BENCH)

import _checkout  # noqa: E402, F401
