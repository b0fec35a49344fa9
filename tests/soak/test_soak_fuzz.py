"""Journals and manifests that nobody's soak wrote: each is read, or refused in one line."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from fuzzing import ANYTHING, one_line
from hypothesis import example, given
from hypothesis import strategies as st
from soaking import end_of, line_of

from echo_rt.errors import ConfigError, StreamError
from echo_rt.soak import Limits, SoakConfig
from echo_rt.soak.config import MANIFEST_FILE, check_manifest
from echo_rt.soak.journal import JOURNAL_FILE, Past, read_lines
from echo_rt.soak.report import REPORT_FILE, History, write_report
from echo_rt.utils.atomic_file import Log, PartFile

GPU = {"device": {"allocated": 1, "reserved": 2}, "gpu": {"ecc_uncorrected": 0}}
TAKEN = {"snapshots": {"written": 1, "skipped": 0, "stall": 4.0}, "hashes": [[10, "a"]], "mismatches": [[10, "a", "b"]]}
LINES = [
    line_of(0, 9),
    line_of(10, 149, **GPU, **TAKEN),
    end_of(1, 150, end="failed", failure="RuntimeError: gone"),
    line_of(100, 299, 2, rollbacks=1, **GPU, **TAKEN),
    end_of(2, 300, replayed=3, backend="torch", backend_reason="x", taken={"recipe": "r", "recipe_reason": None}),
]


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of every entry of every line."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [found for name, each in inner for found in paths(each, (*path, name))]


def changed(path: tuple[Any, ...], value: Any) -> str:
    lines: Any = copy.deepcopy(LINES)
    place = lines
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return "".join(json.dumps(line) + "\n" for line in lines)


def check(text: bytes) -> bool:
    """Whether the journal is read; all that reads it does it."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / JOURNAL_FILE).write_bytes(text)
        history, last = History(Limits(latency_ratio=1.05, drift=0.1).resolved("cuda"), "CPU"), None
        try:
            for line in read_lines(folder):
                history.see(line)
                last = line
            for block in (0, 100):
                Past(folder, block)
        except StreamError as error:
            one_line(error)
            return False
        Log(folder / JOURNAL_FILE).close()
        assert (folder / JOURNAL_FILE).read_bytes() == text[: text.rfind(b"\n") + 1]
        if last is not None and "end" in last:
            config = SoakConfig(model="m", out=name, blocks=1, plots=False)
            write_report(config, history, last, PartFile(folder / REPORT_FILE))
        return True


def test_what_is_changed_is_a_journal() -> None:
    assert check(changed((0, "run"), 1).encode())


@given(st.sampled_from(paths(LINES)), ANYTHING)
@example((1, "mismatches"), [[1]])
@example((1, "mismatches"), 3)
@example((1, "hashes"), [["1", 2]])
@example((1, "latency", "bins"), {"x": 1})
@example((1, "latency", "bins"), {str(10**9): 1})
@example((1, "latency", "bins"), {"-1387": -1})
@example((1, "latency", "max"), None)
@example((1, "position", "misplaced"), [5])
@example((1, "position", "misplaced"), "x")
@example((1, "position"), None)
@example((1, "zscore", "max"), "x")
@example((1, "block"), 10**400)
@example((1, "run"), None)
@example((3, "rollbacks"), "1")
@example((3, "elapsed"), float("nan"))
@example((3, "host"), [])
@example((1, "warm"), "no")
@example((4, "failure"), 7)
@example((4, "taken"), {"recipe": 7})
@example((4, "end"), None)
@example((0,), [])
@example((0,), {"blocks": 1})
@example((0,), {"end": "x\n| y"})
def test_an_entry_is_anything(path: tuple[Any, ...], value: Any) -> None:
    try:
        text = changed(path, value).encode("utf-8", "surrogatepass")
    except ValueError:  # a number that is too long to be written
        return
    check(text)


@given(st.binary(max_size=200), st.integers(0, 2000))
@example(b"\n", 0)
@example(b"[" * 100_000 + b"\n", 0)
@example(b'{"blocks":' + b"[" * 2000 + b"\n", 0)
@example(b"\x00\xff\n", 0)
@example(b"torn", 0)
def test_bytes_are_anything(noise: bytes, at: int) -> None:
    text = changed((0, "run"), 1).encode()
    check(text[:at] + noise + text[at:])
    check(noise)


@given(ANYTHING | st.builds(lambda value: {"config": value}, ANYTHING | st.dictionaries(st.text(max_size=8), ANYTHING)))
@example({"config": {"blocks": {}}})
@example({"config": {"blocks": "9"}})
@example({"config": {"\n": []}})
@example({"config": {str(key): "y" * 3000 for key in range(9)}})
@example({"config": 3})
@example({"config": {}, "format": 2})
@example({"config": {"blocks": float("nan")}})
@example([])
def test_a_manifest_is_anything(value: Any) -> None:
    with TemporaryDirectory() as name:
        config = SoakConfig(model="m", out=name, blocks=10)
        if isinstance(value, dict) and isinstance(value.get("config"), dict):
            value = {"config": config.settings() | value["config"]} | {k: v for k, v in value.items() if k != "config"}
        try:
            text = json.dumps(value).encode()
        except ValueError:
            return
        Path(name, MANIFEST_FILE).write_bytes(text)
        try:
            check_manifest(config)
        except ConfigError as error:
            one_line(error)


def test_a_line_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not read into memory as a whole."""
    monkeypatch.setattr("echo_rt.soak.journal._LONGEST", 10)
    (tmp_path / JOURNAL_FILE).write_bytes(b"x" * 11)
    with pytest.raises(StreamError, match="line 1: expected a line of a soak, found one without an end"):
        list(read_lines(tmp_path))
