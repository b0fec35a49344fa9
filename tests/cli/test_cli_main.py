"""The frame of the command line: help, errors in one line, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from echo_rt.build_info import __version__
from echo_rt.cli.main import main
from echo_rt.cli.signals import StopNow


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
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    flags = "--model --checkpoint --lora --prompt --prompt-embeds --save-prompt-embeds -o --output --frames --seconds"
    flags += " --size --seed --memory --dtype --device --backend --ema --no-ema --keep-text-encoder --latents"
    flags += " --contact-sheet --json --quiet"
    assert [flag for flag in flags.split() if flag not in done.stdout] == []


def test_version_as_a_module():
    done = subprocess.run([sys.executable, "-m", "echo_rt", "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"echo-rt {__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["paint"], "paint"),
        (["generate"], "--model"),
        (["generate", "--model", "m", "-o", "o.mp4", "--frames", "1", "--seconds", "1"], "not allowed with"),
        (["generate", "--model", "m", "-o", "o.mp4", "--memory", "maybe"], "maybe"),
        (["generate", "--model", "m", "-o", "o.mp4", "--dtype", "int8"], "int8"),
        (["generate", "--model", "m", "-o", "o.mp4", "--prom", "a fox"], "--prom"),
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

        monkeypatch.setattr("echo_rt.cli.doctor_checks.gather", fail)

    return install


def test_an_unexpected_error_is_one_line_too(echo_rt, broken_doctor, monkeypatch):
    monkeypatch.delenv("ECHO_RT_DEBUG", raising=False)
    broken_doctor(RuntimeError("first line\nsecond line"))
    outcome = echo_rt("doctor")
    assert outcome.code == 1
    assert outcome.error == "unexpected RuntimeError: first line second line (ECHO_RT_DEBUG=1 shows where)"


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
    assert echo_rt("doctor").code == code


def test_out_of_gpu_memory_says_what_to_do(echo_rt, broken_doctor):
    import torch

    broken_doctor(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    outcome = echo_rt("doctor")
    assert outcome.code == 1
    assert "--size" in outcome.error and "Tried to allocate 2 GiB" in outcome.error


def test_warnings_are_one_line(echo_rt, monkeypatch):
    import warnings

    monkeypatch.setattr("echo_rt.cli.doctor_checks.gather", lambda: warnings.warn("some\nthing", stacklevel=1) or [])
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert echo_rt("doctor", "--json").err == "echo-rt: warning: some thing\n"


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
