"""One runtime under the hammer of eight threads, in Python's development mode, where a warning is an error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from fuzzing import SECONDS

HAMMER = Path(__file__).parent / "hammer.py"


def test_eight_threads_do_anything(small_model: Path) -> None:
    """For two seconds, or for those of ``ECHO_RT_FUZZ``; a watchdog ends what is stuck, with all stacks."""
    command = [sys.executable, "-X", "dev", "-W", "error", str(HAMMER), str(small_model), str(SECONDS or 2), "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS + 600)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-8000:]
