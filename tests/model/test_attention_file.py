"""The file that remembers which attention was fastest: damaged, unwritable, written by several at once."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fuzzing import ANYTHING, as_json, changed, damaged, one_line
from hypothesis import given
from hypothesis import strategies as st
from streaming import within

from echo_rt.attention import CACHE, AttentionShapes, cache_file
from echo_rt.autotune.cache import Cache, Case, Entry
from echo_rt.errors import EchoError


def entry(number: int = 0, winner: str = "a") -> Entry:
    case = Case({"gpu": "Imaginary 9000", "kinds": {"a": None}}, "bfloat16", AttentionShapes(number, 2, 3, 4))
    return Entry(case, winner, {"a": 1.5, "b": 2.0}, {"c": "it is gone"})


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_there_and_back(tmp_path, caplog):
    path = tmp_path / "new" / "folder" / "attention.json"
    CACHE.remember(path, entry(1))
    CACHE.remember(path, entry(2))
    CACHE.remember(path, entry(1, winner="b"))
    assert CACHE.entries(path) == [entry(2), entry(1, winner="b")], "one for each case"
    assert CACHE.recall(path, entry(2).case) == entry(2) and CACHE.recall(path, entry(3).case) is None
    assert warnings_of(caplog) == []
    assert sorted(p.name for p in path.parent.iterdir()) == ["attention.json", "attention.lock"], "no parts are left"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe nonsense",
        b"[]",
        b"{}",
        b'{"format": 2, "entries": []}',
        b'{"format": 1, "entries": 5}',
        b'{"format": 1, "entries": [{"case": {}}]}',
        b'{"format": 1, "entries": [{"case": {}, "attention": "a", "milliseconds": {}, "rejected": {}}]}',
        b"[" * 100_000,
        pytest.param(None, id="cut short"),
    ],
)
def test_a_damaged_file_is_a_warning_and_is_replaced(tmp_path, caplog, content):
    path = tmp_path / "attention.json"
    CACHE.remember(path, entry(1))
    path.write_bytes(path.read_bytes()[:-20] if content is None else content)
    assert CACHE.recall(path, entry(1).case) is None
    (warning,) = warnings_of(caplog)
    assert str(path) in warning and "is damaged" in warning and "\n" not in warning
    CACHE.remember(path, entry(2))
    assert CACHE.entries(path) == [entry(2)]


WHOLE = {"format": 1, "entries": [CACHE._fields(entry(number)) for number in (1, 2)]}


@given(content=(changed(WHOLE) | ANYTHING).map(as_json) | damaged(as_json(WHOLE)) | st.binary(max_size=100))
def test_whatever_is_in_the_file(tmp_path_factory, content):
    """It is what was measured, or it is measured again, with a warning of one line."""
    path = tmp_path_factory.mktemp("cache") / "attention.json"
    path.write_bytes(content)
    told = []
    cache = Cache("attention", AttentionShapes)
    cache._tell = lambda problem, when: told.append(problem)
    for found in cache.entries(path):
        assert isinstance(found.case.shapes, AttentionShapes) and isinstance(found.winner, str) and str(found)
    for problem in told:
        one_line(EchoError(problem))
    cache.remember(path, entry(3))
    assert cache.recall(path, entry(3).case) == entry(3)


def test_a_wrong_type_inside_is_damage(tmp_path, caplog):
    path = tmp_path / "attention.json"
    spoiled = [("attention", 5), ("milliseconds", {"a": "fast"}), ("rejected", {"c": 5}), ("surplus", 1), ("case", [])]
    spoiled += [("case", {"machine": [], "dtype": "", "shapes": {}}), ("milliseconds", None), ("rejected", [])]
    for field, value in spoiled:
        CACHE.remember(path, entry(1))
        content = json.loads(path.read_text())
        content["entries"][0][field] = value
        path.write_text(json.dumps(content))
        caplog.clear()
        assert CACHE.entries(path) == [], field
        assert "is damaged" in warnings_of(caplog)[0]


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    path = tmp_path / "file" / "attention.json"
    assert CACHE.recall(path, entry().case) is None
    caplog.clear()
    CACHE.remember(path, entry())
    (warning,) = warnings_of(caplog)
    assert str(path) in warning and "cannot be written" in warning and "measured at every start" in warning


def test_a_folder_in_place_of_the_file(tmp_path, caplog):
    path = tmp_path / "attention.json"
    path.mkdir()
    CACHE.remember(path, entry())
    assert CACHE.entries(path) == []
    assert any("cannot be read" in warning for warning in warnings_of(caplog))
    assert any("measured at every start" in warning for warning in warnings_of(caplog))


def test_a_write_that_fails_keeps_the_old_file(tmp_path, caplog, monkeypatch):
    path = tmp_path / "attention.json"
    CACHE.remember(path, entry(1))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        CACHE.remember(path, entry(2))
    assert CACHE.entries(path) == [entry(1)]
    assert "No space left on device" in warnings_of(caplog)[0]


@pytest.mark.parametrize("kind", ["link", "pipe", "device", "dangling"])
@pytest.mark.parametrize("name", ["attention.json", "attention.lock"])
def test_what_is_no_plain_file_stays_as_it_is(tmp_path, caplog, name, kind):
    """Nothing is written through a link, a pipe is not waited for, and one warning says so, however many shapes."""
    path, elsewhere = tmp_path / "attention.json", tmp_path / "elsewhere"
    if kind == "link":
        CACHE.remember(elsewhere, entry(1))
    before = elsewhere.read_bytes() if kind == "link" else None
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to("/dev/zero" if kind == "device" else elsewhere)

    def start() -> None:
        for number in (1, 2):
            assert CACHE.recall(path, entry(number).case) is None
            CACHE.remember(path, entry(number))

    within(120, start)
    (warning,) = warnings_of(caplog)
    assert warning.startswith(str(path)) and warning.endswith("attention is measured at every start")
    found = {"pipe": "found a pipe", "device": "found a device"}.get(kind, "it is a symbolic link")
    assert found in warning
    assert not (tmp_path / name).is_file() or (tmp_path / name).is_symlink()
    assert before == (elsewhere.read_bytes() if elsewhere.exists() else None)
    if name.endswith("lock"):
        assert not path.exists()


def test_a_hard_link_is_not_written_through(tmp_path, caplog):
    path, other = tmp_path / "attention.json", tmp_path / "other"
    CACHE.remember(path, entry(1))
    os.link(path, other)
    before = other.read_bytes()
    CACHE.remember(path, entry(2))
    assert other.read_bytes() == before and CACHE.entries(path) == [entry(1), entry(2)]


def test_a_lock_that_a_stopped_process_holds_does_not_hang_a_start(tmp_path, caplog, monkeypatch):
    path = tmp_path / "attention.json"
    CACHE.remember(path, entry(1))
    monkeypatch.setattr("echo_rt.autotune.cache._LOCK_SECONDS", 0.1)
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(path.with_suffix(".lock"))], stdout=subprocess.PIPE) as it:
        assert it.stdout.readline() == b"locked\n"
        it.send_signal(signal.SIGSTOP)
        try:
            for number in (2, 3):
                assert CACHE.recall(path, entry(number).case) is None
                within(120, lambda number=number: CACHE.remember(path, entry(number)))
            (warning,) = warnings_of(caplog)
            assert "another process has held its lock for 0.1 s" in warning and "at every start" in warning
            assert CACHE.entries(path) == [entry(1)], "what is there is still read"
        finally:
            it.kill()


HOLDER = """
import fcntl, sys, time
with open(sys.argv[1], "a") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    print("locked", flush=True)
    time.sleep(600)
"""


def _write(path: Path, first: int, barrier) -> None:
    barrier.wait()
    for number in range(first, first + 10):
        CACHE.remember(path, entry(number))


def test_processes_that_write_at_once_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("echo_rt.autotune.cache._LOCK_SECONDS", 600)  # however busy the machine
    path = tmp_path / "attention.json"
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    writers = [context.Process(target=_write, args=(path, first, barrier)) for first in (0, 10)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    assert sorted(item.case.shapes.queries for item in CACHE.entries(path)) == list(range(20))


def test_where_the_file_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("ECHO_RT_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    assert cache_file() == tmp_path / ".cache/echo-rt/attention.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, by its specification
    assert cache_file() == tmp_path / ".cache/echo-rt/attention.json"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_file() == tmp_path / "xdg/echo-rt/attention.json"
    monkeypatch.setenv("ECHO_RT_CACHE_DIR", str(tmp_path / "own"))
    assert cache_file() == tmp_path / "own/attention.json"


def test_without_a_home_nothing_is_remembered(monkeypatch):
    for variable in ("ECHO_RT_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)

    def homeless():
        raise RuntimeError("could not determine home directory")

    monkeypatch.setattr(Path, "home", homeless)
    assert cache_file() is None
