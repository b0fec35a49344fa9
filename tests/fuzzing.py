"""What nobody's program wrote, for the tests of all that reads files, messages and arguments.

Each test with ``@given`` tries the same few examples, quickly; with ``ECHO_RT_FUZZ=SECONDS`` (``make test-long``) it
tries others for so long. What is found stays as an ``@example``.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

SECONDS = float(os.environ.get("ECHO_RT_FUZZ", "0"))
settings.register_profile(
    "fuzz",
    max_examples=200 if SECONDS else 25,
    deadline=None,
    derandomize=not SECONDS,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("fuzz")
slow = settings(max_examples=50 if SECONDS else 4)
"""For a test whose examples take a second each."""

NUMBERS = st.integers(-(2**70), 2**70) | st.sampled_from([0, 1, -1, 2**31, 2**53 + 1, 2**63, 10**400, 1e100, -1e308])
ANYTHING: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)
"""Any JSON, NaN and numbers that no computer has among it."""


def one_line(error: BaseException | str) -> None:
    """What is refused is refused in one line, which can be read."""
    assert "\n" not in str(error) and len(str(error)) < 2000, str(error)


def as_json(value: object) -> bytes:
    """``value`` as text, half characters too; numbers may have any length."""
    return json.dumps(value).encode()


@st.composite
def changed(draw: st.DrawFn, whole: Any, anything: st.SearchStrategy[Any] = ANYTHING) -> Any:
    """The JSON ``whole`` with an entry, at any depth, replaced by ``anything``, removed or added."""
    whole = copy.deepcopy(whole)
    place = whole
    while True:
        if not isinstance(place, (dict, list)):
            return draw(anything)
        names = sorted(place) if isinstance(place, dict) else range(len(place))
        name = draw(st.sampled_from([*names, None]))
        if name is None:
            if isinstance(place, dict):
                place[draw(st.text(max_size=10))] = draw(anything)
            else:
                place.append(draw(anything))
            return whole
        if not isinstance(place[name], (dict, list)) or draw(st.booleans()):
            if draw(st.booleans()):
                place[name] = draw(anything)
            else:
                del place[name]
            return whole
        place = place[name]


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """``whole`` with up to three places replaced by other bytes, more or fewer of them."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(whole)))
        gone = draw(st.sampled_from([0, 1, 4, 8, len(whole)]))
        whole = whole[:at] + draw(st.binary(max_size=8)) + whole[at + gone :]
    return whole


def for_seconds(test: Callable[..., Any]) -> Callable[..., None]:
    """A test with ``@given`` that goes on for ``ECHO_RT_FUZZ`` seconds, and prints how many examples there were."""
    hypothesis: Any = test.hypothesis  # type: ignore[attr-defined]
    tried, inner = 0, hypothesis.inner_test

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal tried
        tried += 1
        return inner(*args, **kwargs)

    def run(**fixtures: Any) -> None:
        begin = time.monotonic()
        hypothesis.inner_test = counted
        try:
            while time.monotonic() < begin + SECONDS:
                test(**fixtures)
        finally:
            hypothesis.inner_test = inner
            print(f"{tried} examples in {time.monotonic() - begin:.0f} s")

    return run
