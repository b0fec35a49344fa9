"""The file that remembers which attention was fastest: damaged, unwritable, written by several at once."""

from __future__ import annotations

import json
import logging
import multiprocessing
from pathlib import Path

import pytest

from echo_rt.attention import AttentionShapes, cache_file
from echo_rt.attention.select import CACHE
from echo_rt.autotune.cache import Case, Entry


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


def _write(path: Path, first: int, barrier) -> None:
    barrier.wait()
    for number in range(first, first + 10):
        CACHE.remember(path, entry(number))


def test_processes_that_write_at_once_lose_nothing(tmp_path):
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
