"""The frame of the command line: help, errors in one line, exit codes."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from echo_rt.cli.arguments import OPTIONS
from echo_rt.cli.main import COMMANDS, _parse, main
from echo_rt.options import RuntimeOptions
from echo_rt.utils.build_info import __version__
from echo_rt.utils.folder_lock import FolderClaim
from echo_rt.utils.signals import StopNow


def test_help_is_there_without_torch():
    script = """
import sys
from echo_rt.cli.main import main
try:
    main(["generate", "--help"])
except SystemExit as done:
    heavy = {"torch", "numpy", "av", "rich", "transformers"} & set(sys.modules)
    sys.exit(f"imported {heavy}" if heavy else done.code)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    flags = "--model --checkpoint --lora --prompt --prompt-embeds --save-prompt-embeds -o --output --frames --seconds"
    flags += " --size --seed --memory --dtype --device --backend --ema --no-ema --keep-text-encoder --latents"
    flags += " --contact-sheet --json --quiet"
    assert [flag for flag in flags.split() if flag not in done.stdout] == []


def test_every_option_of_a_runtime_is_in_the_table():
    fields = {field.name for field in dataclasses.fields(RuntimeOptions)}
    declared = {option.name for option in OPTIONS.values()}
    assert {"width", "height", "check", "keep_text_encoder"} >= fields - declared
    assert declared - fields == {"model", "frame_size", "seed", "roll_back"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_page_of_help(command, capsys):
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    page = capsys.readouterr().out
    assert done.value.code == 0 and page.startswith(f"Usage: echo-rt {command} ")
    assert "--json" in page and "--debug" in page


def test_a_setting_that_is_given_twice(echo_rt):
    twice = ("--set", "local_frames=6", "--set", "local_frames=6")
    outcome = echo_rt("generate", "--model", "m", "--prompt", "a", "-o", "v.mp4", *twice)
    assert outcome.code == 2 and "--set: expected each NAME once, got local_frames again with 6" in outcome.error


def test_version_as_a_module():
    done = subprocess.run([sys.executable, "-m", "echo_rt", "--version"], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (0, f"echo-rt {__version__}\n")


def test_help_is_shown_without_a_command_and_by_the_command_help(capsys):
    def page(*arguments: str) -> str:
        with pytest.raises(SystemExit) as done:
            main(arguments)
        assert done.value.code == 0
        return capsys.readouterr().out

    assert page() == page("help") == page("--help") and "generate" in page()
    assert page("help", "doctor") == page("doctor", "--help")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["paint"], "paint"),
        (["genrate"], "Did you mean 'generate'?"),
        (["generate", "--model", "m", "--promt=a fox"], "Did you mean '--prompt' or "),
        (["generate"], "--prompt"),
        (
            ["generate", "--model", "m", "-o", "o.mp4", "--prompt", "a", "--frames", "1", "--seconds", "1"],
            "--frames and --seconds: expected one of them, got both",
        ),
        (["generate", "--model", "m", "-o", "o.mp4", "--memory", "maybe"], "maybe"),
        (
            ["generate", "--model", "m", "-o", "o.mp4", "--dtype", "bf61"],
            "half, fp8, got 'bf61' (did you mean 'bf16'?)",
        ),
        (["generate", "--prompt", "a", "--set", "sink_frame=1"], "(did you mean 'sink_frames'?)"),
        (["generate", "--model", "m", "-o", "o.mp4", "--prom", "a fox"], "--prom"),
        (["generate", "--model", "m", "--prompt", "--quiet"], "--prompt: expected a value, got the option --quiet"),
        (["generate", "--model", "m", "--prompt", "-fox"], "expected -o OUT.mp4"),
        (
            ["generate", "--model", "m", "--qualty", "3"],
            "No such option '--qualty'. Did you mean '--quiet'? (see echo-rt generate --help)",
        ),
        (["doctor", "me"], "unexpected extra argument (me) (see echo-rt doctor --help)"),
        (["verify"], "BUNDLE"),
        (["tiny"], "DIR"),
    ],
)
def test_mistaken_arguments(echo_rt, arguments, message):
    outcome = echo_rt(*arguments)
    assert outcome.code == 2
    assert message in outcome.error
    assert outcome.out == ""
    outcome = echo_rt(*arguments, "--json")
    assert outcome.code == 2
    assert outcome.json == {"error": outcome.error, "exit_code": 2}


@pytest.fixture
def broken_doctor(monkeypatch):
    """``echo_rt("doctor")`` raises what the test puts here."""

    def install(error: BaseException) -> None:
        def fail() -> None:
            raise error

        monkeypatch.setattr("echo_rt.cli.doctor.gather", fail)

    return install


def test_an_unexpected_error_is_one_line_too(echo_rt, broken_doctor, monkeypatch):
    monkeypatch.delenv("ECHO_RT_DEBUG", raising=False)
    broken_doctor(RuntimeError("first line\nsecond line"))
    outcome = echo_rt("doctor")
    assert outcome.code == 1
    assert outcome.error == "unexpected RuntimeError: first line second line (ECHO_RT_DEBUG=1 shows where)"


def test_a_package_that_is_not_there(echo_rt, broken_doctor):
    broken_doctor(ModuleNotFoundError("No module named 'torch'"))
    outcome = echo_rt("doctor")
    assert outcome.code == 1
    assert outcome.error.startswith("No module named 'torch'; echo-rt doctor shows what is missing")


def test_debug_shows_the_traceback(echo_rt, broken_doctor, monkeypatch):
    broken_doctor(RuntimeError("there"))
    assert "Traceback" in echo_rt("doctor", "--debug").err
    monkeypatch.setenv("ECHO_RT_DEBUG", "1")
    assert "Traceback" in echo_rt("doctor").err
    monkeypatch.setenv("ECHO_RT_DEBUG", "0")
    assert "Traceback" not in echo_rt("doctor").err


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (StopNow(2), 130), (StopNow(15), 143), (StopNow(1), 129)]
)
def test_exit_codes_of_signals(echo_rt, broken_doctor, error, code):
    broken_doctor(error)
    outcome = echo_rt("doctor", "--json")
    reason = "interrupted" if code == 130 else "terminated"
    assert (outcome.code, outcome.json) == (code, {"exit_reason": reason, "exit_code": code})


_CPU_ALLOCATOR = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "Tried to allocate 2 GiB"),
        (RuntimeError(f"{_CPU_ALLOCATOR}\nframe #0: c10::alloc_cpu"), _CPU_ALLOCATOR),
        (RuntimeError("CUDA error: out of memory"), "CUDA error: out of memory"),
        (MemoryError(), "MemoryError"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "Cannot allocate memory"),
    ],
    ids=["gpu", "cpu", "driver", "python", "system"],
)
def test_out_of_memory_says_what_to_do(echo_rt, broken_doctor, error, detail):
    broken_doctor(error)
    outcome = echo_rt("doctor")
    assert outcome.code == 1
    assert outcome.error.startswith("out of memory: ") and outcome.error.endswith("; use a smaller --size")
    assert detail in outcome.error and "frame #0" not in outcome.error


def test_the_real_error_of_memory_that_is_not_there(echo_rt, monkeypatch):
    monkeypatch.setattr("echo_rt.cli.doctor.gather", lambda: torch.empty(2**50, dtype=torch.float64))
    outcome = echo_rt("doctor")
    assert outcome.code == 1 and outcome.error.startswith("out of memory: ")


def test_warnings_are_one_line(echo_rt, monkeypatch):
    import warnings

    monkeypatch.setattr("echo_rt.cli.doctor.gather", lambda: warnings.warn("some\nthing", stacklevel=1) or [])
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        outcome = echo_rt("doctor", "--json")
    assert outcome.err == "echo-rt: warning: some thing\n"
    assert outcome.json["warnings"] == ["some thing"]


def test_a_reader_that_leaves(tmp_path):
    """``echo-rt ... | head -1`` ends without a traceback."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "echo_rt", "generate", "--json"], stdout=write, stderr=subprocess.PIPE, timeout=60
    )
    os.close(write)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr


def test_main_takes_the_arguments_of_the_process(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["echo-rt", "verify", "--json"])
    assert main() == 2
    assert json.loads(capsys.readouterr().out)["exit_code"] == 2


def test_a_default_is_what_the_help_says():
    _, given = _parse(["serve"])
    assert (given.port, given.viewers, given.idle, given.out) == (8000, 64, 60.0, Path("echo-rt-live"))
    assert given.storage is None and _parse(["tiny", "folder"])[1].seed == 0
    _, given = _parse(["soak", "--out", "day", "--blocks", "3"])
    assert (given.keep, given.warmup_blocks, given.drift) == (None, 10, None), "those of a soak are its own"


# Torch, as its import is when a signal comes in it: whatever is raised there is swallowed, and all goes on.
STRUCK = """
import importlib.abc, os, signal, sys
class Struck(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except BaseException:
                pass
sys.meta_path.insert(0, Struck())
from echo_rt.cli.main import main
code = main(sys.argv[1:])
print("it went on")
sys.exit(code)
"""


@pytest.mark.parametrize(
    "line",
    [
        "generate --prompt ball -o v.mp4",
        "soak --out s --blocks 1",
        "serve --port 0 --out s",
        "bench",
        "verify demo",
        "tiny t",
        "doctor",
    ],
)
def test_ctrl_c_amid_the_import_of_torch_ends_at_once(line, tmp_path):
    command = [sys.executable, "-c", STRUCK, *line.split(), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 130, done.stderr
    report = json.loads(done.stdout)
    assert (report["exit_reason"], report["exit_code"]) == ("interrupted", 130)
    assert done.stderr == "\necho-rt: stopping\n" and list(tmp_path.iterdir()) == []


def test_ctrl_c_before_the_command_is_imported_shows_no_traceback():
    script = """
import importlib.abc, runpy, sys
class Struck(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "click":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Struck())
runpy.run_module("echo_rt", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize(
    "line",
    [
        "generate --prompt ball --resume day --segments 10 --snapshot-every 100",
        "generate --prompt ball -o day --segments 10",
        "generate --prompt ball -o v.mp4 --evidence day",
        "soak --out day --blocks 1",
        "serve --out day --resume",
    ],
)
def test_a_folder_that_another_process_writes_into_is_refused_before_torch_is_imported(line, tmp_path):
    script = "import sys; sys.modules['torch'] = None; from echo_rt.cli.main import main; sys.exit(main(sys.argv[1:]))"
    claim = FolderClaim(tmp_path / "day")
    try:
        command = [sys.executable, "-c", script, *line.split()]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    finally:
        claim.release()
    assert (done.returncode, done.stderr) == (
        2,
        "echo-rt: error: day: cannot be written into: another process writes into it\n",
    )
