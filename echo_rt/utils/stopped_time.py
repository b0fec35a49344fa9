"""How long this process could not run: stopped by a signal, a debugger, or a machine that gave it no time at all."""

from __future__ import annotations

import threading
import time

_TICK = 0.25  # seconds
_LEAST = 1.0  # seconds without a tick that are no stop: a busy machine, a call that holds the interpreter's lock


class StoppedTime:
    """Counts the gaps between ticks that are longer than a second and in which the process did not compute either."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._last: tuple[float, float] | None = None
        self._lock = threading.Lock()

    def tick(self, now: float, used: float) -> float:
        """Take in the time ``now`` and the ``used`` time of processors; return all stopped seconds so far."""
        with self._lock:
            before, used_before = self._last or (now, used)
            self._last = now, used
            if now - before > _LEAST:
                self.seconds += max(0.0, now - before - _TICK - (used - used_before))
            return self.seconds


_clock = StoppedTime()
_ticking: threading.Thread | None = None
_starting = threading.Lock()


def stopped_seconds() -> float:
    """Seconds that this process was stopped since the first call, which starts the thread that notices it."""
    global _ticking
    with _starting:
        if _ticking is None or not _ticking.is_alive():  # which it is not in a forked process
            _ticking = threading.Thread(target=_tick, name="echo-rt stopped time", daemon=True)
            _ticking.start()
    return _clock.tick(time.monotonic(), time.process_time())


def _tick() -> None:
    while True:
        time.sleep(_TICK)
        _clock.tick(time.monotonic(), time.process_time())
