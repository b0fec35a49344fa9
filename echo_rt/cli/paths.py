"""Paths in arguments."""

from __future__ import annotations

import argparse
from pathlib import Path


def parse_path(text: str) -> Path:
    """For argparse. An empty one, of a variable that is not set say, would be the folder that one is in."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got ''")
    return Path(text)
