"""``echo-rt serve`` as a process: what it prints, how it ends, and that it goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from serving import plain
from streaming import OTHER, PROMPT

from echo_rt.cli.main import main
from echo_rt.cli.serve import _ice_server, _is_loopback, _reached_as
from echo_rt.client import Live
from echo_rt.errors import ConfigError
from echo_rt.serve import server
from echo_rt.snapshot.snapshot import Snapshot
from echo_rt.weights.tiny_model import CHECKPOINT_FILE

LONG = 300.0  # seconds; only a deadlock takes that long
MOST_SECONDS = 5.0  # to end, on a machine that has nothing else to do


def command(model: Path, out: Path, *more: str) -> list[str]:
    files = ("--model", str(model), "--checkpoint", str(model / CHECKPOINT_FILE))
    place = ("--device", "cpu", "--port", "0", "--out", str(out))
    return [sys.executable, "-m", "echo_rt", "serve", *files, *place, "--prompt", PROMPT, *more]


@contextmanager
def process(model: Path, out: Path, *more: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The running command and its address."""
    started = subprocess.Popen(command(model, out, *more), stdout=subprocess.PIPE, text=True, env=os.environ)
    try:
        assert started.stdout is not None
        line = started.stdout.readline()
        found = re.match(r"serving at (http://\S+)", line)
        assert found is not None, line
        yield started, found[1].rstrip(",")
    finally:
        started.kill()
        started.communicate()


def end(started: subprocess.Popen[str]) -> str:
    """Ask it to end; returns what it still printed."""
    begin = time.monotonic()
    started.send_signal(signal.SIGTERM)
    said, _ = started.communicate(timeout=LONG)
    assert started.returncode == 128 + signal.SIGTERM
    assert time.monotonic() - begin < MOST_SECONDS or "ECHO_RT_LONG_SERVE" not in os.environ
    return said


def test_sigterm_closes_the_recording_and_resume_goes_on(small_model: Path, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    with process(small_model, tmp_path / "out") as (started, address), Live(address, timeout=LONG) as live:
        recording = live.post("/recordings")["name"]
        switch = live.prompt(OTHER)["block"]
        for event in live.events():
            if event["type"] == "block" and event["block"] > switch:
                break
        said = end(started)
    (name,) = re.findall(r"wrote the snapshot (\S+) in", said)
    with av.open(str(tmp_path / "out" / recording)) as video:
        assert len(list(video.decode(video=0))) >= 12
    state = Snapshot.load(tmp_path / "out" / f"{name}.safetensors")
    assert state.next_block > switch
    with process(small_model, tmp_path / "out", "--resume") as (started, address), Live(address, timeout=LONG) as live:
        first = next(event["block"] for event in live.events() if event["type"] == "block")
        assert live.get("/prompts")["prompts"][-1]["text"] == OTHER and first >= state.next_block
        said = end(started)
    (later,) = re.findall(r"wrote the snapshot (\S+) in", said)
    resumed = Snapshot.load(tmp_path / "out" / f"{later}.safetensors")
    held = resumed.held[0] if resumed.held else None
    if held is not None:
        assert held.frames.numpy().tobytes() == plain(small_model, held.index + 1, (switch, OTHER))[held.index]


def test_a_server_that_others_reach_has_a_token_and_its_folder_for_itself(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with process(small_model, tmp_path / "out", "--host", "0.0.0.0") as (started, address):
        base, _, token = address.partition("/?token=")
        assert len(token) >= 32
        assert base.startswith("http://127.0.0.1:"), "nobody can open 0.0.0.0"
        with Live(base, token=token) as live:
            assert live.get("/figures")["viewers"] == 0
        with Live(base) as live, pytest.raises(Exception, match="401"):
            live.get("/figures")
        assert main(command(small_model, tmp_path / "out")[3:]) == 2
        assert "another process writes into it" in capsys.readouterr().err
        end(started)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", ["127.0.0.1"]),
        ("localhost", ["localhost"]),
        ("0.0.0.0", ["127.0.0.1", "192.0.2.9"]),
        ("0", ["127.0.0.1", "192.0.2.9"]),
        ("::1", ["[::1]"]),
        ("::", ["[::1]", "[2001:db8::9]"]),
    ],
)
@pytest.mark.parametrize("reachable", [True, False])
def test_the_addresses_are_those_that_a_browser_opens(
    host: str, expected: list[str], reachable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Probe(socket.socket):
        def connect(self, address: object) -> None:
            if not reachable:
                raise OSError(101, "Network is unreachable")

        def getsockname(self) -> tuple[str, int]:
            return ("2001:db8::9" if self.family == socket.AF_INET6 else "192.0.2.9"), 1

    try:
        listener = server.listen(host, 0)
    except ConfigError:
        pytest.skip("this machine has no such address")
    with listener:
        monkeypatch.setattr(socket, "socket", Probe)
        assert _reached_as(host, listener) == expected[: None if reachable else 1]


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (("--port", "70000"), "--port: expected a port in 0..65535"),
        (("--viewers", "0"), "--viewers: expected an integer of 1 or more"),
        (("--megabits", "0"), "--megabits: expected a number above 0"),
        (("--host", "203.0.113.7"), "cannot serve at 203.0.113.7"),
        (("--token", ""), "--token: expected a text, got ''"),
        (("--prompt", " "), "expected a prompt of 1 to 2000 characters"),
        (("--memory", "off", "--out", "{model}"), "expected a folder apart from what is read"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    small_model: Path, tmp_path: Path, more: tuple[str, ...], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.format(model=small_model) for word in more]
    assert main([*command(small_model, tmp_path / "out")[3:], *words]) == 2
    said = capsys.readouterr().err
    assert error in said and said.rstrip().splitlines()[-1].startswith("echo-rt: error: ")
    assert list(tmp_path.iterdir()) == []


def test_addresses() -> None:
    assert [_is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "box")] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]
    with pytest.raises(ConfigError, match=r"--ice: expected stun:HOST:PORT .*, got 'foo'"):
        _ice_server("foo")
    assert _ice_server("stun:a.example:3478") == {"urls": "stun:a.example:3478"}
    turn = {"urls": "turn:a.example:3478?transport=tcp", "username": "ann", "credential": "p:w@d"}
    assert _ice_server("turn:ann:p:w@d@a.example:3478?transport=tcp") == turn


def test_json_output(small_model: Path, tmp_path: Path) -> None:
    started = subprocess.Popen(
        command(small_model, tmp_path / "out", "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    end_at = time.monotonic() + LONG
    while not (tmp_path / "out").exists() and time.monotonic() < end_at:
        time.sleep(0.05)
    started.send_signal(signal.SIGTERM)
    said, _ = started.communicate(timeout=LONG)
    report = json.loads(said)
    assert report["exit_code"] == started.returncode == 143
