"""bench/gpu.sh on a virtual clock, with every step slow, failing or hanging; and its real way of ending a step."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_table import FIGURES

ROOT = Path(__file__).parent.parent.parent
STEPS = ["machine", "build", "doctor", "operations", "golden", "block", "vae", "float8", "memory", "kernels"]
STEPS += ["attention", "profile", "memcheck", "racecheck", "others"]
if (ROOT / "build" / "travel").is_dir():  # someone gathered wheels here
    STEPS.insert(1, "packages")

# Stands in for coreutils' timeout: runs no step, but notes what it was asked for and moves the clock.
TIMEOUT = """#!{python} -SE
import json, os, sys
from pathlib import Path
_, _, grace, limit, *command = sys.argv
if any("gpu_table" in word for word in command):
    os.execv(command[0], command)
words, world = " ".join(command), Path({world!r})
folder = command[command.index("--out") + 1] if "--out" in command else None
known = {{"pip install": "packages", "setup.py": "build", " -k ": "operations"}}
known |= {{name: name for name in ("doctor", "memcheck", "racecheck")}}
step = folder.rsplit("/", 1)[1] if folder else next((name for word, name in known.items() if word in words), "others")
own = json.loads((world / "plan.json").read_text()).get(step, {{}})
seconds, limit = own.get("seconds", 1), int(limit)
clock = world / "clock"
now = int(clock.read_text())
with (world / "asked").open("a") as asked:
    print(step, now, limit, words, sep="\\t", file=asked)
if folder:
    Path(folder, "written.json").write_text(json.dumps({{"before": "the end"}}))
print(own.get("says", "12 passed, backend cuda  available"))
clock.write_text(str(now + min(seconds, limit) + (int(grace) if own.get("stubborn") else 0)))
sys.exit(own.get("code", 0) if seconds <= limit else 137 if own.get("stubborn") else 124)
"""


class World:
    """A machine on which steps take no time but on its clock. ``plan``: step -> seconds, code, says, stubborn."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        self._programs = folder / "programs"
        self._programs.mkdir()
        self._program("timeout", TIMEOUT.format(python=sys.executable, world=str(folder)))
        self._program("date", f"#!/bin/sh\ncat {folder}/clock\n")
        (folder / "clock").write_text("1000")

    def _program(self, name: str, text: str) -> None:
        path = self._programs / name
        path.write_text(text)
        path.chmod(0o755)

    def run(self, plan: Mapping[str, Any], *arguments: str) -> subprocess.CompletedProcess[str]:
        (self.folder / "plan.json").write_text(json.dumps(plan))
        path = f"{self._programs}{os.pathsep}{os.environ['PATH']}"
        return script(str(self.out), *arguments, PATH=path)

    @property
    def seconds(self) -> int:
        """How long the run took."""
        return int((self.folder / "clock").read_text()) - 1000

    def asked(self) -> list[tuple[str, int, int, str]]:
        """The steps that were begun: name, time since the start, limit, command."""
        rows = [line.split("\t") for line in (self.folder / "asked").read_text().splitlines()]
        return [(name, int(now) - 1000, int(limit), words) for name, now, limit, words in rows]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def script(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, **changes}
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def archive(out: Path) -> dict[str, str]:
    """The archive's files by their paths below its one folder."""
    with tarfile.open(out / "gpu-check.tar.gz") as tar:
        files = {m.name: tar.extractfile(m) for m in tar.getmembers() if m.isfile()}
        return {name.removeprefix("gpu-check/"): file.read().decode() for name, file in files.items() if file}


def states(files: Mapping[str, str]) -> dict[str, str]:
    rows = csv.DictReader(io.StringIO(files["steps.tsv"]), delimiter="\t", quoting=csv.QUOTE_NONE)
    return {row["step"]: row["state"] for row in rows}


def check_archive(world: World) -> dict[str, str]:
    """What holds whatever happened: two files, all that was begun is in the archive and whole, none took too long."""
    assert sorted(path.name for path in world.out.iterdir()) == ["gpu-check.tar.gz", "summary.md"]
    files = archive(world.out)
    for name, *_, words in world.asked():
        assert f"{name}/log.txt" in files
        if "--out" in words:
            assert json.loads(files[f"{name}/written.json"]) == {"before": "the end"}
    assert files["summary.md"] == (world.out / "summary.md").read_text()
    found = states(files)
    for name, state in found.items():
        assert f"| {name}" in files["summary.md"] and (
            state == "passed" or f"- step {name} {state}" in files["summary.md"]
        )
    return found


def test_all_steps_in_the_order_of_their_value(world: World) -> None:
    done = world.run({})
    assert done.returncode == 0, done.stderr
    assert [name for name, *_ in world.asked()] == STEPS
    assert check_archive(world) == dict.fromkeys(STEPS, "passed")
    words = {name: words for name, *_, words in world.asked()}
    assert "ECHO_RT_BUILD=cuda" in words["build"] and "--backend cuda" in words["block"]
    assert "--dtype float8" in words["float8"] and "--variants evolve,off" in words["memory"]
    assert all("--device cuda" in words[name] for name in STEPS if "--out" in words[name])
    for figure in FIGURES:
        assert figure.step in STEPS


FAULTS = [
    ({}, "passed"),
    ({"seconds": 10**6}, "timed out"),
    ({"seconds": 10**6, "stubborn": True}, "timed out"),
    ({"code": 3}, "failed"),
]


@pytest.mark.parametrize("shift", range(len(FAULTS)))
def test_a_fault_in_any_place_costs_its_own_step_alone(world: World, shift: int) -> None:
    """Every step meets every fault, and follows upon every other."""
    chosen = {step: FAULTS[(place + shift) % len(FAULTS)] for place, step in enumerate(STEPS[1:])}
    done = world.run({step: fault for step, (fault, _) in chosen.items()}, "--budget=5000")
    assert done.returncode == 1
    assert check_archive(world) == {"machine": "passed"} | {step: state for step, (_, state) in chosen.items()}


def test_when_every_step_hangs_the_budget_holds_and_the_first_have_run(world: World) -> None:
    done = world.run({name: {"seconds": 10**6, "stubborn": True} for name in STEPS[1:]})
    found = check_archive(world)
    assert done.returncode == 1 and world.seconds <= 420 and list(found) == STEPS
    assert found["build"] == found["golden"] == "timed out" and found["others"] == "skipped"
    for name, now, limit, _ in world.asked():
        assert now + limit + 10 <= 420, f"{name} was begun when it could not end in time"


@pytest.mark.parametrize("budget", [130, 250, 900])
def test_no_step_is_begun_that_cannot_end(world: World, budget: int) -> None:
    done = world.run({step: {"seconds": 37} for step in STEPS}, f"--budget={budget}")
    found = check_archive(world)
    assert world.seconds <= budget and set(found.values()) <= {"passed", "timed out", "skipped"}
    assert done.returncode == (0 if set(found.values()) == {"passed"} else 1)
    if budget == 900:
        assert set(found.values()) == {"passed"}


@pytest.mark.parametrize(
    ("step", "says"),
    [("operations", "12 skipped in 1 s"), ("doctor", "backend cuda  not built"), ("others", "no tests ran")],
)
def test_a_step_must_prove_itself(world: World, step: str, says: str) -> None:
    done = world.run({step: {"says": says}}, "--steps", step)
    assert done.returncode == 1 and check_archive(world)[step] == "failed"
    assert "its output lacks" in (world.out / "summary.md").read_text()


def test_a_long_output_keeps_both_ends(world: World) -> None:
    world.run({"operations": {"says": "begin " + "x" * 3_000_000 + " 5 passed"}}, "--steps=operations")
    check_archive(world)
    log = archive(world.out)["operations/log.txt"]
    assert len(log) < 1_100_000 and log.startswith("begin") and "5 passed" in log and "[...]" in log


def test_some_steps_alone(world: World) -> None:
    assert world.run({}, "--steps", "block,racecheck").returncode == 0
    assert list(check_archive(world)) == ["block", "racecheck"]


def test_without_a_gpu_nothing_is_begun(world: World) -> None:
    done = world.run({"machine": {"code": 2, "says": "no GPU: torch sees none"}})
    assert done.returncode == 2 and [name for name, *_ in world.asked()] == ["machine"]
    assert done.stderr.startswith("gpu.sh: no GPU: torch sees none; ") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "expected a folder for the results, found none"),
        (["a", "b"], "expected one folder, found a and b"),
        (["a", "--budget"], "expected a value after --budget, found none"),
        (["a", "--budget=0"], "expected --budget in whole seconds, found 0"),
        (["a", "--budget", "ten"], "expected --budget in whole seconds, found ten"),
        (["a", "--device=tpu"], "expected --device cuda or cpu, found tpu"),
        (["a", "--quick"], "unknown option --quick"),
        (["a", "--steps=block,dance"], "found dance"),
        (["/proc/none"], "/proc/none: expected a folder to write into"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path: Path, arguments: list[str], words: str) -> None:
    given = [str(tmp_path / word) if word in ("a", "b") else word for word in arguments]
    done = script(*given)
    assert done.returncode == 2 and words in done.stderr.replace(f"{tmp_path}/", "")
    assert len(done.stderr.splitlines()) == 1 and not [path for out in tmp_path.glob("a") for path in out.iterdir()]


# ---- on the real clock


def shortened(tmp_path: Path) -> str:
    """A PATH whose timeout is the real one with a second for every limit."""
    real = subprocess.run(
        ["bash", "-c", "command -v timeout"], capture_output=True, text=True, check=True
    ).stdout.strip()
    program = tmp_path / "timeout"
    program.write_text(f'#!/bin/bash\nshift 3\nexec {real} -k 0.5 1 "$@"\n')
    program.chmod(0o755)
    return f"{tmp_path}{os.pathsep}{os.environ['PATH']}"


def fake_python(tmp_path: Path, doctor: str) -> str:
    """An interpreter that is the real one, but for the step ``doctor``."""
    program = tmp_path / "python"
    program.write_text(
        f'#!/bin/bash\ncase "$*" in *gpu_table*) exec {sys.executable} "$@" ;; *doctor*) {doctor} ;; esac\n'
    )
    program.chmod(0o755)
    return str(program)


def test_a_step_that_hangs_is_killed_with_all_it_started(tmp_path: Path) -> None:
    child = f"trap '' TERM; sleep 1000 & echo $! >{tmp_path}/child; sleep 1000 & wait; wait"
    out = tmp_path / "out"
    python = fake_python(tmp_path, child)
    done = script(str(out), "--steps=doctor", "--device=cpu", PATH=shortened(tmp_path), PYTHON=python)
    assert done.returncode == 1 and states(archive(out)) == {"doctor": "timed out"}
    status = Path("/proc") / (tmp_path / "child").read_text().strip() / "stat"
    assert not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_check_keeps_what_it_has(tmp_path: Path, number: signal.Signals) -> None:
    """SIGKILL cannot be answered: then there is what was packed after the step before."""
    fifo, out = tmp_path / "begun", tmp_path / "out"
    os.mkfifo(fifo)
    python = fake_python(tmp_path, f"echo half a line; echo >{fifo}; exec sleep 1000")
    environment = {**os.environ, "PYTHON": python}
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), str(out), "--steps=machine,doctor", "--device=cpu"]
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # A shell ignores for ever what is ignored when it starts, as SIGINT is where the tests run in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    group = None
    try:
        fifo.read_text()  # until the step has begun
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        group = int(children[0])
        process.send_signal(number)
        assert process.wait() == (128 + number if number != signal.SIGKILL else -number)
    finally:
        if group is not None and number == signal.SIGKILL:
            os.killpg(group, number)
        process.kill()
    files = archive(out)
    assert states(files)["machine"] == "passed"
    if number != signal.SIGKILL:
        assert states(files)["doctor"] == "interrupted" and "half a line" in files["doctor/log.txt"]
        assert sorted(path.name for path in out.iterdir()) == ["gpu-check.tar.gz", "summary.md"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_this_machine_has_no_gpu(tmp_path: Path) -> None:
    done = script(str(tmp_path / "out"))
    assert done.returncode == 2 and "no GPU" in done.stderr and "--device cpu rehearses" in done.stderr


def test_the_script_rehearses(tmp_path: Path) -> None:
    done = script(str(tmp_path), "--device=cpu", "--steps=machine,attention,profile,kernels")
    assert done.returncode == 0, done.stdout
    assert "A rehearsal without a GPU" in done.stdout and "unmet" not in done.stdout
    files = archive(tmp_path)
    attention = json.loads(files["attention/attention.json"])
    assert attention["passed"] is True and attention["tables"]["Attention over the text"]
    assert any(row["op"] == "library" for row in json.loads(files["kernels/kernel_times.json"])["tables"]["Kernels"])
    assert json.loads(files["profile/block_profile.json"])["tables"]["Kernels"]
