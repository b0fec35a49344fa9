"""The report, its page and its plots."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from soaking import end_of, line_of

from echo_rt.soak import Limits, SoakConfig, report
from echo_rt.soak.journal import Line
from echo_rt.soak.report import REPORT_FILE, History, write_report
from echo_rt.utils.atomic_file import PartFile

MIB = 2**20
END = end_of(2, 60, end="failed", elapsed=7200.0, failure="RuntimeError: gone|away [x](http://y)")


def line(begin: int, run: int = 1, **changes: Any) -> Line:
    made: Line = {
        "warm": begin not in (0, 30) or (run == 1 and begin > 0),
        "latency": {
            "p50": 300.0 + begin,
            "p99": 310.0,
            "max": 320.0 + begin,
            "max_block": begin,
            "bins": {"-1204": 10},
        },
        "switch_latency": {"blocks": 2, "max": 400.0},
        "device": {"allocated": 3 * 2**30, "reserved": 4 * 2**30},
        "host": {"rss": 400 * MIB + begin * MIB // 30},
        "snapshots": {"written": 3, "skipped": 1, "stall": 4.25},
    }
    return line_of(begin, begin + 9, run, **(made | changes))


LINES = [*(line(begin) for begin in range(0, 50, 10)), *(line(begin, 2) for begin in (30, 40, 50)), END]


def config(folder: Path, **changes: Any) -> SoakConfig:
    return SoakConfig(model="m", out=str(folder), blocks=100, **changes)


def history_of(lines: list[Line], limits: Limits = Limits()) -> History:  # noqa: B008
    history = History(limits.resolved("cpu"), "CPU")
    for entry in lines:
        history.see(entry)
    return history


def report_of(folder: Path, lines: list[Line] = LINES, limits: Limits = Limits(), **changes: Any) -> str:  # noqa: B008
    given = config(folder, limits=limits, **changes)
    write_report(given, history_of(lines, limits), lines[-1], PartFile(folder / REPORT_FILE))
    return (folder / REPORT_FILE).read_text()


def test_the_report_says_what_happened(tmp_path: Path) -> None:
    text = report_of(tmp_path, plots=False)
    failed = "The stream failed before block 60: RuntimeError: gone\\|away \\[x](http://y)\n"
    assert text.startswith(f"# Soak: failed after 60 blocks\n\n{failed}")
    assert "| stream | **broken** | no failure | block 60: RuntimeError: gone\\|away" in text
    assert "| finite | **kept** | 0 NaN or infinite values, no rollback | none in 80 blocks |" in text
    for row in (
        "| processes | 2 |",
        "| blocks, including those made again | 80 |",
        "| blocks made again | 20 |",
        "| hours of streaming | 2.000 |",
        "| video frames | 717 |",
        "| block latency p50 after warm-up | 300.2 ms |",
        "| longest block, including warm-up | 370.0 ms (block 50) |",
        "| blocks around prompt switches | 16, the longest 400.0 ms |",
        "| snapshots of the last process | 3 written, 1 skipped |",
        "| longest stall by a snapshot | 4.2 ms |",
    ):
        assert row in text
    assert "Left out, as asked." in text and '"blocks": 100' in text
    assert not list(tmp_path.glob("*.svg"))


def test_blocks_made_again_are_counted_alike(tmp_path: Path) -> None:
    """After a resume and at the end of the soak: in the figures and in the promises."""
    lines = [*LINES[:-1], end_of(2, 60, compared=3, replayed=5)]
    lines[6] = line(40, 2, compared=4)
    text = report_of(tmp_path, lines, plots=False)
    assert "| blocks, including those made again | 85 |" in text and "| blocks made again | 25 |" in text
    assert "made: 85 blocks, 25 of them made again" in text and "none in 85 blocks" in text
    assert "| 7 of 25 blocks made again had a hash, which is the same |" in text


@pytest.mark.parametrize(
    ("changes", "until"),
    [
        ({}, "a warm-up: 10 blocks. "),
        ({"prompts": ("a", "b"), "switch_every": 5}, "a warm-up: 10 blocks, its first prompt switch. "),
        ({"snapshot_every": 5}, "a warm-up: 10 blocks, its first snapshot. "),
    ],
)
def test_the_warm_up_is_explained(changes: dict[str, Any], until: str, tmp_path: Path) -> None:
    assert until in report_of(tmp_path, plots=False, **changes)


def test_what_was_not_the_streams_fault(tmp_path: Path) -> None:
    text = report_of(tmp_path, [end_of(1, 0, problem="OutputError: disk full")])
    assert "OutputError: disk full" in text and "The stream failed" not in text


def test_a_soak_without_a_line_has_a_report(tmp_path: Path) -> None:
    text = report_of(tmp_path, [end_of(1, 0, end="interrupted")])
    assert text.startswith("# Soak: interrupted after 0 blocks\n")


class Page(HTMLParser):
    """What a page refers to, and whether its elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.outside += [str(v) for k, v in attrs if k in ("src", "href", "xlink:href") and not str(v).startswith("#")]


def test_the_page_needs_no_other_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report_of(tmp_path, prompts=("a</script><b>", "b"), switch_every=5, snapshot_every=20)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.outside == [] and not {"script", "link", "img", "b"} & set(page.tags)
    assert page.tags.count("svg") == 3 and page.tags.count("table") == 2 and page.tags.count("h2") == 4
    assert "url(http" not in text and "@import" not in text


def drawn(path: Path) -> tuple[str, xml.etree.ElementTree.Element]:
    text = path.read_text()
    return text, xml.etree.ElementTree.fromstring(text)


def test_plots_show_thresholds_and_marks(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    limits = Limits(latency_ratio=1.05, drift=0.5)
    text = report_of(tmp_path, limits=limits, prompts=("a", "b"), switch_every=5, snapshot_every=20)
    history = history_of(LINES, limits)
    for name, panels in {"latency.svg": 1, "memory.svg": 2, "latents.svg": 2}.items():
        assert f"]({name})" in text
        picture, root = drawn(tmp_path / name)
        ids = [element.get("id", "") for element in root.iter()]
        assert sum(bool(re.fullmatch(r"axes_\d+", name)) for name in ids) == panels
        # Two processes in each panel: their warm-up, their beginning, their threshold.
        assert picture.count("stroke-dasharray") >= 4 * panels, "no thresholds or restarts"
        assert picture.count("opacity: 0.15") == 2 * panels, "no warm-up"
        assert len(re.findall(r"<use ", picture)) >= 13 * panels, "no switches or snapshots"
    assert history.thresholds(LINES[1])["latency"] == pytest.approx((300.2, 15.0, 0.0), abs=0.1)
    assert history.thresholds(LINES[1])["host"] == (LINES[1]["host"]["rss"], 32 * MIB, 1024.0)
    assert history.thresholds(LINES[1])["std"] == (1.0, 0.5, 0.0)


def test_a_small_change_is_no_cliff(tmp_path: Path) -> None:
    """1.8 MiB of 400: the axis begins at 0, and the threshold is in the picture."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    history = history_of(LINES)
    axis: Any = Figure().subplots()
    report._draw(axis, report.PICTURES["memory.svg"][1][1], config(tmp_path), history)
    low, high = axis.get_ylim()
    assert low == 0 and 432 < high < 600
    report._draw(axis, report.PICTURES["latents.svg"][1][0], config(tmp_path), history)
    low, high = axis.get_ylim()
    assert high - low >= 1.0, "less than a standard deviation"


def test_few_marks_of_a_long_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    lines = [line_of(begin, begin + 999, run) for run, begin in enumerate(range(0, 1_000_000, 1000), 1)]
    report_of(tmp_path, [*lines, end_of(1000, 10**6)], prompts=("a", "b"), switch_every=7, snapshot_every=9)
    assert all(file.stat().st_size < 2**20 for file in tmp_path.iterdir())


def test_pictures_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = report_of(tmp_path)
    assert "Left out: --plots needs the package matplotlib: " in text and "(pip install matplotlib); then give" in text


def test_curves_are_those_of_the_blocks_that_stayed() -> None:
    lines = [*(line(begin) for begin in range(0, 50, 10)), *(line(begin, 2) for begin in (30, 40)), END]
    lines[-3] = line(30, 2, latency=lines[-3]["latency"] | {"max": 999.0})
    history = history_of(lines)
    assert [life.first for life in history.lives] == [0, 30]
    points = list(history.points.values())
    assert points[2] == [(9, 320.0), (19, 330.0), (29, 340.0), (39, 999.0), (49, 360.0)]
    assert list(map(len, points[3:])) == [5] * 5


def test_a_long_curve_keeps_its_peaks() -> None:
    history = History(Limits().resolved("cpu"), "CPU")
    quiet, peak = ({"p50": 1.0, "p99": 1.0, "max": high, "max_block": 0, "bins": {}} for high in (1.0, 500.0))
    for x in range(20_001):
        history.see(line_of(x, x, latency=peak if x == 7_777 else quiet))
    points = next(points for curve, points in history.points.items() if curve.label == "longest")
    assert len(points) <= 4096
    assert max(y for _, y in points) == 500.0
    assert points[0][0] == 0 and points[-1][0] > 19_900
    assert [x for x, _ in points] == sorted(x for x, _ in points)
