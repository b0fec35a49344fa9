"""What tests of feeds share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

LONG = 300.0  # seconds; only a deadlock takes that long


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def feed_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "echo_rt feed"]
