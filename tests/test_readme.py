"""What the README tells a newcomer to do, done: the demo and the Python example."""

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
from echo_rt.weights.tiny_model import write_tiny_model

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model at ``demo/tiny``, where `make demo` puts it."""
    folder = tmp_path_factory.mktemp("readme") / "demo" / "tiny"
    write_tiny_model(folder)
    return folder


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
    demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = demo_command()
    monkeypatch.chdir(demo_model.parent.parent)
    written = []
    write = video.VideoWriter.write
    monkeypatch.setattr(video.VideoWriter, "write", lambda self, frames: (written.append(frames), write(self, frames)))
    assert main([*arguments, "--device", "cpu", "--quiet"]) == 0

    prompts = [re.fullmatch(r"(\d+):(.*)", text) for flag, text in pairwise(arguments) if flag == "--prompt"]
    first, second = (prompt for prompt in prompts if prompt is not None)
    with echo_rt.Runtime.from_pretrained("demo/tiny", checkpoint="demo/tiny/echo_infinity.pt", device="cpu") as runtime:
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
    assert (demo_model.parent / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_the_python_example_runs_as_it_stands(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert len(example.strip().splitlines()) <= 10
    monkeypatch.chdir(demo_model.parent.parent)
    out = io.StringIO()
    with redirect_stdout(out):
        exec(compile(example, "README.md", "exec"), {})
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("0 (9, 80, 128, 3)") and lines[10].startswith("10 (12, 80, 128, 3)")


def test_every_command_and_option_in_the_readme_exists() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = set(re.findall(r"(?:`|^(?=.* --))echo-rt ([a-z]+)", readme, re.M))
    assert commands >= {"generate", "verify", "tiny", "doctor"}
    known = set()
    for command in commands:
        out = io.StringIO()
        with redirect_stdout(out), pytest.raises(SystemExit) as done:
            main([command, "--help"])
        assert done.value.code == 0
        known |= set(re.findall(r"--[a-z][a-z-]+", out.getvalue()))
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", readme)) - {"--no-build-isolation", "--inplace", "--help"}
    assert used <= known, used - known
