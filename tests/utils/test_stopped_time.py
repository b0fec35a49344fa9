"""Time in which a process was stopped."""

from __future__ import annotations

import threading

from echo_rt.utils.stopped_time import StoppedTime, stopped_seconds


def test_only_long_gaps_without_work_are_stops() -> None:
    clock = StoppedTime()
    assert clock.tick(100.0, 5.0) == 0, "what was before the first tick is unknown"
    assert clock.tick(100.9, 5.0) == 0, "a busy machine"
    assert clock.tick(160.9, 5.0) == 59.75
    assert clock.tick(170.9, 15.0) == 59.75, "it held the interpreter's lock and computed"
    assert clock.tick(180.9, 18.0) == 59.75 + 6.75


def test_one_thread_notices_it() -> None:
    assert stopped_seconds() >= 0 and stopped_seconds() >= 0
    assert [thread.daemon for thread in threading.enumerate() if thread.name == "echo-rt stopped time"] == [True]
