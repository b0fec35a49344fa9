"""Numbers, types and what libraries say, as a message of one line has them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch  # which help does without


def counted(number: int, one: str, several: str | None = None) -> str:
    """``1 block``, ``2 blocks``; ``several``: the plural that is not made with an s."""
    return f"{number} {one if number == 1 else several or f'{one}s'}"


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
    """As users write it."""
    return str(dtype).removeprefix("torch.")


def first_line(said: object) -> str:
    """The first line of what a library says, in an error or a warning; of nothing its type."""
    return next((line.strip() for line in str(said).splitlines() if line.strip()), type(said).__name__)


def with_type(error: BaseException) -> str:
    """The type of an error, which says more than some of them do, and its first line."""
    return f"{type(error).__name__}: {first_line(error)}"


def one_line(text: object) -> str:
    """``text`` without line breaks and runs of blanks."""
    return " ".join(str(text).split())
