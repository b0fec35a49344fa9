"""Numbers and types as a message says them."""

from __future__ import annotations


def counted(number: int, one: str, several: str | None = None) -> str:
    """``1 block``, ``2 blocks``; ``several``: the plural that is not made with an s."""
    return f"{number} {one if number == 1 else several or f'{one}s'}"


def type_of(value: object) -> str:
    """The type of ``value`` with its article: ``a list``, ``an int``."""
    name = type(value).__name__
    return f"an {name}" if name[0] in "aeiouAEIOU" else f"a {name}"
