"""The scripts around Nsight's tools, with stand-ins for the tools; the programs they profile, on the CPU."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import run_op
from cases import OPS

NSIGHT = Path(__file__).parent.parent.parent / "bench" / "nsight"
# Notes its arguments, leaves a report where it is told to, tells what is in it, and runs the program.
NCU = """#!/bin/sh
printf '%s\\n' "$@" >> "$NOTES"
case "$*" in
  *--import*) cat "$REPORT" ;;
  *) while [ "$1" != --export ]; do shift; done; : > "$2.ncu-rep"; shift 2; [ -n "$IDLE" ] || exec "$@" ;;
esac
"""


def tools(folder: Path, **programs: str) -> str:
    """A PATH with the programs, and what a shell script needs beside them."""
    folder.mkdir()
    for name in ("bash", "env", "sh", "dirname", "mkdir", "mv", "sed", "cat"):
        found = shutil.which(name)
        assert found is not None, name
        (folder / name).symlink_to(found)
    for name, text in programs.items():
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(stat.S_IRWXU)
    return str(folder)


def run(*words: str, path: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": path, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables}
    command = [str(NSIGHT / "kernel.sh"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_a_tool_that_is_missing_is_named_with_where_to_get_it(tmp_path: Path) -> None:
    done = run(str(tmp_path / "out"), "flow_step", path=tools(tmp_path / "bin"))
    assert done.returncode == 2
    wanted = "kernel.sh: needs ncu (NVIDIA Nsight Compute) on the PATH: it comes with the CUDA toolkit"
    assert done.stderr.startswith(wanted) and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_script_without_arguments_says_what_it_wants(tmp_path: Path) -> None:
    done = run(path=tools(tmp_path / "bin"))
    assert done.returncode == 2
    assert "bench/nsight/kernel.sh DIR" in done.stderr and "interpreter." in done.stderr


def test_a_kernel_is_profiled_and_its_details_printed(tmp_path: Path) -> None:
    (tmp_path / "details").write_text("  step_kernel (1, 1, 1)x(256, 1, 1)\n", encoding="utf-8")
    variables = {"REPORT": str(tmp_path / "details"), "NOTES": str(tmp_path / "notes")}
    on_cpu = ("--size", "tiny", "--device", "cpu", "--backend", "torch", "--launches", "1")
    out = tmp_path / "out"
    done = run(str(out), "flow_step", *on_cpu, path=tools(tmp_path / "bin", ncu=NCU), **variables)
    assert done.returncode == 0, done.stderr
    assert "flow_step: 1 call, backend torch, cpu" in done.stderr
    assert "step_kernel" in done.stdout and (out / "flow_step.txt").read_text(encoding="utf-8") == done.stdout
    assert {path.name for path in out.iterdir()} == {"flow_step.txt", "flow_step.ncu-rep"}
    notes = (tmp_path / "notes").read_text(encoding="utf-8").splitlines()
    assert "--section=WarpStateStats" in notes and "--profile-from-start" in notes and "details" in notes


def test_a_report_that_cannot_be_read_leaves_no_details(tmp_path: Path) -> None:
    variables = {"REPORT": str(tmp_path / "none"), "NOTES": str(tmp_path / "notes"), "IDLE": "1"}
    out = tmp_path / "out"
    done = run(str(out), "advance", path=tools(tmp_path / "bin", ncu=NCU), **variables)
    assert done.returncode != 0 and not (out / "advance.txt").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rms_silu_window", "--call", "x"], "--call of rms_silu_window must be one of '"),
        (["advance", "--launches", "0"], "--launches must be at least 1, got 0"),
    ],
)
def test_arguments_that_cannot_be_are_refused(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert run_op.main([*words, "--size", "tiny", "--device", "cpu", "--backend", "torch"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("run_op.py: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize("op", OPS)
def test_every_operation_can_be_run(capsys: pytest.CaptureFixture[str], op: str) -> None:
    assert run_op.main([op, "--size", "tiny", "--device", "cpu", "--backend", "torch", "--launches", "1"]) == 0
    assert capsys.readouterr().out.startswith(op)
