"""What the README and the first pages tell a newcomer to do, done: the demo, the Python examples, commands, links."""

from __future__ import annotations

import io
import re
import shlex
import subprocess
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import echo_rt
from echo_rt.cli.main import main
from echo_rt.output import video
from echo_rt.recipes import RECIPES

ROOT = Path(__file__).parent.parent


def demo_command() -> list[str]:
    """The arguments of echo-rt in the demo's recipe, as make would run it."""
    recipe = subprocess.run(
        ["make", "--dry-run", "--always-make", "demo", "VENV=/nowhere", "DEMO=demo"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.replace("\\\n", " ")
    (line,) = (line for line in recipe.splitlines() if " generate " in line)
    words = shlex.split(line)
    return words[words.index("generate") :]


@pytest.mark.slow
def test_the_demo_is_a_playable_video_of_what_the_library_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = demo_command()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    written = []
    write = video.VideoWriter.write
    monkeypatch.setattr(video.VideoWriter, "write", lambda self, frames: (written.append(frames), write(self, frames)))
    assert main([*arguments, "--device", "cpu", "--quiet"]) == 0

    prompts = [re.fullmatch(r"(\d+):(.*)", text) for flag, text in pairwise(arguments) if flag == "--prompt"]
    first, second = (prompt for prompt in prompts if prompt is not None)
    with echo_rt.Runtime.from_pretrained("demo", device="cpu") as runtime:
        seconds = float(arguments[arguments.index("--seconds") + 1])
        assert seconds >= 20
        count, (width, height) = int(seconds * runtime.fps), runtime.frame_size
        chunks = []
        with runtime.stream(first[2]) as stream:
            switched = False
            while stream.video_frames < count:
                if not switched and stream.video_frames >= int(second[1]) * runtime.fps:
                    stream.set_prompt(second[2])
                    switched = True
                chunks.append(next(stream).frames)
    frames = torch.cat(chunks)[:count]
    assert switched and torch.equal(torch.cat(written), frames)

    av = pytest.importorskip("av")
    with av.open("demo/demo.mp4") as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (width, height, runtime.fps)
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(decoded) == count
    # Compression loses a little; a frame out of order, or another video, would lose far more.
    error = np.abs(np.stack(decoded).astype(int) - frames.numpy().astype(int)).mean(axis=(1, 2, 3))
    assert error.max() < 12, error.max()
    assert (tmp_path / "demo" / "demo.png").read_bytes().startswith(b"\x89PNG")


def python_of(document: str) -> str:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), re.S)
    return str(example)


def printed_by(document: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that the document's Python prints, run in ``folder``."""
    monkeypatch.chdir(folder)
    out = io.StringIO()
    with redirect_stdout(out):
        exec(compile(python_of(document), document, "exec"), {})
    return out.getvalue().splitlines()


def test_the_python_example_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(python_of("README.md").strip().splitlines()) <= 10
    lines = printed_by("README.md", tmp_path, monkeypatch)
    assert lines[0].startswith("0 (9, 64, 112, 3)") and lines[10].startswith("10 (12, 64, 112, 3)")


@pytest.mark.slow
def test_the_profile_of_a_block_names_what_takes_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = printed_by("docs/profile.md", tmp_path, monkeypatch)
    assert any(line.split()[:1] == ["aten::addmm"] for line in lines), lines


@pytest.mark.parametrize("document", ["README.md", "docs/index.md"])
def test_every_command_and_option_that_is_named_exists(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    commands = set(re.findall(r"(?:`|^ *(?=.* --))echo-rt ([a-z]+)", text, re.M))
    assert commands >= {"generate", "recipes", "doctor"}
    known = set()
    for command in commands:
        out = io.StringIO()
        with redirect_stdout(out), pytest.raises(SystemExit) as done:
            main([command, "--help"])
        assert done.value.code == 0
        known |= set(re.findall(r"--[a-z][a-z-]+", out.getvalue()))
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - {"--no-build-isolation", "--help"}
    assert used <= known, used - known


def test_the_readme_is_short_and_says_what_is_confirmed() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100, "one screen of why and how; the rest goes to docs/"
    assert "](docs/testing.md" in text


def test_targets_of_make_that_documents_name_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    text = "".join(path.read_text(encoding="utf-8") for path in documents)
    named = set(re.findall(r"(?:`|^    )make ([a-z-]+)", text, re.M))
    assert {"demo", "test", "site", "wheel"} <= named <= targets, named - targets


def test_the_commands_that_download_make_what_the_readme_reads() -> None:
    files = [file for recipe in RECIPES.values() for file in recipe.as_json()["files"]]
    made = {file["download"].partition("--local-dir ")[2] for file in files}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^echo-rt generate --model .*?[^\\]$", readme, re.M | re.S)
    words = shlex.split(command.replace("\\\n", " "))
    given = {option: words[words.index(option) + 1].partition("/")[0] for option in ("--model", "--checkpoint")}
    assert set(given.values()) <= made, given
