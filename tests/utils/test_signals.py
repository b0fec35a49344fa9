"""Stop requests: noted, raised, restored."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

import pytest

from echo_rt.utils.signals import StopNow, StopRequest


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)


def test_noted_by_default():
    with StopRequest() as stop:
        send(signal.SIGINT)
        send(signal.SIGINT)
        send(signal.SIGTERM)
        assert stop.request is not None and stop.request.exit_code == 143


def test_interruptible_raises_for_an_earlier_signal_too(capfd):
    with StopRequest() as stop:
        with pytest.raises(StopNow), stop.interruptible():
            send(signal.SIGINT)
            pytest.fail("went on")
        assert capfd.readouterr().err == "\necho-rt: stopping\n"
        with pytest.raises(StopNow), stop.interruptible():
            pytest.fail("went on")


def test_importing_ends_the_process_though_errors_are_swallowed():
    code = """
import os, signal
from echo_rt.utils.signals import StopRequest
with StopRequest(lambda request: print(request.reason, flush=True)) as stop:
    try:
        with stop.importing():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except BaseException:
                pass
            print("went on", flush=True)
    finally:
        print("cleaned up", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (143, "terminated\n")


def test_importing_is_over_at_its_end():
    with StopRequest() as stop:
        with stop.importing():
            pass
        with pytest.raises(StopNow), stop.interruptible():
            send(signal.SIGINT)


def swallowed() -> None:
    with contextlib.suppress(BaseException):
        send(signal.SIGINT)


def broken() -> None:
    swallowed()
    raise RecursionError


@pytest.mark.parametrize("work", [swallowed, broken])
def test_what_a_library_swallows_is_raised_at_the_end(work):
    with StopRequest() as stop, pytest.raises(StopNow), stop.interruptible():
        work()
    with StopRequest() as stop, pytest.raises(RecursionError), stop.interruptible():
        raise RecursionError


def test_after_block_raises_at_the_second(capfd):
    with StopRequest() as stop:
        with stop.after_block():
            send(signal.SIGINT)
        assert "stopping after this block" in capfd.readouterr().err
        assert stop.request is not None and stop.request.reason == "interrupted"
        with pytest.raises(StopNow), stop.after_block():
            send(signal.SIGTERM)
            pytest.fail("went on")
        send(signal.SIGINT)  # files are being closed: only noted


def test_the_message_has_no_reader(monkeypatch):
    """Standard error is closed: the handler must not raise in the middle of a block."""

    def closed(descriptor: int, data: bytes) -> int:
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr("echo_rt.utils.signals.os.write", closed)
    with StopRequest() as stop, stop.after_block():
        send(signal.SIGINT)
        assert stop.request is not None


def test_an_ignored_ctrl_c_is_taken_all_the_same():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for what a script puts into the background
    try:
        with StopRequest() as stop:
            send(signal.SIGINT)
            assert stop.request is not None and stop.request.reason == "interrupted"
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_handlers_come_back():
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    under_nohup = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        before = [signal.getsignal(signum) for signum in signals]
        with StopRequest():
            assert all(signal.getsignal(signum) != old for signum, old in zip(signals, before, strict=True))
        assert [signal.getsignal(signum) for signum in signals] == before
    finally:
        signal.signal(signal.SIGHUP, under_nohup)


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            send(signal.SIGHUP)
            assert stop.request is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_leaves_signals_alone():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work() -> None:
        with StopRequest() as stop, stop.interruptible():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
