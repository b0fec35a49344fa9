"""What files and users say is shown, not obeyed: escape sequences and line breaks reach no terminal."""

from __future__ import annotations

import io
import json
import logging
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from echo_rt.cli import stdio
from echo_rt.cli.progress import ProgressReport
from echo_rt.errors import PromptError

RED = "\x1b[31m"
FORGED = "a fox\necho-rt: error: the disk is full\x1b]0;owned\x07\u202e"


def assert_printable(text: str) -> None:
    """Every line is one of ours, and holds nothing that a terminal would obey."""
    assert all(line.isprintable() for line in text.splitlines()), text
    assert "\r" not in text and "\\x1b" in text, text


@pytest.fixture
def model(small_model: Path, tmp_path: Path) -> Path:
    """A copy of the model's folder that a test may change."""
    return Path(shutil.copytree(small_model, tmp_path / "model"))


def generate(model: object, folder: Path, *more: object, prompt: str = "1") -> tuple[object, ...]:
    return "generate", "--model", model, "--prompt", prompt, "-o", folder / "v.mp4", "--frames", 9, *more


def test_a_path(echo_rt: Any, tmp_path: Path) -> None:
    outcome = echo_rt(*generate(tmp_path / f"no{RED}model\nhere", tmp_path))
    assert outcome.code == 2
    assert_printable(outcome.err)
    assert [line.split()[1] for line in outcome.err.splitlines()] == ["loading", "error:"]
    outcome = echo_rt(*generate(tmp_path / "no\x7f", tmp_path, "--json"))
    assert "no\x7f" in outcome.json["error"] and "\x7f" not in outcome.out


def test_an_option_that_is_none(echo_rt: Any, tmp_path: Path) -> None:
    for word in (f"--{RED}", f"--memory={RED}", f"--set={RED}=1", f"--seed={RED}"):
        outcome = echo_rt(*generate("m", tmp_path, word))
        assert outcome.code == 2
        assert_printable(outcome.err)


def test_a_key_of_the_config(echo_rt: Any, model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["echo_rt"][f"size{RED}\nx"] = 3
    (model / "config.json").write_text(json.dumps(config))
    outcome = echo_rt(*generate(model, tmp_path))
    assert outcome.code == 2 and "size" in outcome.error
    assert_printable(outcome.err)


def test_the_name_of_a_shard(echo_rt: Any, model: Path, tmp_path: Path) -> None:
    index = {"metadata": {}, "weight_map": {"a": f"part{RED}.safetensors"}}
    checkpoint = tmp_path / "c.safetensors.index.json"
    checkpoint.write_text(json.dumps(index))
    outcome = echo_rt(*generate(model, tmp_path, "--checkpoint", checkpoint))
    assert outcome.code == 2 and "part" in outcome.error
    assert_printable(outcome.err)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_prompt_cannot_forge_an_error(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither on a plain line of progress nor on a live one."""
    shown = io.StringIO()
    monkeypatch.setattr(shown, "isatty", lambda: terminal)
    monkeypatch.setattr("sys.stderr", shown)
    report = ProgressReport(48, 16.0)
    report.block_done(12, FORGED)
    report.close()
    text = shown.getvalue()
    assert not [line for line in text.splitlines() if line.startswith("echo-rt: error:")]
    assert "\x07" not in text and "\x1b]0" not in text and "\u202e" not in text


def test_a_refused_prompt_and_its_traceback(echo_rt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECHO_RT_DEBUG", "1")

    def refuse(*_: object) -> None:
        raise PromptError(FORGED)

    monkeypatch.setattr("echo_rt.cli.request.parse_script", refuse)
    outcome = echo_rt(*generate("m", tmp_path))
    assert outcome.code == 2 and "Traceback" in outcome.err
    assert_printable(outcome.err)
    assert len([line for line in outcome.err.splitlines() if line.startswith("echo-rt: error:")]) == 1


def test_the_summary(echo_rt: Any, fake_runtime: Any, tmp_path: Path) -> None:
    outcome = echo_rt(*generate("m", tmp_path)[:-4], "-o", tmp_path / f"{RED}\nforged.mp4", "--frames", 9)
    assert outcome.code == 0, outcome.err
    assert len(outcome.out.splitlines()) == 1
    assert_printable(outcome.out)


def test_warnings_and_logs(echo_rt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def gather() -> list[object]:
        warnings.warn(f"warned {FORGED}", stacklevel=1)
        logging.getLogger("echo_rt.somewhere").warning("logged %s", FORGED)
        return []

    monkeypatch.setattr("echo_rt.cli.doctor.gather", gather)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        outcome = echo_rt("doctor", "--json")
    assert_printable(outcome.err)
    warned, logged = outcome.err.splitlines()
    assert warned.startswith("echo-rt: warning: warned a fox echo-rt: error")
    assert logged.startswith("echo-rt: warning: logged a fox")
    assert [text.split()[0] for text in outcome.json["warnings"]] == ["warned", "logged"]


@pytest.mark.parametrize("quiet", [False, True])
def test_a_log_at_level_info(quiet: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with stdio.ShownLog({}, quiet=quiet):
        logging.getLogger("echo_rt.recipe").info("told %s", FORGED)
        logging.getLogger("echo_rt.recipe").debug("a detail")
    told = capsys.readouterr().err
    assert told == ("" if quiet else "echo-rt: told a fox echo-rt: error: the disk is full\\x1b]0;owned\\x07\\u202e\n")


@pytest.mark.parametrize("show", [stdio.say, stdio.complain])
def test_the_one_place(show: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    show("one", f"two{FORGED}")
    shown = "".join(capsys.readouterr())
    assert shown == "one\ntwoa fox\\necho-rt: error: the disk is full\\x1b]0;owned\\x07\\u202e\n"
