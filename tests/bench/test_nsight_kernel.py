"""Reports of Nsight Compute, written by hand, as tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path

import kernel_table
import pytest
from kernel_table import METRICS, Launch, read_launches
from registers import short_name

from echo_rt.errors import ConfigError

STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
HEADER = ["ID", "Process ID", "Kernel Name", *METRICS, *map(STALL.format, ("barrier", "long_scoreboard"))]
# Of the warps that did not issue: another question, which must not count twice.
HEADER.append(STALL.format("barrier_not_issued"))
UNITS = ["", "", "", "ns", "byte", "byte", "%", "%", "%", "%", "register/thread", "inst", "inst", "inst"]
NORM = "void echo::<unnamed>::norm_kernel<echo::RowShape<__half, (int)8, (int)1>>(echo::NormParams)"
STEP = "void echo::(anonymous namespace)::step_kernel<float>(StepParams)"
LAUNCHES = [
    ["0", "7", NORM, "10,000", "1,000,000", "2,000,000", "80", "50", "0", "70", "40", "1.5", "4.5", "9"],
    ["1", "7", STEP, "4,000", "500", "0", "5", "10", "n/a", "20", "32", "0", "0", "0"],
    ["2", "7", NORM, "12,000", "3,000,000", "2,000,000", "60", "52", "0", "72", "40", "2.5", "5.5", "9"],
]


def report(*rows: list[str]) -> str:
    out = io.StringIO()
    csv.writer(out, quoting=csv.QUOTE_ALL).writerows(rows)
    return "==PROF== Connected to process 7 (python3)\n" + out.getvalue()


def read(text: str) -> list[Launch]:
    return read_launches(text.splitlines(), "flow.csv")


def test_launches_are_read_in_microseconds_megabytes_and_shares() -> None:
    norm, step, _ = read(report(HEADER, UNITS, *LAUNCHES))
    assert (norm.kernel, step.kernel) == ("norm_kernel<RowShape<__half, (int)8, (int)1>>", "step_kernel<float>")
    assert list(norm.values.values()) == pytest.approx([10, 1, 2, 0.8, 0.5, 0, 0.7, 40])
    assert norm.stalls == {"barrier": 1.5, "long_scoreboard": 4.5}
    assert step.values["tensor"] is None


@pytest.mark.parametrize(("unit", "seconds"), [("us", 1e-2), ("usecond", 1e-2), ("ms", 10), ("nsecond", 1e-5)])
def test_units_are_those_that_stand_there(unit: str, seconds: float) -> None:
    units = ["", "", "", unit, *UNITS[4:]]
    assert read(report(HEADER, units, LAUNCHES[0]))[0].values["microseconds"] == pytest.approx(1e6 * seconds)


def test_a_row_for_each_kernel_holds_medians() -> None:
    norm, step = kernel_table.kernel_rows(read(report(HEADER, UNITS, *LAUNCHES)))
    assert (norm["launches"], step["launches"]) == (2, 1)
    assert norm["microseconds"] == pytest.approx(11)
    assert (norm["megabytes_read"], norm["megabytes_written"]) == pytest.approx((2, 2))
    assert (norm["dram"], norm["l2"], norm["occupancy"], norm["registers"]) == pytest.approx((0.7, 0.51, 0.71, 40))
    assert step["tensor"] is None


def test_stalls_are_shares_of_all_and_the_largest_comes_first() -> None:
    rows = kernel_table.stall_rows(read(report(HEADER, UNITS, *LAUNCHES)), top=1)
    assert [(row["reason"], row["cycles"], row["share"]) for row in rows] == [
        ("long_scoreboard", 5.0, pytest.approx(5 / 7)),
        ("barrier", 0.0, None),  # nothing waited: shares of nothing
    ]


def without(name: str) -> str:
    keep = [place for place, column in enumerate(HEADER) if column != name]
    return report(*([row[place] for place in keep] for row in (HEADER, UNITS, *LAUNCHES)))


def changed(place: int, text: str, row: int = 1) -> str:
    rows = [list(cells) for cells in (HEADER, UNITS, *LAUNCHES)]
    rows[row][place] = text
    return report(*rows)


BAD: dict[str, tuple[Callable[[], str], str]] = {
    "nothing": (
        lambda: "==WARNING== No kernels were profiled.\n",
        'expected CSV of ncu, whose header begins with "ID"',
    ),
    "details": (lambda: report([*HEADER, "Metric Name"]), "expected the raw page of ncu"),
    "column": (lambda: without("lts__t_sector_hit_rate.pct"), r"lacks the columns lts__t_sector_hit_rate\.pct$"),
    "kernel": (lambda: without("Kernel Name"), "lacks the columns Kernel Name"),
    "stalls": (lambda: report([c for c in HEADER if "stalled" not in c]), "lacks the columns smsp__average_warps"),
    "no-units": (lambda: report(HEADER, *LAUNCHES), "expected a row of units behind the header, got a launch"),
    "header-alone": (lambda: report(HEADER), "expected a row of units behind the header, got nothing"),
    "no-launch": (lambda: report(HEADER, UNITS), "expected at least one launch, got none"),
    "unit": (lambda: changed(3, "fortnight"), "gpu__time_duration.sum: expected a unit of ns, .* got 'fortnight'"),
    "percent": (lambda: changed(6, ""), r"gpu__dram_throughput\S+: expected a unit of %; got ''"),
    "number": (
        lambda: changed(3, "quick", 2),
        "gpu__time_duration.sum of norm_.*: expected a number, got 'quick'",
    ),
    "cut-off": (lambda: report(HEADER, UNITS, LAUNCHES[0][:-3]), "expected 14 columns in every row, got 11"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_such_report_is_refused_by_name(case: str) -> None:
    text, words = BAD[case]
    with pytest.raises(ConfigError, match=f"^flow.csv: {words}") as error:
        read(text())
    assert "\n" not in str(error.value)


def test_the_tables_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "step.csv").write_text(report(HEADER, UNITS, *LAUNCHES), encoding="utf-8")
    assert kernel_table.main([str(tmp_path / "step.csv"), "--stalls", "2"]) == 0
    out = capsys.readouterr().out
    assert "| step_kernel<float> " in out and "| long_scoreboard " in out
    assert kernel_table.main([str(tmp_path / "none.csv")]) == 2
    assert capsys.readouterr().err.endswith("none.csv: cannot be read: No such file or directory\n")


@pytest.mark.parametrize(
    ("demangled", "name"),
    [
        (
            "void at::native::elementwise<4, at::Op<(bool)1>>(int, at::Op<(bool)1>)",
            "at::native::elementwise<4, at::Op<(bool)1>>",
        ),
        ("sm90_xmma_gemm_bf16", "sm90_xmma_gemm_bf16"),
        ("(odd)", "(odd)"),
    ],
)
def test_kernels_have_short_names(demangled: str, name: str) -> None:
    assert short_name(demangled) == name
