"""CPU threads beside other programs: when they sleep while they wait, when they spin, and that nothing else changes."""

from __future__ import annotations

import json
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import echo_rt.utils.threads
from echo_rt.utils.threads import WAIT_VARIABLES, Cores, busy_seconds, core_quota, share_cpu

LONG = 60.0  # seconds; only a deadlock takes that long
CPU = torch.device("cpu")
STAT = """\
cpu  100000 0 0 0 0 0 0 0 0 0
cpu0 100 20 30 5000 6000 4 5 6 70 80
cpu1 1000 200 300 5000 6000 40 50 60 70 80
cpu10 10000 0 0 0 0 0 0 0 0 0
intr 12345 1 2 3
"""


# ---------------------------------------------------------------- what the machine says


def test_busy_time_is_all_but_idle_of_the_named_cores() -> None:
    tick = os.sysconf("SC_CLK_TCK")
    assert busy_seconds(STAT, {0}) == 165 / tick
    assert busy_seconds(STAT, {0, 1}) == (165 + 1650) / tick


def test_the_smallest_quota_of_a_group_and_its_parents_counts(tmp_path: Path) -> None:
    (tmp_path / "service" / "job").mkdir(parents=True)
    assert core_quota("1:cpu:/x\n0::/service/job\n", tmp_path) == float("inf")
    (tmp_path / "service" / "job" / "cpu.max").write_text("max 100000\n")
    assert core_quota("0::/service/job\n", tmp_path) == float("inf")
    (tmp_path / "service" / "cpu.max").write_text("150000 100000\n")
    assert core_quota("0::/service/job\n", tmp_path) == 1.5
    (tmp_path / "service" / "job" / "cpu.max").write_text("200000 100000\n")
    assert core_quota("0::/service/job\n", tmp_path) == 1.5
    assert core_quota("0::/elsewhere\n", tmp_path) == float("inf")
    assert core_quota("", tmp_path) == float("inf")


def test_free_cores_are_what_others_leave_and_the_quota_allows() -> None:
    cores = Cores(frozenset(range(8)), quota=3)
    assert cores.free(4) == 3
    assert cores.free(6) == 2


# ---------------------------------------------------------------- when threads sleep


class Machine:
    """Two cores of which ``others`` are used by other programs; ``teams`` tells of each team made and ended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.others = self.used = self.time = 0.0
        self.looks = threading.Semaphore(0)
        self.teams: queue.Queue[str] = queue.Queue()
        machine = self

        def others(cores: Cores) -> tuple[float, float]:
            machine.looks.release()
            machine.time, machine.used = machine.time + 1, machine.used + machine.others
            return machine.time, machine.used

        @contextmanager
        def team(openmp: object, threads: int) -> Iterator[None]:
            machine.teams.put("made")
            yield
            machine.teams.put("ended")

        for variable in WAIT_VARIABLES:
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        monkeypatch.setattr(Cores, "available", lambda: Cores(frozenset({0, 1}), float("inf")))
        monkeypatch.setattr(echo_rt.utils.threads, "_PERIOD", 0.001)
        monkeypatch.setattr(echo_rt.utils.threads, "_others", others)
        monkeypatch.setattr(echo_rt.utils.threads, "idle_team", team)
        monkeypatch.setattr(echo_rt.utils.threads, "_libgomp", object)

    def wait_for_looks(self, count: int) -> None:
        for _ in range(count):
            assert self.looks.acquire(timeout=LONG)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_threads_sleep_while_other_programs_need_their_cores(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "echo_rt.utils.threads"), share_cpu(CPU):
        machine.others = 0.1
        machine.wait_for_looks(5)
        assert machine.teams.empty()
        machine.others = 1.0
        assert machine.teams.get(timeout=LONG) == "made"
        machine.wait_for_looks(5)
        assert machine.teams.empty()  # one is enough
        machine.others = 0.0
        assert machine.teams.get(timeout=LONG) == "ended"
        machine.others = 2.0
        assert machine.teams.get(timeout=LONG) == "made"
    assert machine.teams.get_nowait() == "ended"
    lines = [record.getMessage() for record in caplog.records]
    assert [("sleep" in line, "1.0 of 2 cores" in line) for line in lines[:1]] == [(True, True)]
    assert ["spin" in line for line in lines] == [False, True, False]


def test_no_watcher_outlives_its_context(machine: Machine) -> None:
    before = set(threading.enumerate())
    with pytest.raises(KeyError), share_cpu("cpu"):
        machine.wait_for_looks(1)
        raise KeyError
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("reason", [*WAIT_VARIABLES, "one thread", "a GPU", "another OpenMP"])
def test_nothing_is_done_where_it_is_not_wanted_or_has_no_use(
    machine: Machine, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason in WAIT_VARIABLES:
        monkeypatch.setenv(reason, "ACTIVE")
    elif reason == "one thread":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    elif reason == "another OpenMP":
        monkeypatch.setattr(echo_rt.utils.threads, "_libgomp", lambda: None)
    before = set(threading.enumerate())
    with share_cpu("cuda" if reason == "a GPU" else "cpu"):
        assert set(threading.enumerate()) <= before


# ---------------------------------------------------------------- what libgomp makes of it

_IN_A_PROCESS = """
import json, time, torch
from echo_rt.utils import threads

x = torch.linspace(0, 1, 1 << 20)

def seconds_of_processor():
    (x + 1).sum()
    begun = time.process_time()
    for _ in range(20):
        x + 1  # then the other thread waits for more work, while this one sleeps
        time.sleep(0.01)
    return time.process_time() - begun

def result():
    return (x.sin() @ x.cos()).item(), torch.get_num_threads()

found = {"spin": seconds_of_processor(), "result": result()}
openmp = threads._libgomp()
found["libgomp"] = openmp is not None
if openmp is not None:
    with threads.idle_team(openmp, torch.get_num_threads()):
        found |= {"sleep": seconds_of_processor(), "same": result()}
    found["again"] = seconds_of_processor()
print(json.dumps(found))
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="on one core libgomp never spins for long")
def test_an_idle_team_ends_the_spinning_and_changes_no_result() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in WAIT_VARIABLES}
    environment |= {
        "OMP_NUM_THREADS": "2",
        "MKL_NUM_THREADS": "2",
        "PYTHONPATH": str(Path(echo_rt.__file__).parent.parent),
    }
    done = subprocess.run([sys.executable, "-c", _IN_A_PROCESS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    if not found["libgomp"]:
        pytest.skip("torch's OpenMP is not GNU's")
    assert found["same"] == found["result"] and found["result"][1] == 2
    assert found["sleep"] < found["spin"] / 3, found
    assert found["sleep"] < found["again"] / 3, found


# ---------------------------------------------------------------- who uses it


@contextmanager
def noting(inside: list[str], device: torch.device) -> Iterator[None]:
    inside.append(str(device))
    yield
    inside.append("left")


@pytest.mark.parametrize("command", ["generate", "soak", "verify"])
def test_commands_share_the_cpu(
    command: str, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import echo_rt.cli.generation
    import echo_rt.soak.session
    from echo_rt.cli.main import main
    from echo_rt.weights.tiny_model import CHECKPOINT_FILE

    inside: list[str] = []
    for module in (echo_rt.utils.threads, echo_rt.cli.generation, echo_rt.soak.session):
        monkeypatch.setattr(module, "share_cpu", lambda device: noting(inside, device))
    model = ["--model", str(small_model), "--checkpoint", str(small_model / CHECKPOINT_FILE), "--device", "cpu"]
    arguments = {
        "generate": [*model, "--prompt", "a fox", "--frames", "9", "--quiet", "-o", str(tmp_path / "v.mp4")],
        "soak": [*model, "--blocks", "1", "--quiet", "--no-plots", "--out", str(tmp_path / "soak")],
        "verify": [str(small_model), "--device", "cpu"],
    }
    assert main([command, *arguments[command]]) == 0
    assert inside == ["cpu", "left"]
