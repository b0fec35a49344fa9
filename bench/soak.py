"""``python bench/soak.py ARGUMENTS``: what ``echo-rt soak ARGUMENTS`` does, from a checkout. See docs/soak.md."""

from __future__ import annotations

import sys

import _checkout  # noqa: F401

from echo_rt.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["soak", *sys.argv[1:]]))
