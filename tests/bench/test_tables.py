"""Tables as text and as JSON, and the header they stand under."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from echo_rt.bench import tables
from echo_rt.bench.tables import COMMIT_VARIABLE, columns, environment, markdown, results, summary_line, write_results
from echo_rt.errors import ConfigError, TargetError


def entry(name: str, value: float) -> dict[str, object]:
    return {"name": name, "value": value, "good": True}


COLUMNS = columns("name|what", "value|µs|.1f", "good|ok")


def header() -> dict[str, object]:
    return environment("cpu")


def test_a_table_is_aligned_and_is_markdown() -> None:
    text = markdown([entry("a|b", 1234.56), {"name": "long name\nhere", "value": None, "good": False}], COLUMNS)
    lines = text.splitlines()
    assert lines == [
        "| what           |     µs | ok  |",
        "| -------------- | -----: | --- |",
        r"| a\|b           | 1234.6 | yes |",
        "| long name here |      - | no  |",
    ]


def test_a_row_that_cannot_be_put_into_a_table() -> None:
    with pytest.raises(ConfigError, match="lacks 'value'; it has name"):
        markdown([{"name": "x"}], COLUMNS)


def test_json_is_strict_and_has_the_header(tmp_path: Path) -> None:
    rows = [entry("x", float("nan")), entry("y", float("inf"))]
    found = results("Title", header(), {"T": (rows, COLUMNS)}, ["a note"], fact=3)
    text = write_results(tmp_path / "new", "t", *found)
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
        write_results(tmp_path, "t", *results("Title", header(), {"T": ([], COLUMNS)}))
    assert (tmp_path / "t.md").read_text() == "before"


def test_a_header_says_what_it_does_not_know(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(COMMIT_VARIABLE, raising=False)
    monkeypatch.setattr(tables, "ROOT", tmp_path)  # no repository
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    facts = header()
    assert facts["commit"] is None and any(COMMIT_VARIABLE in line for line in facts["missing"])
    assert "commit unknown" in summary_line(facts)
    monkeypatch.setenv(COMMIT_VARIABLE, "abc123+dirty")
    assert header()["commit"] == "abc123+dirty" and "abc123+dirty" in summary_line(header())


def test_a_gpu_is_described_by_torch_and_by_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the driver does not tell is None, and said to be missing."""
    board = SimpleNamespace(name="G", major=9, minor=0, multi_processor_count=132, L2_cache_size=1, total_memory=2)
    board.uuid = "abc"
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: board)
    said = {"nvidia-smi": "580.1, 1980, 2619, [N/A], 700.00, 31"}

    def output(*command: str) -> str:
        if command[0] in said:
            assert "--id=GPU-abc" in command
            return said[command[0]]
        raise FileNotFoundError(2, "No such file", command[0])

    monkeypatch.setattr(tables, "_output", output)
    found = environment("cuda:1")
    assert found["gpu"]["capability"] == "9.0" and found["gpu"]["driver"] == "580.1"
    assert (found["gpu"]["sm_clock_mhz"], found["gpu"]["power_limit_w"]) == (1980, 700)
    assert found["gpu"]["max_sm_clock_mhz"] is None and "max_sm_clock_mhz: [N/A]" in found["missing"]
    said.clear()
    found = environment("cuda")
    assert found["gpu"]["driver"] is None and any("driver, clocks and power" in line for line in found["missing"])
