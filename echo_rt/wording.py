"""Numbers, types and what libraries say, as a message of one line has them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch  # which help does without


def counted(number: int, one: str, several: str | None = None) -> str:
    """``1 block``, ``2 blocks``; ``several``: the plural that is not made with an s."""
    return f"{number} {one if number == 1 else several or f'{one}s'}"


def type_of(value: object) -> str:
    """The type of ``value`` with its article: ``a list``, ``an int``."""
    name = type(value).__name__
    return f"an {name}" if name[0] in "aeiouAEIOU" else f"a {name}"


def plain(dtype: torch.dtype) -> str:
    """As users write it."""
    return str(dtype).removeprefix("torch.")


def first_line(error: BaseException) -> str:
    """The first line of what a library says."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
