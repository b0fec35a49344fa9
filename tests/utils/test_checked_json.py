"""JSON from outside: what fits becomes a dataclass, what does not is one line that says where and why."""

from dataclasses import dataclass
from typing import Annotated

import msgspec
import pytest

from echo_rt.errors import OutputError
from echo_rt.utils.checked_json import convert, read_json


@dataclass(frozen=True)
class Record:
    count: Annotated[int, msgspec.Meta(ge=0)]
    seconds: float = 1.0
    names: tuple[str, ...] = ()


def test_what_fits_becomes_a_record():
    assert read_json('{"count": 3, "later": [], "names": ["a"]}', Record, "f", OutputError) == Record(3, 1.0, ("a",))
    assert convert({"count": 3}, Record, "f", OutputError) == Record(3)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "truncated"),
        ('{"count": 1', "truncated"),
        ("[" * 100_000, "array"),
        ('{"seconds": 2}', "count"),
        ('{"count": -1}', ">= 0"),
        ('{"count": "1"}', "`int`, got `str`"),
        ('{"count": 1, "seconds": NaN}', "malformed"),
        ('{"count": 1, "seconds": 1e999}', "out of range"),
        ('{"count": ' + "9" * 5000 + "}", "out of range"),
        (b"\xff\xfe", "malformed"),
    ],
)
def test_what_does_not_fit_is_one_line_with_the_name(text, says):
    with pytest.raises(OutputError) as caught:
        read_json(text, Record, "day/segments.json", OutputError)
    message = str(caught.value)
    assert message.startswith("day/segments.json: ") and says in message and len(message.splitlines()) == 1
