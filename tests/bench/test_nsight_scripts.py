"""The scripts around Nsight's tools, with stand-ins for the tools; the programs they profile, on the CPU."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import test_nsight_block
import test_nsight_kernel
from cases import OPS

from echo_rt.weights.tiny_model import CHECKPOINT_FILE

NSIGHT = Path(__file__).parent.parent.parent / "bench" / "nsight"
# Both note their arguments, leave a report where they are told to, tell what is in it, and run the program.
NCU = """#!/bin/sh
printf '%s\\n' "$@" >> "$NOTES"
case "$*" in
  *--import*) cat "$REPORT" ;;
  *) while [ "$1" != --export ]; do shift; done; : > "$2.ncu-rep"; shift 2; [ -n "$IDLE" ] || exec "$@" ;;
esac
"""
NSYS = """#!/bin/sh
printf '%s\\n' "$@" >> "$NOTES"
for word; do case "$word" in --output=*) output=${word#--output=} ;; esac; done
case "$1" in
  export) cp "$REPORT" "$output" ;;
  profile) : > "$output.nsys-rep"; while [ "${1%.py}" = "$1" ]; do last=$1; shift; done; exec "$last" "$@" ;;
esac
"""


def tools(folder: Path, **programs: str) -> str:
    """A PATH with the programs, and what a shell script needs beside them."""
    folder.mkdir()
    for name in ("bash", "env", "sh", "dirname", "mkdir", "tee", "sed", "cat", "cp"):
        found = shutil.which(name)
        assert found is not None, name
        (folder / name).symlink_to(found)
    for name, text in programs.items():
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(stat.S_IRWXU)
    return str(folder)


def run(script: str, *words: str, path: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": path, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables}
    command = [str(NSIGHT / script), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.parametrize(
    ("script", "words", "tool"),
    [("kernel.sh", ["flow_step"], "ncu (NVIDIA Nsight Compute)"), ("block.sh", [], "nsys (NVIDIA Nsight Systems)")],
)
def test_a_tool_that_is_missing_is_named_with_where_to_get_it(
    tmp_path: Path, script: str, words: list[str], tool: str
) -> None:
    done = run(script, str(tmp_path / "out"), *words, path=tools(tmp_path / "bin"))
    assert done.returncode == 2
    assert done.stderr.startswith(f"{script}: needs {tool} on the PATH: it comes with the CUDA toolkit")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", ["kernel.sh", "block.sh"])
def test_a_script_without_arguments_says_what_it_wants(tmp_path: Path, script: str) -> None:
    done = run(script, path=tools(tmp_path / "bin"))
    assert done.returncode == 2
    assert f"bench/nsight/{script} DIR" in done.stderr and "interpreter." in done.stderr


def test_a_kernel_is_profiled_and_its_table_printed(tmp_path: Path) -> None:
    t = test_nsight_kernel
    (tmp_path / "raw.csv").write_text(t.report(t.HEADER, t.UNITS, *t.LAUNCHES), encoding="utf-8")
    variables = {"REPORT": str(tmp_path / "raw.csv"), "NOTES": str(tmp_path / "notes")}
    on_cpu = ("--size", "tiny", "--device", "cpu", "--backend", "torch", "--launches", "1")
    out = tmp_path / "out"
    done = run("kernel.sh", str(out), "flow_step", *on_cpu, path=tools(tmp_path / "bin", ncu=NCU), **variables)
    assert done.returncode == 0, done.stderr
    assert "flow_step: 1 call, backend torch, cpu" in done.stderr
    assert "| step_kernel<float> " in done.stdout
    assert (out / "flow_step.md").read_text(encoding="utf-8") == done.stdout
    assert {path.name for path in out.iterdir()} == {"flow_step.csv", "flow_step.md", "flow_step.ncu-rep"}
    notes = (tmp_path / "notes").read_text(encoding="utf-8").splitlines()
    assert ",".join(t.ncu_csv.METRICS) in notes and "WarpStateStats" in notes and "--print-units" in notes


def test_a_report_that_cannot_be_read_leaves_no_table(tmp_path: Path) -> None:
    (tmp_path / "raw.csv").write_text("==WARNING== No kernels were profiled.\n", encoding="utf-8")
    variables = {"REPORT": str(tmp_path / "raw.csv"), "NOTES": str(tmp_path / "notes"), "IDLE": "1"}
    out = tmp_path / "out"
    done = run("kernel.sh", str(out), "advance", path=tools(tmp_path / "bin", ncu=NCU), **variables)
    assert done.returncode != 0
    assert "expected CSV of ncu" in done.stderr
    assert not (out / "advance.md").exists()


def test_blocks_are_profiled_and_their_table_printed(tmp_path: Path, tiny_model: Path) -> None:
    variables = {
        "REPORT": str(test_nsight_block.write(tmp_path / "made.sqlite")),
        "NOTES": str(tmp_path / "notes"),
    }
    model = ("--model", str(tiny_model), "--checkpoint", str(tiny_model / CHECKPOINT_FILE), "--memory", "off")
    on_cpu = ("--device", "cpu", "--backend", "torch", "--warm", "0", "--blocks", "1")
    out = tmp_path / "out"
    done = run("block.sh", str(out), *model, *on_cpu, path=tools(tmp_path / "bin", nsys=NSYS), **variables)
    assert done.returncode == 0, done.stderr
    assert "1 block, the last of them block" in done.stderr
    assert "| Rollout._denoise " in done.stdout
    assert {path.name for path in out.iterdir()} == {"block.md", "block.nsys-rep", "block.sqlite"}
    notes = (tmp_path / "notes").read_text(encoding="utf-8").splitlines()
    assert "--cuda-graph-trace=node" in notes and "--capture-range=cudaProfilerApi" in notes


def test_without_a_model_a_tiny_one_is_made_and_goes_again() -> None:
    import run_block

    with run_block.model_files(None, None) as (model, checkpoint):
        assert checkpoint is not None and Path(checkpoint).parent == Path(model)
        assert Path(checkpoint).is_file() and (Path(model) / "config.json").is_file()
    assert not Path(model).exists()


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("run_op.py", ["rms_silu_window", "--call", "x"], "--call of rms_silu_window must be one of '"),
        ("run_op.py", ["advance", "--launches", "0"], "--launches must be at least 1, got 0"),
        ("run_block.py", ["--checkpoint", "a.pt"], "--checkpoint needs --model"),
        ("run_block.py", ["--blocks", "0"], "--blocks of at least 1, got 4 and 0"),
    ],
)
def test_arguments_that_cannot_be_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], script: str, words: list[str], message: str
) -> None:
    import run_block
    import run_op

    main = {"run_op.py": run_op.main, "run_block.py": run_block.main}[script]
    size = ["--size", "tiny"] if script == "run_op.py" else []
    assert main([*words, *size, "--device", "cpu", "--backend", "torch"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{script}: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize("op", OPS)
def test_every_operation_can_be_run(capsys: pytest.CaptureFixture[str], op: str) -> None:
    import run_op

    assert run_op.main([op, "--size", "tiny", "--device", "cpu", "--backend", "torch", "--launches", "1"]) == 0
    assert capsys.readouterr().out.startswith(op)
