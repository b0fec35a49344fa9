"""Paths in arguments."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path


def parse_path(text: str) -> Path:
    """For argparse. An empty one, of a variable that is not set say, would be the folder that one is in."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got ''")
    return Path(text)


def parse_lora(text: str) -> tuple[Path, float]:
    """For argparse: ``FILE`` or ``FILE:STRENGTH``; a file that has the whole for a name is that file."""
    file, colon, strength = text.rpartition(":")
    if not colon or os.path.exists(text):
        return parse_path(text), 1.0
    try:
        number = float(strength)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"expected FILE or FILE:STRENGTH with a finite number, got {text!r}")
    return parse_path(file), number
