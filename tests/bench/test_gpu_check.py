"""The GPU check on the CPU: every way in which a stage can go wrong is seen, named, and in the exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_stages
import pytest
import sanitizer_control
import torch
from cases import OPS
from golden import find_bundles, refusal, verify
from gpu_check import append_log, check, judge, run_stage, share_of_budget, tests_line
from gpu_stages import SANITIZERS, Options, Stage, beyond_gpu, plan, stage_environment
from gpu_summary import Outcome, write_summary

ROOT = Path(__file__).parent.parent.parent
FACTS = {"date": "today", "commit": "abc", "gpu": None, "torch": "t", "cuda": None, "cudnn": None, "echo_rt": "0"}
FACTS |= {"host": {"processor": "p", "cores": 2}}


def stage(name: str, code: str, **changes: object) -> Stage:
    return Stage(name, (sys.executable, "-c", code), **({"limit": 20.0, "least": 0.1} | changes))


def described(stages: list[Stage], **changes: object) -> dict[str, object]:
    names = [s.name for s in stages]
    plain = {"device": "cuda", "quick": False, "sanitizer": True, "budget_s": 60.0}
    plain |= {"planned": names, "left_out": [], "without": {}}
    return plain | changes


def run_all(out: Path, stages: list[Stage], budget: float = 60.0) -> dict[str, Outcome]:
    def save(outcomes: list[Outcome]) -> None:
        write_summary(out, FACTS, described(stages), outcomes, 1.0)

    return {outcome.name: outcome for outcome in check(stages, out, time.monotonic() + budget, save)}


def test_a_failing_stage_stops_no_other_and_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = [
        stage("bad", "print('the reason'); raise SystemExit(3)"),
        stage("unproven", "print('0 passed')", proof=r"\b[1-9]\d* passed"),
        stage("refuted", "print('12 passed\\nERROR SUMMARY: 4 errors')", proof="passed", refuted="SUMMARY: [1-9]"),
        stage("absent", "raise SystemExit(9)", absent="there is no such tool"),
        stage("good", "print('12 passed in 0.3s')", proof=r"\b[1-9]\d* passed"),
    ]
    outcomes = run_all(tmp_path, stages)
    states = {name: outcome.state for name, outcome in outcomes.items()}
    assert states == {
        "bad": "failed",
        "unproven": "failed",
        "refuted": "failed",
        "absent": "not run",
        "good": "passed",
    }
    assert outcomes["bad"].exit_code == 3 and outcomes["good"].why == "12 passed"
    assert "ERROR SUMMARY" not in outcomes["unproven"].why and "SUMMARY: 4" in outcomes["refuted"].why
    summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["ok"] is False
    for name in ("bad failed", "unproven failed", "refuted failed", "absent not run"):
        assert name in summary["verdict"]
    assert "good" not in summary["verdict"] and summary["verdict"] in (tmp_path / "summary.md").read_text()
    logs = (tmp_path / "logs.txt").read_text()
    assert "==== bad: failed" in logs and "the reason" in logs and "12 passed" in logs
    assert "    the reason" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs.txt", "summary.json", "summary.md"]


def test_all_is_well(tmp_path: Path) -> None:
    assert all(outcome.ok for outcome in run_all(tmp_path, [stage("a", "pass"), stage("b", "pass")]).values())
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["ok"] is True and summary["verdict"] == "ok: all 2 stages passed"


def test_a_stage_that_takes_too_long_is_ended_with_all_it_started(tmp_path: Path) -> None:
    child = "import os, subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
    slow = stage("slow", child + "print(os.getpid(), flush=True); time.sleep(60)")
    begun = time.monotonic()
    outcome = run_stage(slow, 2.0, tmp_path / "log")
    assert outcome.state == "timed out" and not outcome.ok and time.monotonic() - begun < 15
    group = int((tmp_path / "log").read_text())
    with pytest.raises(ProcessLookupError):
        for _ in range(50):  # an orphan is gone once init has seen to it
            os.killpg(group, 0)
            time.sleep(0.1)


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    outcome = run_stage(Stage("x", ("/no/such/program",), 5, 1), 5, tmp_path / "log")
    assert outcome.state == "failed" and "cannot start /no/such/program" in outcome.why


def test_what_no_longer_fits_is_skipped_and_not_ok(tmp_path: Path) -> None:
    outcomes = run_all(tmp_path, [stage("first", "pass", least=8.0), stage("late", "pass", least=50.0)], budget=10.0)
    assert outcomes["first"].ok
    assert outcomes["late"].state == "skipped" and not outcomes["late"].ok and "needs 50" in outcomes["late"].why


def test_the_budget_is_divided() -> None:
    first, second, third = (Stage(name, (), limit, 10.0) for name, limit in (("a", 100), ("b", 30), ("c", 30)))
    assert share_of_budget([first, second, third], 200) == 100  # all it may
    assert share_of_budget([first, second, third], 90) == 70  # the others keep what they need
    assert share_of_budget([first, second, third], 25) == 10  # not all can have it: those that come first do
    assert share_of_budget([first, second, third], 9) == 0
    assert share_of_budget([third], 12) == 12


def test_an_interrupted_check_is_not_ok(tmp_path: Path) -> None:
    stages = [stage("a", "pass"), stage("b", "pass")]
    write_summary(tmp_path, FACTS, described(stages), [Outcome("a", "passed", 1.0, 2.0, 0, "")], 1.0)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["ok"] is False and summary["verdict"] == "NOT OK: b not reached"


def test_long_output_keeps_its_ends(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("begin" + "x" * 3_000_000 + "\nend")
    append_log(tmp_path / "logs.txt", stage("s", "pass"), Outcome("s", "passed", 1.0, 2.0, 0, ""), log)
    text = (tmp_path / "logs.txt").read_text()
    assert len(text) < 1_100_000 and "begin" in text and "left out" in text and text.rstrip().endswith("end")


# ---- the plan


@pytest.mark.parametrize("quick", [False, True], ids=["full", "quick"])
def test_the_plan_of_a_gpu_fits_its_budget(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quick: bool) -> None:
    monkeypatch.setattr(gpu_stages, "find_program", lambda name: f"/toolkit/{name}")
    stages = {s.name: s for s in plan(Options(tmp_path, quick=quick))}
    expected = {"build", "doctor", "op_tests", "gpu_tests", "kernels", "golden", "sanitizer_control"}
    expected |= set(SANITIZERS[: 2 if quick else 4]) | (set() if quick else {"block", "vae", "savings", "block_float8"})
    assert set(stages) == expected
    assert sum(s.least for s in stages.values()) < gpu_stages.BUDGETS[quick] <= (180 if quick else 600)
    assert stages["build"].environment["ECHO_RT_BUILD"] == "cuda"
    assert ("--quick" in stages["kernels"].command) is quick and "released" in stages["kernels"].command
    clean = "37 passed in 9s\n========= ERROR SUMMARY: 0 errors\n"
    assert judge(stages["memcheck"], 0, clean, 1, 1)[0] == "passed"
    assert judge(stages["memcheck"], 0, "37 passed in 9s\n", 1, 1)[0] == "failed"
    assert judge(stages["memcheck"], 0, "37 skipped in 9s\nERROR SUMMARY: 0 errors", 1, 1)[0] == "failed"
    hazards = "37 passed in 9s\n=== RACECHECK SUMMARY: {} hazards displayed (0 errors, 0 warnings)"
    assert judge(stages["racecheck"], 0, hazards.format(0), 1, 1)[0] == "passed"
    assert judge(stages["racecheck"], 0, hazards.format(2), 1, 1)[0] == "failed"
    assert judge(stages["doctor"], 0, "  - backend cuda      no\n", 1, 1)[0] == "failed"


@pytest.mark.parametrize("quick", [False, True], ids=["full", "quick"])
def test_limits_grow_with_the_budget(tmp_path: Path, quick: bool) -> None:
    """A rehearsal builds on busy cores as long as it takes: it is on nobody's time."""

    def limits(**changes: object) -> dict[str, float]:
        options = Options(tmp_path, quick=quick, **changes)  # type: ignore[arg-type]
        return {s.name: s.limit for s in plan(options)}

    whole = gpu_stages.BUDGETS[quick]
    assert limits(budget_s=2 * whole) == {name: 2 * limit for name, limit in limits().items()}
    assert limits(budget_s=whole / 2) == limits(), "what there is of it is divided anyway"
    rehearsal = limits(device="cpu")
    assert rehearsal["build"] == pytest.approx(limits()["build"] * 3600 / whole) and rehearsal["build"] > 1800
    assert Options(tmp_path, "cpu", quick).budget == 3600 and Options(tmp_path, "cpu", quick, True, 60).budget == 60


def test_an_absent_sanitizer_is_not_ok_unless_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_stages, "find_program", lambda name: None)
    stages = {s.name: s for s in plan(Options(tmp_path))}
    assert "compute-sanitizer is neither" in stages["memcheck"].absent
    assert run_all(tmp_path, [stages["memcheck"]])["memcheck"].state == "not run"
    assert not set(SANITIZERS) & {s.name for s in plan(Options(tmp_path, sanitizer=False))}


@pytest.mark.parametrize("finds", [True, False])
def test_a_sanitizer_must_find_planted_mistakes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], finds: bool
) -> None:
    count = 3 if finds else 0
    for name, text in (
        ("nvcc", "exit 0"),
        ("compute-sanitizer", f'echo "==== ERROR SUMMARY: {count} errors"; echo "RACECHECK SUMMARY: {count} hazards"'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert sanitizer_control.main() == (0 if finds else 1)
    assert capsys.readouterr().out.count("NOT found") == (0 if finds else 2)


def test_tests_are_selected_that_exist(tmp_path: Path) -> None:
    """The selections of the plan, which are texts, find tests of every kernel."""
    options = Options(tmp_path, device="cpu", quick=True)
    command = next(s for s in plan(options) if s.name == "memcheck").command
    words = command[command.index("-m") :]
    environment = stage_environment(stage("collect", ""))
    command = (sys.executable, *words, "--collect-only")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout
    # The signature of an operation is tested under its name too.
    collected = [line for line in done.stdout.splitlines() if "::test_" in line and "signatures" not in line]
    assert [op for op in OPS if not any(f"::test_{op}" in line for line in collected)] == []


def test_a_gpu_is_not_asked_for_what_it_cannot_have(tmp_path: Path) -> None:
    assert beyond_gpu(None) == beyond_gpu({"capability": "8.9"}) == beyond_gpu({"capability": "12.0"}) == {}
    without = beyond_gpu({"capability": "8.6"})
    assert set(without) <= {s.name for s in plan(Options(tmp_path))}
    write_summary(tmp_path, FACTS, described([], without=without), [], 1.0)
    expected = "block_float8, as float8 needs compute capability 8.9, this GPU has 8.6."
    assert expected in (tmp_path / "summary.md").read_text()


def test_what_pytest_counted() -> None:
    text = "==== 3 failed, 12 passed, 1 skipped in 3.21s ====\n"
    assert tests_line(text) == "3 failed, 12 passed, 1 skipped"
    assert tests_line("nothing of the kind") == ""


# ---- golden bundles


def test_a_bundle_that_is_off_is_seen(golden_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    assert verify(golden_dir / "vae", "cpu", "torch", "float32").ok
    assert refusal(golden_dir / "rollout_small", "cpu", "emulated", "float32")
    assert not refusal(golden_dir / "rollout_small", "cpu", "emulated", "bfloat16")
    assert not refusal(golden_dir / "vae", "cuda", "cuda", "float32")
    assert not refusal(golden_dir / "rollout_small", "cpu", "emulated", "float8")
    bundle = tmp_path / "elsewhere" / "vae"
    shutil.copytree(golden_dir / "vae", bundle)
    (bundle / "config.json").write_text((bundle / "config.json").read_text() + "\n")
    (bundle / "weights.safetensors").write_bytes(b"no")
    monkeypatch.setenv("ECHO_RT_GOLDEN", str(tmp_path / "elsewhere"))
    assert bundle in find_bundles(small=False) and bundle not in find_bundles(small=True)
    result = verify(bundle, "cpu", "torch", "float32")
    assert not result.ok and "weights.safetensors" in result.note


@pytest.mark.parametrize(("capability", "old"), [((8, 6), True), ((8, 9), False)])
def test_a_gpu_that_does_not_multiply_float8_must_refuse_it(
    golden_dir: Path, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], old: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    bundle, reason = golden_dir / "text_encoder", "float8 needs compute capability 8.9, this GPU has 8.6"
    assert refusal(bundle, "cuda:0", "torch", "float8") == (reason if old else "")
    assert refusal(bundle, "cuda:0", "torch", "bfloat16") == ""
    if old:
        result = verify(bundle, "cuda:0", "torch", "float8")
        assert result.ok and result.note == f"refused, as it must be: {reason}"
        monkeypatch.setattr("echo_rt.device.require_products", lambda device: None)
        monkeypatch.setattr("echo_rt.verify.parse_device", lambda device: torch.device("cpu"))
        result = verify(bundle, "cuda:0", "torch", "float8")
        assert not result.ok and result.note == f"expected a refusal of float8 ({reason}), it ran"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["golden.py", "--device", "gpu"], "golden.py: device must be 'cpu', 'cuda' or 'cuda:N'; got 'gpu'"),
        (["golden.py", "--device", "cuda:99"], "golden.py: device 'cuda:99' was asked for, but "),
        (["golden.py", "--out", "x" * 300], "x: cannot be a folder: File name too long"),
        (["environment.py", "--device", "gpu"], "environment.py: device must be 'cpu', 'cuda' or 'cuda:N'; got 'gpu'"),
        (["golden.py", "--out="], "argument --out: expected a path, got ''"),
        (["registers.py", "absent"], "absent: expected a log of nvcc -Xptxas -v, cannot read it: No such file or dir"),
    ],
)
def test_mistakes_of_the_other_scripts_are_told_in_one_line(tmp_path: Path, arguments: list[str], words: str) -> None:
    name, *given = arguments
    given = ["--out", "out", *given] if name == "golden.py" else given
    command = [sys.executable, str(ROOT / "bench" / name), *given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert "usage: " in done.stderr or len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


# ---- the script itself


def script(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, **changes}
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_the_script_rehearses(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = script(str(out), "--device", "cpu", "--quick", "--stages", "kernels")
    assert done.returncode == 0, done.stdout
    summary = json.loads((out / "summary.json").read_text())
    assert summary["ok"] is True and [row["state"] for row in summary["tables"]["Stages"]] == ["passed"]
    assert "Not a whole check" in done.stdout and "nothing of a GPU" in done.stdout
    assert (out / "kernel_times.json").is_file() and (out / "kernel_times.md").is_file()
    assert len(list(out.iterdir())) <= 8


def test_a_stage_that_did_not_run_is_in_the_exit_code(tmp_path: Path) -> None:
    done = script(str(tmp_path), "--device", "cpu", "--stages", "memcheck")
    assert done.returncode == 1 and "NOT OK: memcheck not run" in done.stdout


def test_a_check_that_is_interrupted_leaves_a_summary(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), str(tmp_path), "--device", "cpu", "--stages", "doctor,golden"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    for _ in range(600):
        if (tmp_path / ".doctor.log").exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["verdict"] == "NOT OK: doctor interrupted, golden not reached" and summary["ok"] is False
    assert "==== doctor: interrupted" in (tmp_path / "logs.txt").read_text()
    assert not (tmp_path / ".doctor.log").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_at_once(tmp_path: Path) -> None:
    done = script(str(tmp_path / "out"))
    assert done.returncode == 2 and "no GPU" in done.stderr and len(done.stderr.splitlines()) == 1
    assert done.stderr.endswith("--device cpu rehearses without a GPU\n")
    assert not (tmp_path / "out").exists()


def test_a_place_that_is_no_folder_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    done = script(str(tmp_path / "file"), "--device", "cpu", "--stages", "memcheck")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.endswith("file: expected a folder for results, got a file in its place\n")
    assert (tmp_path / "file").read_text() == "mine"
    done = script("/proc/none", "--device", "cpu", "--stages", "memcheck")
    assert done.returncode == 2 and done.stderr == "gpu.sh: /proc/none: cannot write: No such file or directory\n"


@pytest.mark.parametrize("seconds", ["0", "nan", "inf", "-5", "ten"])
def test_a_budget_that_cannot_be(tmp_path: Path, seconds: str) -> None:
    done = script(str(tmp_path / "out"), f"--budget={seconds}")
    expected = f"--budget: expected seconds above 0 and up to 604800, got '{seconds}'"
    assert done.returncode == 2 and expected in done.stderr and not (tmp_path / "out").exists()


def test_unknown_stages_are_refused(tmp_path: Path) -> None:
    done = script(str(tmp_path / "out"), "--stages", "build,dance")
    assert done.returncode == 2 and "got 'dance'" in done.stderr


def test_without_torch_it_says_how_to_name_a_python_that_has_it(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    done = script(str(tmp_path / "out"), "--device", "cpu", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"No module named 'torch' in {sys.executable}; PYTHON names one that has it" in done.stderr
    assert "--device cpu rehearses" not in done.stderr and not (tmp_path / "out").exists()
