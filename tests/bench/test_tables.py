"""Tables as text and as JSON, and the header they stand under."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from echo_rt.bench import environment
from echo_rt.bench.environment import COMMIT_VARIABLE, summary_line
from echo_rt.bench.tables import Column, markdown, write_results
from echo_rt.errors import ConfigError, TargetError


@dataclass
class Entry:
    name: str
    value: float | None
    good: bool = True


COLUMNS = (Column("name", "what", text=True), Column("value", "µs", ".1f"), Column("good", "ok", text=True))


def header() -> dict[str, object]:
    return environment.environment("cpu")


def test_a_table_is_aligned_and_is_markdown() -> None:
    text = markdown([Entry("a|b", 1234.56), {"name": "long name\nhere", "value": None, "good": False}], COLUMNS)
    lines = text.splitlines()
    assert lines == [
        "| what           |     µs | ok  |",
        "| -------------- | -----: | --- |",
        r"| a\|b           | 1234.6 | yes |",
        "| long name here |      - | no  |",
    ]


def test_rows_that_cannot_be_put_into_a_table() -> None:
    with pytest.raises(ConfigError, match="lacks 'value'; it has name"):
        markdown([{"name": "x"}], COLUMNS)
    with pytest.raises(ConfigError, match="a dataclass or a mapping, got tuple"):
        markdown([("x", 1)], COLUMNS)


def test_json_is_strict_and_has_the_header(tmp_path: Path) -> None:
    rows = [Entry("x", float("nan")), Entry("y", float("inf"))]
    text = write_results(tmp_path / "new", "t", "Title", header(), {"T": (rows, COLUMNS)}, ["a note"], fact=3)
    content = json.loads((tmp_path / "new" / "t.json").read_text(), parse_constant=pytest.fail)
    assert [row["value"] for row in content["tables"]["T"]] == [None, None]
    assert content["fact"] == 3 and content["notes"] == ["a note"]
    for name in ("date", "commit", "torch", "cuda", "cudnn", "echo_rt", "host", "gpu", "kernels"):
        assert name in content["environment"]
    assert (tmp_path / "new" / "t.md").read_text() == text and "a note" in text
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["t.json", "t.md"]


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "t.json").mkdir()
    (tmp_path / "t.md").write_text("before")
    with pytest.raises(TargetError):
        write_results(tmp_path, "t", "Title", header(), {"T": ([], COLUMNS)})
    assert (tmp_path / "t.md").read_text() == "before"


def test_a_header_says_what_it_does_not_know(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(COMMIT_VARIABLE, raising=False)
    monkeypatch.setattr(environment, "ROOT", tmp_path)  # no repository
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    facts = header()
    assert facts["commit"] is None and any(COMMIT_VARIABLE in line for line in facts["missing"])
    assert "commit unknown" in summary_line(facts)
    monkeypatch.setenv(COMMIT_VARIABLE, "abc123+dirty")
    assert header()["commit"] == "abc123+dirty" and "abc123+dirty" in summary_line(header())
