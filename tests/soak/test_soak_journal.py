"""The journal: whole lines, whatever happened to the process that wrote them."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from soaking import end_of, line_of

from echo_rt.errors import OutputError, StreamError
from echo_rt.soak.journal import JOURNAL_FILE, Past, read_lines
from echo_rt.utils.atomic_file import Log
from echo_rt.utils.checked_json import json_line


def line(first: int, last: int, *, run: int = 1, made: str = "x") -> dict[str, Any]:
    return line_of(first, last, run, hashes=[[block, f"{made}{block}"] for block in range(first, last + 1)])


def write(folder: Path, *lines: dict[str, Any]) -> None:
    journal = Log(folder / JOURNAL_FILE)
    for entry in lines:
        journal.append(json_line(entry))
    journal.close()


def test_lines_come_back(tmp_path: Path) -> None:
    write(tmp_path, line(0, 4))
    write(tmp_path, line(5, 9), end_of(1, 10))
    assert [entry.get("first_block") for entry in read_lines(tmp_path)] == [0, 5, None]
    assert list(read_lines(tmp_path / "nowhere")) == []


def test_a_torn_last_line_is_cut_off_wherever_it_tore(tmp_path: Path) -> None:
    write(tmp_path, line(0, 1), line(2, 400))  # the second is longer than a read from the end
    path = tmp_path / JOURNAL_FILE
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    assert len(whole) - first > 4096
    for end in (*range(first, len(whole), 97), len(whole) - 1):
        path.write_bytes(whole[:end])
        assert [entry["block"] for entry in read_lines(tmp_path)] == [1]
        write(tmp_path, line(2, 2, run=2))
        assert [entry["block"] for entry in read_lines(tmp_path)] == [1, 2]
    for end in range(first):
        path.write_bytes(whole[:end])
        write(tmp_path)
        assert path.read_bytes() == b""


@pytest.mark.parametrize("text", ["nonsense", "[]", "3", "{}", '{"run": 1'])
def test_a_line_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / JOURNAL_FILE).write_text(json.dumps(line(0, 1)) + f"\n{text}\n")
    with pytest.raises(StreamError, match="line 2: expected a line of a soak"):
        list(read_lines(tmp_path))


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """Files of at most ``size`` bytes, which the system cuts off as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    journal = Log(tmp_path / JOURNAL_FILE)
    with file_limit(2000), pytest.raises(OutputError, match=r"soak\.jsonl: cannot write: File too large"):
        for block in range(100):
            journal.append(json_line(line(block, block)))
    journal.close()
    text = (tmp_path / JOURNAL_FILE).read_bytes()
    assert text.endswith(b"\n") and 1500 < len(text) <= 2000
    assert [entry["block"] for entry in read_lines(tmp_path)] == list(range(text.count(b"\n")))


def test_half_a_line_is_taken_back(tmp_path: Path) -> None:
    journal = Log(tmp_path / JOURNAL_FILE)
    journal.append(json_line(line(0, 4)))
    with file_limit(journal.path.stat().st_size + 20), pytest.raises(OutputError, match="File too large"):
        journal.append(json_line(line(5, 9)))
    assert (tmp_path / JOURNAL_FILE).read_bytes().count(b"\n") == 1
    assert (tmp_path / JOURNAL_FILE).read_bytes().endswith(b"\n")
    journal.append(json_line(line(5, 9)))  # there is room again
    journal.close()
    assert [entry["block"] for entry in read_lines(tmp_path)] == [4, 9]


def test_a_file_that_another_program_writes_to_is_left_as_it_is(tmp_path: Path) -> None:
    journal = Log(tmp_path / JOURNAL_FILE)
    journal.append(json_line(line(0, 4)))
    with journal.path.open("ab") as other:
        other.write(b"x\n")
    before = journal.path.read_bytes()
    with pytest.raises(OutputError, match="cannot write: somebody removed, replaced or changed the file"):
        journal.append(json_line(line(5, 9)))
    journal.close()
    assert journal.path.read_bytes() == before


def test_the_past_of_a_resume(tmp_path: Path) -> None:
    assert (Past(tmp_path, 0).runs, Past(tmp_path, 0).hashes) == (0, {})
    write(tmp_path, line(0, 4), line(5, 9), end_of(1, 10, end="failed"), line(10, 11), line(10, 14, run=2, made="y"))
    past = Past(tmp_path, 10)
    assert (past.runs, past.frames, past.elapsed) == (2, 117, 10.0)
    assert past.hashes == {block: f"y{block}" for block in range(10, 15)}
    assert sorted(Past(tmp_path, 5).hashes) == list(range(5, 15))


def test_a_snapshot_beyond_the_journal_is_refused(tmp_path: Path) -> None:
    write(tmp_path, line(0, 4))
    with pytest.raises(StreamError, match="expected lines up to block 9, where the snapshot is; they end at 4"):
        Past(tmp_path, 10)
