"""Processes of ``echo-rt`` that need not import everything once more: forks of one that has, for tests that end them.

As a program, ``python lives.py``, it is that process: a request a line on standard input, and on standard output the
number of the process that was begun and, when it has ended, its exit code.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import termios
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

NO_READER = "a pipe without a reader"


class Life:
    """One process; ``out`` and ``err`` are what it has printed so far."""

    def __init__(self, server: subprocess.Popen[bytes], folder: Path) -> None:
        self._server, self._folder = server, folder
        self._code: int | None = None
        self.pid = int(self._answer(300) or -1)

    def _answer(self, seconds: float) -> bytes:
        assert self._server.stdout is not None
        ready, _, _ = select.select([self._server.stdout], [], [], seconds)
        return self._server.stdout.readline() if ready else b""

    def poll(self) -> int | None:
        """As of a ``Popen``."""
        return self.wait(0, expect=False)

    def wait(self, seconds: float = 300, *, expect: bool = True) -> int | None:
        """The exit code; below 0 for a signal. Fails where it has not ended by then, if that is expected."""
        if self._code is None and (answer := self._answer(seconds)):
            self._code = int(answer)
        assert self._code is not None or not expect, f"still there after {seconds} s: {self.err}"
        return self._code

    def send_signal(self, signum: int) -> None:
        os.kill(self.pid, signum)

    @property
    def out(self) -> str:
        return (self._folder / "out").read_text()

    @property
    def err(self) -> str:
        return (self._folder / "err").read_text()


class Lives(AbstractContextManager["Lives"]):
    """Begins processes, one at a time; their output goes into ``folder``."""

    def __init__(self, folder: Path) -> None:
        root = Path(__file__).parents[1]
        paths = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        self._folder = folder
        self._life: Life | None = None
        self._server = subprocess.Popen(
            [sys.executable, "-B", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=environment,
        )

    def begin(self, *arguments: str, fault: Sequence[Any] = (), terminal: str = "", output: str = "") -> Life:
        """``echo-rt ARGUMENTS``. ``fault``: name and block, of :mod:`faults`. ``terminal``: its controlling one."""
        assert self._life is None or self._life.poll() is not None, "the one before is still there"
        place = {"out": output or str(self._folder / "out"), "err": output or str(self._folder / "err")}
        request = {"arguments": arguments, "fault": list(fault), "terminal": terminal, **place}
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(request).encode() + b"\n")
        self._life = Life(self._server, self._folder)
        return self._life

    def kill(self) -> None:
        """End the process that a test may have left."""
        if self._life is not None and self._life.poll() is None:
            self._life.send_signal(signal.SIGKILL)
            self._life.wait()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(60)
        self._server.stdout.close()


def _place(request: dict[str, Any]) -> None:
    """Standard streams, and a session of its own, which is not under nohup though the tests may be."""
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if request["terminal"]:
        terminal = os.open(request["terminal"], os.O_RDWR)
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        descriptors = [terminal] * 3
    else:
        descriptors = [os.open(os.devnull, os.O_RDONLY)]
        for name in ("out", "err"):
            if request[name] == NO_READER:
                read, write = os.pipe()
                os.close(read)
                descriptors.append(write)
            else:
                descriptors.append(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC))
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    # Those of before know what they lead to: a file can be sought in, a pipe cannot.
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - for the rest of the process
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115


def _live(request: dict[str, Any], main: Callable[[list[str]], int]) -> NoReturn:
    import pytest
    from faults import FAULTS

    code = 70
    try:
        _place(request)
        if request["fault"]:
            name, block = request["fault"]
            FAULTS[name](pytest.MonkeyPatch(), block)
        code = main(request["arguments"])
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _serve() -> None:
    # What a life would import otherwise.
    import transformers

    import echo_rt.soak.session  # noqa: F401
    from echo_rt.cli.main import main

    assert transformers.AutoTokenizer and transformers.UMT5EncoderModel

    for line in sys.stdin.buffer:
        child = os.fork()
        if child == 0:
            _live(json.loads(line), main)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
