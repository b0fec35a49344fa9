"""The folder that remembers which attention was fastest: files damaged, unwritable, written by several at once."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
from pathlib import Path

import pytest
from fuzzing import ANYTHING, as_json, changed, damaged, one_line
from hypothesis import given
from hypothesis import strategies as st
from streaming import within

from echo_rt.attention import CACHE, AttentionShapes, cache_folder
from echo_rt.autotune.cache import Cache, Case, Entry
from echo_rt.errors import EchoError


def entry(number: int = 0, winner: str = "a") -> Entry:
    case = Case({"gpu": "Imaginary 9000", "kinds": {"a": None}}, "bfloat16", AttentionShapes(number, 2, 3, 4))
    return Entry(case, winner, {"a": 1.5, "b": 2.0}, {"c": "it is gone"})


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def file_of(folder: Path) -> Path:
    (path,) = folder.glob("*.json")
    return path


def test_there_and_back(tmp_path, caplog):
    folder = tmp_path / "new" / "attention"
    CACHE.remember(folder, entry(1))
    CACHE.remember(folder, entry(2))
    CACHE.remember(folder, entry(1, winner="b"))
    found = sorted(CACHE.entries(folder), key=lambda one: one.case.shapes.queries)
    assert found == [entry(1, winner="b"), entry(2)], "one for each case"
    assert CACHE.recall(folder, entry(2).case) == entry(2) and CACHE.recall(folder, entry(3).case) is None
    assert warnings_of(caplog) == []
    assert [path.suffix for path in folder.iterdir()] == [".json", ".json"], "no parts are left"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe nonsense",
        b"[]",
        b"{}",
        b'{"case": {}}',
        b'{"case": {}, "attention": "a", "milliseconds": {}, "rejected": {}}',
        b"[" * 100_000,
        pytest.param(None, id="cut short"),
    ],
)
def test_a_damaged_file_is_a_warning_and_is_replaced(tmp_path, caplog, content):
    CACHE.remember(tmp_path, entry(1))
    path = file_of(tmp_path)
    path.write_bytes(path.read_bytes()[:-20] if content is None else content)
    assert CACHE.recall(tmp_path, entry(1).case) is None
    (warning,) = warnings_of(caplog)
    assert str(path) in warning and "damaged" in warning and "\n" not in warning
    CACHE.remember(tmp_path, entry(1))
    assert CACHE.entries(tmp_path) == [entry(1)]


WHOLE = CACHE._fields(entry(1))


@given(content=(changed(WHOLE) | ANYTHING).map(as_json) | damaged(as_json(WHOLE)) | st.binary(max_size=100))
def test_whatever_is_in_the_file(tmp_path_factory, content):
    """It is what was measured, or it is measured again, with a warning of one line."""
    folder = tmp_path_factory.mktemp("cache")
    told = []
    cache = Cache("attention", AttentionShapes)
    cache._tell = lambda problem, when: told.append(problem)
    cache.remember(folder, entry(1))
    file_of(folder).write_bytes(content)
    for found in cache.entries(folder):
        assert isinstance(found.case.shapes, AttentionShapes) and isinstance(found.winner, str) and str(found)
    for problem in told:
        one_line(EchoError(problem))
    assert cache.recall(folder, entry(1).case) in (None, *cache.entries(folder))
    cache.remember(folder, entry(1))
    assert cache.recall(folder, entry(1).case) == entry(1)


def test_a_file_of_another_case_is_not_taken_for_its_own(tmp_path):
    CACHE.remember(tmp_path, entry(1))
    path = file_of(tmp_path)
    whole = path.read_bytes()
    path.unlink()
    CACHE.remember(tmp_path, entry(2))
    file_of(tmp_path).write_bytes(whole)
    assert CACHE.recall(tmp_path, entry(2).case) is None


def test_a_wrong_type_inside_is_damage(tmp_path, caplog):
    spoiled = [("attention", 5), ("milliseconds", {"a": "fast"}), ("rejected", {"c": 5}), ("surplus", 1), ("case", [])]
    spoiled += [("case", {"machine": [], "dtype": "", "shapes": {}}), ("milliseconds", None), ("rejected", [])]
    for field, value in spoiled:
        CACHE.remember(tmp_path, entry(1))
        path = file_of(tmp_path)
        path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
        caplog.clear()
        Cache("attention", AttentionShapes).entries(tmp_path)
        assert "damaged" in warnings_of(caplog)[0], field
        assert CACHE.entries(tmp_path) == [], field


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    folder = tmp_path / "attention"
    folder.write_text("in the way")
    assert CACHE.recall(folder, entry().case) is None
    CACHE.remember(folder, entry())
    (warning,) = warnings_of(caplog)
    assert str(folder) in warning and "cannot be written" in warning and "measured at every start" in warning


def test_a_write_that_fails_keeps_the_old_file(tmp_path, caplog, monkeypatch):
    CACHE.remember(tmp_path, entry(1))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        CACHE.remember(tmp_path, entry(1, winner="b"))
    assert CACHE.entries(tmp_path) == [entry(1)]
    assert "No space left on device" in warnings_of(caplog)[0]


@pytest.mark.parametrize("kind", ["folder", "link", "pipe", "device", "dangling"])
def test_what_is_no_plain_file_stays_as_it_is(tmp_path, caplog, kind):
    """Nothing is written through a link, a pipe is not waited for, and a warning says so once."""
    folder, elsewhere = tmp_path / "attention", tmp_path / "elsewhere"
    CACHE.remember(folder, entry(1))
    path = file_of(folder)
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else elsewhere)
    if kind == "link":
        elsewhere.write_text("somebody's own")

    def start() -> None:
        for _ in range(2):
            assert CACHE.recall(folder, entry(1).case) is None
            CACHE.remember(folder, entry(1))

    within(120, start)
    warnings = warnings_of(caplog)
    assert len(warnings) == len(set(warnings)) and all(str(path) in warning for warning in warnings)
    assert warnings[-1].endswith("attention is measured at every start")
    assert path.is_symlink() == (kind in ("link", "device", "dangling"))
    assert (elsewhere.read_text() if elsewhere.exists() else "") == ("somebody's own" if kind == "link" else "")


def test_a_hard_link_is_not_written_through(tmp_path):
    CACHE.remember(tmp_path, entry(1))
    path, other = file_of(tmp_path), tmp_path / "other"
    os.link(path, other)
    before = other.read_bytes()
    CACHE.remember(tmp_path, entry(1, winner="b"))
    assert other.read_bytes() == before and CACHE.entries(tmp_path) == [entry(1, winner="b")]


def _write(folder: Path, first: int, barrier) -> None:
    barrier.wait()
    for number in range(first, first + 10):
        CACHE.remember(folder, entry(number))


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    writers = [context.Process(target=_write, args=(tmp_path, first, barrier)) for first in (0, 5)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    assert sorted(item.case.shapes.queries for item in CACHE.entries(tmp_path)) == list(range(15))


def test_where_the_folder_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("ECHO_RT_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    assert cache_folder() == tmp_path / ".cache/echo-rt/attention"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, by its specification
    assert cache_folder() == tmp_path / ".cache/echo-rt/attention"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg/echo-rt/attention"
    monkeypatch.setenv("ECHO_RT_CACHE_DIR", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own/attention"


def test_without_a_home_nothing_is_remembered(monkeypatch):
    for variable in ("ECHO_RT_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)

    def homeless():
        raise RuntimeError("could not determine home directory")

    monkeypatch.setattr(Path, "home", homeless)
    assert cache_folder() is None
