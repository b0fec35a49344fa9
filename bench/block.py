"""``python bench/block.py ARGUMENTS``: what ``echo-rt bench ARGUMENTS`` does, from a checkout."""

from __future__ import annotations

import sys

import _checkout  # noqa: F401

from echo_rt.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
