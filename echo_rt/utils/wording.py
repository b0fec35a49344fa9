"""Numbers, times, types and libraries' errors in the words of a one-line message."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def counted(number: int, one: str) -> str:
    """``1 block``, ``2 blocks``."""
    return f"{number} {one}" if number == 1 else f"{number} {one}s"


def clock(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def type_of(value: object) -> str:
    """The type of ``value`` with its article: ``a list``, ``an int``."""
    name = type(value).__name__
    return f"an {name}" if name[0] in "aeiouAEIOU" else f"a {name}"


def plain(dtype: torch.dtype) -> str:
    """``dtype`` as users write it: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def first_line(error: object) -> str:
    """First line of a library's error or warning; its type if it has no text."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def with_type(error: BaseException) -> str:
    """Type of an error and its first line, for errors whose text alone says too little."""
    return f"{type(error).__name__}: {first_line(error)}"


def one_line(text: object) -> str:
    """``text`` without line breaks and runs of blanks."""
    return " ".join(str(text).split())


def printable(text: object) -> str:
    """``text`` with everything that a terminal would obey (escape sequences, line breaks) as backslash escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(text))


def warn_caller(text: str, category: type[Warning] = UserWarning) -> None:
    """Warn with the line of code outside this package that led here."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == "echo_rt":
        frame, level = frame.f_back, level + 1
    warnings.warn(text, category, stacklevel=level)
