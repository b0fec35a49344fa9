"""Traces of Nsight Systems, written by hand, as tables."""

from __future__ import annotations

import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "bench" / "nsight"))

import block_table
from nsys_sqlite import Trace, read_trace

from echo_rt.errors import ConfigError

PROCESS = 5 << 24
MAIN, WORKER = PROCESS + 1, PROCESS + 2
OTHER_PROCESS = (6 << 24) + 1
TABLES = """
CREATE TABLE StringIds (id INTEGER PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (
    start INT, end INT, deviceId INT, streamId INT, correlationId INT, globalPid INT, demangledName INT, graphNodeId INT
);
CREATE TABLE CUPTI_ACTIVITY_KIND_MEMCPY (
    start INT, end INT, deviceId INT, correlationId INT, globalPid INT, bytes INT
);
CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INT, end INT, globalTid INT, correlationId INT, nameId INT);
CREATE TABLE NVTX_EVENTS (
    start INT, end INT, eventType INT, text TEXT, textId INT, globalTid INT, domainId INT
);
INSERT INTO StringIds VALUES
    (1, 'void echo::<unnamed>::norm_kernel<float>(Params)'), (2, 'gemm'), (3, 'Rollout._denoise');
"""
# Start, end, kind, name, its id, thread. A pass with a part of it inside, twice; a decoder on a thread of its own.
RANGES = [
    (0, 1000, 59, "Rollout._block", None, MAIN),
    (100, 500, 59, None, 3, MAIN),
    (600, 900, 59, None, 3, MAIN),
    (0, None, 59, "Decoder.decode", None, WORKER),
    (0, 1000, 60, "process-wide", None, MAIN),
    (2000, 2100, 59, "idle", None, MAIN),
    (0, 9000, 59, "elsewhere", None, OTHER_PROCESS),
]
# Start, thread, correlation id.
CALLS = [
    (50, MAIN, 10),
    (150, MAIN, 11),
    (700, MAIN, 12),
    (150, WORKER, 13),
    (5000, MAIN, 14),
    (150, OTHER_PROCESS, 99),
]
# Start, end, correlation id, name.
KERNELS = [
    (10_000, 11_000, 10, 1),
    (12_000, 16_000, 11, 2),  # two nodes of one graph
    (17_000, 18_000, 11, 1),
    (20_000, 21_000, 12, 1),
    (15_000, 17_500, 13, 2),  # beside the pass
    (30_000, 30_500, 14, 2),
]


def write(path: Path, script: str = TABLES, *after: str) -> Path:
    with closing(sqlite3.connect(path)) as database:
        database.executescript(script)
        for table, columns, rows in (
            ("NVTX_EVENTS", "start, end, eventType, text, textId, globalTid", RANGES),
            ("CUPTI_ACTIVITY_KIND_RUNTIME", "start, globalTid, correlationId", CALLS),
            ("CUPTI_ACTIVITY_KIND_KERNEL", "start, end, correlationId, demangledName", KERNELS),
        ):
            marks = ", ".join("?" * len(rows[0]))
            database.executemany(f"INSERT INTO {table} ({columns}) VALUES ({marks})", rows)
        database.execute("UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET deviceId = 0, globalPid = ?", (PROCESS,))
        database.execute(
            "INSERT INTO CUPTI_ACTIVITY_KIND_MEMCPY VALUES (?, ?, 0, 13, ?, 64)", (21_000, 22_000, PROCESS)
        )
        for statement in after:
            database.execute(statement)
        database.commit()
    return path


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    return read_trace(write(tmp_path / "block.sqlite"))


def test_work_belongs_to_the_ranges_that_were_open_when_it_was_asked_for(trace: Trace) -> None:
    found = [(each.name, each.start, tuple(stay.name for stay in each.ranges)) for each in trace.activities]
    block, denoise, decode = "Rollout._block", "Rollout._denoise", "Decoder.decode"
    assert found == [
        ("norm_kernel<float>", 10_000, (block,)),
        ("gemm", 12_000, (block, denoise)),
        ("gemm", 15_000, (decode,)),
        ("norm_kernel<float>", 17_000, (block, denoise)),
        ("norm_kernel<float>", 20_000, (block, denoise)),
        ("[memcpy]", 21_000, (decode,)),
        ("gemm", 30_000, ()),
    ]


def test_the_gpu_is_idle_where_nothing_runs(trace: Trace) -> None:
    (row,) = block_table.device_rows(trace)
    # 10-11, 12-18 (two side by side), 20-22, 30-30.5 of 10-30.5 microseconds
    assert (row["device"], row["launches"]) == (0, 7)
    assert (row["span"], row["busy"], row["idle"]) == pytest.approx((0.0205, 0.0095, 1 - 9.5 / 20.5))


def test_ranges_hold_what_was_launched_in_them(trace: Trace) -> None:
    rows = {row["name"]: row for row in block_table.range_rows(trace)}
    every = 1.0 + 4.0 + 2.5 + 1.0 + 1.0 + 1.0 + 0.5
    expected = {  # entered, launches, microseconds; idle: gaps in 10-21; in 12-18 and 20-21; in 15-22
        "Rollout._block": (1, 4, 7.0, 3 / 11),
        "Rollout._denoise": (2, 3, 6.0, 0.0),
        "Decoder.decode": (1, 2, 3.5, 2 / 7),
        "(in no range)": (None, 1, 0.5, None),
        "idle": (1, 0, 0.0, None),
        "elsewhere": (1, 0, 0.0, None),
    }
    assert set(rows) == set(expected)
    for name, (entered, launches, microseconds, idle) in expected.items():
        row = rows[name]
        assert (row["entered"], row["launches"]) == (entered, launches), name
        assert row["milliseconds"] == pytest.approx(microseconds / 1e3), name
        assert row["share"] == pytest.approx(microseconds / every), name
        assert row["idle"] == (None if idle is None else pytest.approx(idle)), name
    assert next(iter(rows)) == "Rollout._block"


def test_kernels_are_summed_by_name(trace: Trace) -> None:
    rows = [(row["name"], row["launches"], row["milliseconds"]) for row in block_table.kernel_rows(trace)]
    assert rows == [
        ("gemm", 3, pytest.approx(0.007)),
        ("norm_kernel<float>", 3, pytest.approx(0.003)),
        ("[memcpy]", 1, pytest.approx(0.001)),
    ]
    assert block_table.kernel_rows(trace)[0]["microseconds"] == pytest.approx(7 / 3)


def test_two_gpus_are_idle_apart(tmp_path: Path) -> None:
    second = "UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET deviceId = 1 WHERE correlationId = 13"
    rows = block_table.device_rows(read_trace(write(tmp_path / "two.sqlite", TABLES, second)))
    assert [(row["device"], row["launches"]) for row in rows] == [(0, 6), (1, 1)]
    assert [row["idle"] for row in rows] == pytest.approx([1 - 8.5 / 20.5, 0.0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("DROP TABLE NVTX_EVENTS", r"lacks NVTX_EVENTS \(NVTX ranges\); .* --trace=cuda,nvtx"),
        ("DROP TABLE CUPTI_ACTIVITY_KIND_KERNEL", r"lacks CUPTI_ACTIVITY_KIND_KERNEL \(kernels\)"),
        ("ALTER TABLE NVTX_EVENTS DROP COLUMN textId", "NVTX_EVENTS lacks the columns textId$"),
        ("ALTER TABLE CUPTI_ACTIVITY_KIND_MEMCPY DROP COLUMN globalPid", "MEMCPY lacks the columns globalPid$"),
        ("CREATE TABLE CUPTI_ACTIVITY_KIND_GRAPH_TRACE AS SELECT 1", "got whole graphs; use --cuda-graph-trace=node"),
    ],
)
def test_what_a_trace_lacks_is_named(tmp_path: Path, change: str, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"^block\.sqlite: .*{words}") as error:
        read_trace(write(tmp_path / "block.sqlite", TABLES, change))
    assert "\n" not in str(error.value)


def test_a_trace_without_work_is_refused(tmp_path: Path) -> None:
    empty = ("DELETE FROM CUPTI_ACTIVITY_KIND_KERNEL", "DELETE FROM CUPTI_ACTIVITY_KIND_MEMCPY")
    with pytest.raises(ConfigError, match="expected work of a GPU, got none"):
        read_trace(write(tmp_path / "block.sqlite", TABLES, *empty))


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.sqlite").write_text("no database, though long enough to be looked into\n" * 40, encoding="utf-8")
    for name, words in (("text.sqlite", "expected a database that nsys has exported"), ("none.sqlite", "no such file")):
        assert block_table.main([str(tmp_path / name)]) == 2
        assert words in capsys.readouterr().err


def test_the_tables_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert block_table.main([str(write(tmp_path / "block.sqlite")), "--top", "1"]) == 0
    out = capsys.readouterr().out
    assert "| Rollout._denoise " in out and "| gemm " in out and "(in no range)" in out
    assert "[memcpy]" not in out and "Not listed: 2 more kernels." in out
