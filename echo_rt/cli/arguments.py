"""Arguments with a syntax: paths, numbers, lengths, sizes, and ``--set NAME=VALUE``."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from echo_rt.errors import ConfigError
from echo_rt.options import OVERRIDES

_LONGEST = 10**9  # frames or seconds: beyond that, a video without an end is meant
_SHOWN = 40  # characters of a mistaken argument
# Overrides whose value is a list, and those whose value is a word.
_LISTS, _WORDS = ("denoising_steps", "first_block_steps"), ("memory_reads",)


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def parse_path(text: str) -> Path:
    """Parse a path for argparse; an empty one, of an unset variable for example, would mean the current folder."""
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


def parse_number(option: str, text: str, kind: type[int] | type[float], expected: str) -> Any:
    """``text`` as a finite number of 0 or more; raises ``ConfigError`` that says what was ``expected``."""
    try:
        value = kind(text)
    except ValueError:
        value = -1
    # isfinite makes a float of an integer, which a large one does not survive.
    if value < 0 or (isinstance(value, float) and not math.isfinite(value)):
        raise ConfigError(f"{option}: expected {expected}, got {_short(text)!r}")
    return value


def parse_positive(option: str, text: str | None, kind: type[int] | type[float], expected: str) -> Any:
    """``text`` as a finite number above 0; None where the option is not given. Raises ``ConfigError``."""
    if text is None:
        return None
    value = parse_number(option, text, kind, expected)
    if value == 0:
        raise ConfigError(f"{option}: expected {expected}, got {_short(text)!r}")
    return value


def parse_length(option: str, text: str | None, kind: type[int] | type[float], expected: str) -> Any:
    """A length of the video, above 0; None where the option is not given. Raises ``ConfigError``."""
    if text is None:
        return None
    value = parse_number(option, text, kind, expected)
    if value == 0:
        raise ConfigError(f"{option}: expected a video of one frame or more, got {_short(text)!r}")
    if value > _LONGEST:
        raise ConfigError(
            f"{option}: expected at most {_LONGEST}, got {_short(text)!r}; without --frames and --seconds "
            "the video has no end"
        )
    return value


def parse_size(text: str | None) -> tuple[int | None, int | None]:
    """Width and height of ``--size``, None for both where it is not given; raises ``ConfigError``."""
    if text is None:
        return None, None
    match = re.fullmatch(r"([1-9]\d{0,8})[xX\u00d7]([1-9]\d{0,8})", text.strip())
    if match is None:
        raise ConfigError(f"--size: expected WIDTHxHEIGHT in pixels such as 832x480, got {_short(text)!r}")
    return int(match[1]), int(match[2])


def parse_overrides(texts: Sequence[str]) -> dict[str, Any]:
    """The names and values of all ``--set``; raises ``ConfigError``. Whether they fit is for the model to say."""
    overrides: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if name not in OVERRIDES or not equals:
            raise ConfigError(f"--set: expected NAME=VALUE with a NAME of {', '.join(OVERRIDES)}; got {text!r}")
        if name in overrides:
            raise ConfigError(f"--set: expected each NAME once, got {name} again with {text!r}")
        overrides[name] = value if name in _WORDS else _parse_value(name, value, text)
    return overrides


def _parse_value(name: str, value: str, text: str) -> Any:
    try:
        parsed = json.loads(f"[{value}]" if "," in value else value)
    except ValueError:
        raise ConfigError(f"--set: expected a number, a list of numbers, true or false; got {text!r}") from None
    # One step is a list of one.
    return [parsed] if name in _LISTS and not isinstance(parsed, list) else parsed
