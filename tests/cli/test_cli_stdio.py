"""Standard streams that are closed or full, as a process meets them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from echo_rt.cli import stdio
from echo_rt.engine.prompts import save_prompt_embeds
from echo_rt.errors import OutputError

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="there is no device that is always full")


def shell(redirections: str, *arguments: object, unbuffered: bool = False) -> subprocess.CompletedProcess[str]:
    """``python -m echo_rt ARGUMENTS REDIRECTIONS``; what is not redirected is captured."""
    command = ["sh", "-c", f'exec "$@" {redirections}', "sh", sys.executable, "-m", "echo_rt", *map(str, arguments)]
    # What is left in a buffer matters at exit, so there must be buffers.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment |= {"PYTHONUNBUFFERED": "1"} if unbuffered else {}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture
def generate(small_model, tmp_path):
    """Three blocks of a real model; spares the process the text encoder."""
    embeds = tmp_path / "e.safetensors"
    save_prompt_embeds(embeds, torch.ones(4, 32))
    return (
        *("generate", "--model", small_model, "--device", "cpu", "--prompt-embeds", embeds),
        *("--frames", 30, "-o", tmp_path / "v.mp4"),
    )


@needs_full
def test_losing_standard_error_does_not_end_the_video(generate, tmp_path, frame_count):
    done = shell(f"2>{FULL}", *generate, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["frames"] == frame_count(tmp_path / "v.mp4") == 30


def test_no_file_gets_the_number_of_a_closed_stream():
    """Or what a library prints as an error would go into the video."""
    script = "import os, sys; from echo_rt.cli import stdio; stdio.prepare(); print('lost', file=sys.stderr); "
    script += "sys.exit(os.open(os.devnull, os.O_RDONLY))"
    done = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", script])
    assert 2 < done.returncode < 10


def test_no_standard_streams_at_all(generate, tmp_path, frame_count):
    done = shell("<&- >&- 2>&-", *generate)
    assert done.returncode == 0
    assert frame_count(tmp_path / "v.mp4") == 30
    assert sorted(file.name for file in tmp_path.iterdir()) == ["e.safetensors", "v.mp4"]


@needs_full
@pytest.mark.parametrize("arguments", [("verify", "--json"), ("--help",), ("generate", "--help"), ("--version",)])
@pytest.mark.parametrize("unbuffered", [False, True], ids=["buffered", "unbuffered"])
def test_a_full_standard_output_is_one_line(arguments, unbuffered):
    done = shell(f">{FULL}", *arguments, unbuffered=unbuffered)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "echo-rt: error: standard output: cannot write: No space left on device"
    assert len(done.stderr.splitlines()) == (2 if "--json" in arguments else 1), "no traceback"


@needs_full
@pytest.mark.parametrize("unbuffered", [False, True], ids=["buffered", "unbuffered"])
def test_a_table_that_cannot_be_printed(golden_dir, unbuffered):
    done = shell(f">{FULL}", "verify", str(golden_dir / "rollout_small"), unbuffered=unbuffered)
    assert done.returncode == 1
    assert done.stderr == "echo-rt: error: standard output: cannot write: No space left on device\n"


@needs_full
def test_both_full():
    assert shell(f">{FULL} 2>{FULL}", "verify", "--json").returncode == 1
    assert shell(f"2>{FULL}", "verify").returncode == 2


def test_the_report_survives_closed_standard_error():
    done = shell("2>&-", "verify", "--json")
    assert (done.returncode, json.loads(done.stdout)["exit_code"]) == (2, 2)


@needs_full
def test_a_summary_that_cannot_be_printed(echo_rt, fake_runtime, tmp_path, monkeypatch, frame_count):
    """The video is there; that the summary is not is an error of its own."""
    with FULL.open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        outcome = echo_rt("generate", "--model", "m", "--prompt", "1", "-o", tmp_path / "v.mp4", "--frames", 9)
        monkeypatch.undo()
    assert outcome.code == 1
    assert outcome.error == "standard output: cannot write: No space left on device"
    assert frame_count(tmp_path / "v.mp4") == 9


def test_say_says_why(monkeypatch):
    class Broken:
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

        def fileno(self) -> int:
            raise OSError

    monkeypatch.setattr(sys, "stdout", Broken())
    with pytest.raises(OutputError, match="standard output: cannot write: Input/output error"):
        stdio.say("a")
