"""Each promise: kept, broken with the block that broke it, or not checked."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest

from echo_rt.soak import Outcome
from echo_rt.soak.checks import Promises, Status, Verdict
from echo_rt.soak.config import Limits
from echo_rt.soak.interval import Histogram

ALL = Limits(
    latency_ratio=1.05, latency_zscore=10.0, snapshot_stall=100.0, drift=0.1, host_slope=100.0, host_slack=2**20
)
MIB = 2**20

CLOCK = ["latency p99/p50", "latency z-score", "snapshot stall"]


def lines(count: int = 20, run: int = 1, first: int = 0) -> list[dict[str, Any]]:
    """Intervals of 50 blocks each that keep every promise."""
    made = []
    for number in range(count):
        begin = first + 50 * number
        made.append(
            {
                "run": run,
                "first_block": begin,
                "block": begin + 49,
                "blocks": 50,
                "warm": number > 0,
                "latency": {"bins": Histogram.of([0.25] * 50)},
                "snapshots": {"written": 1, "skipped": 0, "stall": 4.0},
                "zscore": {"max": 2.0, "block": begin, "judged": 50, "outliers": 0},
                "position": {"shift": begin, "least_newest_id": 20, "most_newest_id": 20, "misplaced": []},
                "latents": {"mean": 0.1, "std": 1.0},
                "nonfinite": {"latent": 0, "video": 0, "block": None},
                "rollbacks": 0,
                "compared": int(number == 3),
                "mismatches": [],
                "device": {"allocated": 1000 * MIB + (number == 0), "reserved": 2000 * MIB},
                "host": {"rss": 500 * MIB + 4096 * (number % 3)},
                "gpu": {"ecc_uncorrected": 2},
            }
        )
    return made


def judge(made: list[dict[str, Any]], limits: Limits = ALL) -> dict[str, Verdict]:
    promises = Promises(limits.resolved("cpu"))
    for line in made:
        promises.see(line)
    return {verdict.promise: verdict for verdict in promises.verdicts()}


def broken(made: list[dict[str, Any]], limits: Limits = ALL) -> dict[str, str]:
    return {name: v.evidence for name, v in judge(made, limits).items() if v.status is Status.BROKEN}


def test_all_are_kept() -> None:
    assert {name: v.status for name, v in judge(lines()).items()} == dict.fromkeys(judge([]), Status.KEPT)


def test_nothing_is_kept_of_no_block() -> None:
    verdicts = judge([])
    assert len(verdicts) == 11
    assert all(verdict.status is Status.UNCHECKED for verdict in verdicts.values())


def test_what_was_not_asked_for_is_not_kept() -> None:
    clock = {"latency_ratio": None, "latency_zscore": None, "snapshot_stall": None}
    left = Limits(device_growth=None, host_slope=None, drift=None, **clock)
    verdicts = judge(lines(), left)
    unasked = [name for name, verdict in verdicts.items() if verdict.evidence == "not asked for"]
    assert unasked == ["device memory", "host memory", *CLOCK, "latent drift"]
    assert all(verdicts[name].status is Status.UNCHECKED for name in unasked)


def test_a_snapshot_that_holds_up_the_stream() -> None:
    made = lines()
    made[3]["snapshots"]["stall"] = 99.9
    assert judge(made)["snapshot stall"].evidence == "at most 99.9 ms"
    made[6]["snapshots"]["stall"] = 100.5
    assert broken(made) == {"snapshot stall": f"before block {made[6]['block'] + 1}: 100.5 ms"}
    for line in made:
        line["snapshots"] = None
    assert judge(made)["snapshot stall"].status is Status.UNCHECKED


def test_nan() -> None:
    made = lines()
    made[7]["nonfinite"] = {"latent": 3, "video": 0, "block": 361}
    assert broken(made) == {"finite": "block 361: 3 in latents, 0 in the video"}


def test_a_rollback_is_no_finite_video() -> None:
    made = lines()
    made[7]["rollbacks"] = 2
    assert broken(made) == {"finite": "block 399 or before: the stream went back 2 times"}


def test_a_stream_that_fails() -> None:
    end = {"run": 1, "block": 99, "end": "failed", "compared": 0, "mismatches": []}
    text = "NumericalError: block 99: 4 of 9 values"
    assert broken([*lines(2), {**end, "failure": text, "nonfinite_failure": True}]) == {
        "stream": f"block 99: {text}",
        "finite": f"block 99: {text}",
    }
    assert list(broken([*lines(2), {**end, "failure": "RuntimeError: x", "nonfinite_failure": False}])) == ["stream"]


def test_positions() -> None:
    made = lines()
    made[2]["position"]["misplaced"] = [111, "newest id 21 is not in 0..20"]
    made[9]["position"]["misplaced"] = [480, "later"]
    assert broken(made) == {"positions": "block 111: newest id 21 is not in 0..20"}


def test_hashes() -> None:
    made = lines()
    made[4]["mismatches"] = [[200, "aa", "bb"]]
    assert broken(made) == {"hashes": "block 200: expected aa, found bb"}
    end = {"run": 1, "block": 99, "end": "complete", "failure": None, "compared": 1, "mismatches": [[90, "a", "b"]]}
    assert broken([*lines(2), end]) == {"hashes": "block 90: expected a, found b"}
    assert judge(lines(3))["hashes"].status is Status.UNCHECKED


@pytest.mark.parametrize("name", ["allocated", "reserved"])
@pytest.mark.parametrize("off", [1, -1])
def test_one_byte_of_the_device(name: str, off: int) -> None:
    made = lines()
    made[5]["device"][name] += off
    assert list(broken(made)) == ["device memory"]
    assert f"block 299: {name}" in broken(made)["device memory"]
    assert broken(made, Limits(device_growth=1.0)) == {}


def test_another_process_has_another_memory() -> None:
    later = lines(run=2, first=1000)
    for line in later:
        line["device"]["allocated"] += MIB
        line["host"]["rss"] += 300 * MIB
    assert broken(lines() + later) == {}


@pytest.mark.parametrize(
    ("bytes_a_block", "breaks"),
    [(0, False), (90, False), (1000, False), (3000, True)],  # 1000 over 900 blocks is within the slack
)
def test_growth_of_the_host(bytes_a_block: int, breaks: bool) -> None:
    noise, made = random.Random(0), lines()
    for line in made:
        line["host"]["rss"] += bytes_a_block * line["block"] + noise.randrange(0, 65536, 4096)
    assert list(broken(made)) == (["host memory"] if breaks else [])
    if breaks:  # and stays so when a second process does well
        assert list(broken(made + lines(run=2, first=1000))) == ["host memory"]


def test_a_step_that_is_taken_once_is_no_growth() -> None:
    made = lines(400)
    for line in made[4:]:
        line["host"]["rss"] += 40 * MIB
    assert broken(made, Limits(host_slope=1024.0)) == {}


def test_slow_blocks() -> None:
    made = lines()
    made[3]["latency"]["bins"] = Histogram.of([0.27] * 25)
    assert broken(made)["latency p99/p50"].startswith("1.080 over 975 blocks")
    assert list(broken(made)) == ["latency p99/p50"]
    assert broken(made, Limits(latency_ratio=1.1)) == {}


def test_outliers() -> None:
    made = lines()
    made[3]["zscore"] = {"max": 31.5, "block": 170, "judged": 50, "outliers": 1}
    assert broken(made) == {}  # one of 1000
    made[8]["zscore"]["outliers"] = 1
    assert broken(made) == {"latency z-score": "2 of 1000 blocks; the highest is 31.5, at block 170"}


@pytest.mark.parametrize("name", ["mean", "std"])
def test_drift(name: str) -> None:
    made = lines()
    made[0]["latents"][name] += 5  # before warm-up
    made[4]["latents"][name] += 0.09
    assert broken(made) == {}
    made[6]["latents"][name] -= 0.11
    assert list(broken(made)) == ["latent drift"] and "block 349" in broken(made)["latent drift"]


def test_ecc() -> None:
    made = lines()
    for line in made[10:]:
        line["gpu"]["ecc_uncorrected"] = 3
    assert broken(made) == {"GPU errors": "block 549: 1 more"}
    for line in made:
        line["gpu"] = None
    assert judge(made)["GPU errors"].status is Status.UNCHECKED


def test_a_cpu_has_no_device_memory() -> None:
    made = copy.deepcopy(lines())
    for line in made:
        line["device"] = None
    assert judge(made)["device memory"].status is Status.UNCHECKED


@pytest.mark.parametrize(
    ("failure", "signal_code", "status", "code"),
    [
        (None, None, Status.KEPT, 0),
        (None, None, Status.UNCHECKED, 0),
        (None, None, Status.BROKEN, 3),
        (None, 143, Status.KEPT, 143),
        (None, 143, Status.BROKEN, 3),
        ("it failed", None, Status.BROKEN, 4),
        ("it failed", 130, Status.KEPT, 4),
    ],
)
def test_exit_codes(failure: str | None, signal_code: int | None, status: Status, code: int, tmp_path: Any) -> None:
    verdicts = [Verdict("a", Status.KEPT, "", ""), Verdict("b", status, "", "evidence")]
    outcome = Outcome("complete", 3, verdicts, tmp_path, failure=failure, signal_code=signal_code)
    assert outcome.exit_code == code
    assert ("b: evidence" in outcome.summary) == (status is Status.BROKEN)
