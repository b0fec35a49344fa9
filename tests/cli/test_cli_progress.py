"""Progress lines."""

from __future__ import annotations

import errno
import io
import sys

import pytest

from echo_rt.cli import progress as module
from echo_rt.cli.progress import ProgressReport
from echo_rt.utils.wording import clock


@pytest.fixture
def time(monkeypatch):
    """A clock that the test turns."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(module.time, "monotonic", lambda: Clock.now)
    return Clock


def test_clock():
    assert [clock(seconds) for seconds in (0, 59.6, 61, 3600)] == ["0:00", "1:00", "1:01", "1:00:00"]


def test_plain_lines_come_now_and_then(time, capsys):
    report = ProgressReport(120, 16)
    for _ in range(10):
        time.now += 1
        report.block_done(12, "a fox")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "echo-rt: 1 block · 12/120 frames · 0:01 of video · 12.0 fps · 0:01 elapsed · 0:09 left · a fox",
        "echo-rt: 6 blocks · 72/120 frames · 0:04 of video · 12.0 fps · 0:06 elapsed · 0:04 left · a fox",
    ]
    assert (report.frames, report.blocks, report.elapsed) == (120, 10, 10)


def test_without_an_end_nothing_is_left(time, capsys):
    report = ProgressReport(None, 16)
    time.now += 1
    report.block_done(9, "a fox")
    assert capsys.readouterr().err == "echo-rt: 1 block · 9 frames · 0:01 of video · 9.0 fps · 0:01 elapsed · a fox\n"


def test_the_rate_is_that_of_late(time):
    report = ProgressReport(None, 16, quiet=True)
    for seconds in (60.0, *[0.5] * 16):
        time.now += seconds
        report.block_done(12, "")
    assert report.rate == pytest.approx(24)


def test_quiet(time, capsys):
    report = ProgressReport(10, 16, quiet=True)
    time.now += 1
    report.block_done(9, "a fox")
    report.close()
    assert capsys.readouterr().err == ""


class Unwritable(io.StringIO):
    """Standard error that takes ``left`` writes and then no more."""

    def __init__(self, left: int, terminal: bool) -> None:
        super().__init__()
        self.left, self.terminal = left, terminal

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.EIO, "Input/output error")
        return super().write(text)


@pytest.mark.parametrize("terminal", [False, True], ids=["plain", "live"])
def test_losing_standard_error_is_no_reason_to_end(time, monkeypatch, terminal):
    monkeypatch.setenv("TERM", "xterm")
    stderr = Unwritable(10**9, terminal)
    monkeypatch.setattr(sys, "stderr", stderr)
    output = sys.stdout
    report = ProgressReport(60, 16)
    report.block_done(9, "a fox")
    shown = stderr.getvalue()
    assert "9/60 frames" in shown
    stderr.left = 0
    for _ in range(3):
        time.now += 10
        report.block_done(12, "a fox")
    assert (report.frames, report.blocks) == (45, 4)
    report.close()
    assert stderr.getvalue() == shown
    assert sys.stderr is stderr and sys.stdout is output, "what the live line had put in their place is gone"


def test_standard_error_that_is_lost_before_the_first_line(monkeypatch):
    stderr = Unwritable(0, terminal=True)
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("TERM", "xterm")
    report = ProgressReport(60, 16)
    report.block_done(9, "a fox")
    report.close()
    assert report.frames == 9 and sys.stderr is stderr


def test_a_live_line_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    report = ProgressReport(18, 16)
    report.block_done(9, "a [bold]fox")
    report.close()
    report.close()
    text = terminal.getvalue()
    assert "9/18 frames" in text and "a [bold]fox" in text
    assert sys.stderr is terminal, "what the live line had put in its place is gone"
