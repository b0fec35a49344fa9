"""JSON from outside, read against a dataclass: what does not fit is one clear error. Lines of JSON, written."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from echo_rt.errors import EchoError
from echo_rt.utils.wording import first_line

T = TypeVar("T")


def read_json(data: bytes | str, kind: type[T], what: str, error: type[EchoError]) -> T:
    """Parse ``data`` as a ``kind`` (a dataclass, ``dict[str, int]``, ...), without conversions; other keys are ignored.

    ``what`` names the file or line for the message of ``error``, which is raised for anything that does not fit: JSON
    that is damaged or too deep, NaN, a missing key, a wrong type, a number outside of its ``msgspec.Meta``.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as reason:
        raise error(f"{what}: {first_line(reason)}") from reason


def json_line(content: object) -> bytes:
    """Write ``content`` as one line of JSON; NaN and infinity become null."""
    return msgspec.json.encode(content) + b"\n"


def convert(value: Any, kind: type[T], what: str, error: type[EchoError]) -> T:
    """Check an object that is parsed already, as :func:`read_json` checks text."""
    try:
        return msgspec.convert(value, kind)
    except (msgspec.MsgspecError, RecursionError) as reason:
        raise error(f"{what}: {first_line(reason)}") from reason
