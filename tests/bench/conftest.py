"""The benchmarks are scripts that import each other by name."""

from __future__ import annotations

import sys
from pathlib import Path

BENCH = Path(__file__).parent.parent.parent / "bench"
sys.path[:0] = [str(BENCH), str(BENCH / "nsight")]
