"""Runs a Python program on the virtual GPU: ``PYTHONPATH=tests python -m virtual_gpu.run -m pytest -m cuda``.

All that it starts is on it too. ECHO_RT_VIRTUAL_GPU_POLICY is random (the default), lazy or eager;
ECHO_RT_VIRTUAL_GPU_SEED makes a random order the same again.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

from virtual_gpu.names import BUILD, POLICIES, POLICY, ROOT, RUNTIME, SEED


def environment() -> dict[str, str]:
    """What a process needs to have the virtual GPU."""
    ours = dict(os.environ)
    policy = ours.setdefault(POLICY, "random")
    if policy not in POLICIES:
        sys.exit(f"{POLICY} must be one of {', '.join(POLICIES)}; got {policy!r}")
    ours.setdefault(SEED, str(random.randrange(2**31)))
    if not ours[SEED].isdecimal():
        sys.exit(f"{SEED} must be a number of digits alone; got {ours[SEED]!r}")
    ours["PYTEST_PLUGINS"] = "virtual_gpu.plugin"

    def put_first(variable: str, *values: Path, between: str = os.pathsep) -> None:
        others = [value for value in os.environ.get(variable, "").split(between) if value]
        ours[variable] = between.join([*map(str, values), *others])

    put_first("PYTHONPATH", ROOT / "tests" / "virtual_gpu" / "start", ROOT / "tests")
    put_first("LD_LIBRARY_PATH", BUILD)  # the driver
    put_first("LD_PRELOAD", RUNTIME, between=" ")
    return ours


def main() -> None:
    if not RUNTIME.is_file():
        sys.exit(f"the virtual GPU is not built: PYTHONPATH=tests {sys.executable} -m virtual_gpu.build")
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], environment())


if __name__ == "__main__":
    main()
