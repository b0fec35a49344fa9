"""The report and its pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from echo_rt.errors import BackendError
from echo_rt.soak import SoakConfig, report
from echo_rt.soak.checks import Status, Verdict
from echo_rt.soak.journal import Journal
from echo_rt.soak.report import Curve, History, write_report

VERDICTS = [Verdict("finite", Status.KEPT, "none", "a|b"), Verdict("drift", Status.BROKEN, "1", "block 9: 3")]


def line(begin: int, run: int = 1, **changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "run": run,
        "first_block": begin,
        "block": begin + 9,
        "blocks": 10,
        "frame": 12 * (begin + 10) - 3,
        "video_seconds": 10.0,
        "elapsed": 0.1 * begin,
        "fps": 16.5,
        "latency": {
            "p50": 300.0 + begin,
            "p99": 310.0,
            "max": 320.0 + begin,
            "max_block": begin,
            "bins": {"-1204": 10},
        },
        "switch_latency": {"blocks": 2, "max": 400.0},
        "device": {"allocated": 3 * 2**30, "reserved": 4 * 2**30},
        "host": {"rss": 2**30},
        "latents": {"mean": 0.1, "std": 1.0},
        "snapshots": {"written": 3, "skipped": 1, "stall": 4.25},
    }
    return made | changes


END = {"run": 2, "block": 60, "end": "failed", "elapsed": 7200.0, "failure": "RuntimeError: gone", "problem": None}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    journal = Journal(tmp_path)
    for entry in [*(line(begin) for begin in range(0, 50, 10)), *(line(begin, 2) for begin in (30, 40, 50)), END]:
        journal.append(entry)
    journal.close()
    return tmp_path


def config(folder: Path, **changes: Any) -> SoakConfig:
    return SoakConfig(model="m", out=str(folder), blocks=100, **changes)


def test_the_report_says_what_happened(folder: Path) -> None:
    text = write_report(config(folder, plots=False), VERDICTS, END).read_text()
    assert text.startswith("# Soak: failed after 60 blocks\n\nThe stream failed before block 60: RuntimeError: gone\n")
    assert "| finite | **kept** | none | a\\|b |" in text and "| drift | **broken** | 1 | block 9: 3 |" in text
    for row in (
        "| processes | 2 |",
        "| blocks, including those made again | 80 |",
        "| hours of streaming | 2.000 |",
        "| video frames | 717 |",
        "| block latency p50 after warm-up | 300.3 ms |",
        "| longest block, including warm-up | 370.0 ms (block 50) |",
        "| blocks around prompt switches | 16, the longest 400.0 ms |",
        "| snapshots of the last process | 3 written, 1 skipped |",
        "| longest stall by a snapshot | 4.2 ms |",
    ):
        assert row in text
    assert "Left out, as asked." in text and '"blocks": 100' in text
    assert not list(folder.glob("*.png"))


def test_what_was_not_the_streams_fault(tmp_path: Path) -> None:
    end = END | {"failure": None, "problem": "OutputError: disk full"}
    text = write_report(config(tmp_path), [], end).read_text()
    assert "OutputError: disk full" in text and "The stream failed" not in text


def test_a_soak_without_a_line_has_a_report(tmp_path: Path) -> None:
    end = END | {"block": 0, "end": "interrupted", "failure": None, "elapsed": 0.0}
    text = write_report(config(tmp_path), [], end).read_text()
    assert text.startswith("# Soak: interrupted after 0 blocks\n")


def test_pictures(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    text = write_report(config(folder), VERDICTS, END).read_text()
    for name in ("latency.png", "memory.png", "latents.png"):
        assert f"]({name})" in text
        assert (folder / name).read_bytes().startswith(b"\x89PNG") and (folder / name).stat().st_size > 5000


def test_pictures_without_matplotlib(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "can_plot", lambda: False)
    text = write_report(config(folder), VERDICTS, END).read_text()
    assert "Left out: plots need matplotlib, which is not installed: pip install 'echo-rt[soak]'" in text
    with pytest.raises(BackendError, match="matplotlib"):
        report.require_matplotlib()


def test_curves_are_those_of_the_blocks_that_stayed() -> None:
    lines = [*(line(begin) for begin in range(0, 50, 10)), *(line(begin, 2) for begin in (30, 40)), END]
    lines[-3]["latency"]["max"] = 999.0
    history = History()
    for entry in lines:
        history.see(entry)
    assert history.resumes == [30]
    assert history.curves[2].points == [(9, 320.0), (19, 330.0), (29, 340.0), (39, 999.0), (49, 360.0)]
    assert [len(curve.points) for curve in history.curves[3:]] == [5] * 5


def test_a_long_curve_keeps_its_peaks() -> None:
    curve = Curve("longest", lambda line: None)
    for x in range(100_001):
        curve.add(float(x), 500.0 if x == 77_777 else 1.0)
    assert len(curve.points) <= 4096
    assert max(y for _, y in curve.points) == 500.0
    assert curve.points[0][0] == 0 and curve.points[-1][0] > 99_900
    assert [x for x, _ in curve.points] == sorted(x for x, _ in curve.points)
