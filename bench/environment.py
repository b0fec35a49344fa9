"""``python bench/environment.py``: what this machine is, as the header of every result has it."""

from __future__ import annotations

import sys

import _checkout  # noqa: F401

from echo_rt.bench.environment import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
