"""``generate --from``: a video or a picture first, the generated video behind it, in one file or in pieces."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from echo_rt.cli import generation
from echo_rt.errors import ConfigError
from echo_rt.options import RuntimeOptions
from echo_rt.output import VideoFile, VideoWriter
from echo_rt.output.contact_sheet import ContactSheet
from echo_rt.output.segments import RecordingIndex

FAKE = ("generate", "--model", "folder", "--prompt", "1")


def write_clip(path: Path, frames: int, width: int = 32, height: int = 32, fps: int = 16) -> Path:
    generator = np.random.default_rng(5)
    colours = generator.integers(0, 255, (frames, 2, 2, 3), dtype=np.uint8)
    writer = VideoWriter(path, width, height, fps, crf=1)
    writer.write(colours.repeat(height // 2, axis=1).repeat(width // 2, axis=2))
    writer.close()
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 frames, two blocks."""
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", 21)


@pytest.fixture
def command(small_model, tmp_path):
    checkpoint = ("--checkpoint", small_model / "echo_infinity.pt", "--set", "denoising_steps=1000,500")
    return (
        "generate",
        "--model",
        small_model,
        *checkpoint,
        "--device",
        "cpu",
        "--quiet",
        "--json",
        "--prompt",
        "a fox",
    )


def test_the_video_goes_on_from_it(echo_rt, command, clip, tmp_path, frame_count, small_model):
    from streaming import load

    latents = tmp_path / "l.safetensors"
    outcome = echo_rt(*command, "-o", tmp_path / "v.mp4", "--from", clip, "--frames", 45, "--latents", latents)
    assert outcome.code == 0, outcome.err
    assert outcome.err == ""
    assert outcome.json["from"] == {"file": str(clip), "frames": 21, "fps": 16.0}
    assert (outcome.json["frames"], outcome.json["blocks"]) == (45, 4) and frame_count(tmp_path / "v.mp4") == 45
    with load(small_model, overrides={"denoising_steps": (1000, 500)}) as runtime:
        given = runtime._engine.initial_video.encode(VideoFile(clip))
        with runtime.stream("a fox", initial_video=VideoFile(clip)) as stream:
            made = torch.cat([next(stream).latents for _ in range(4)])
    assert torch.equal(load_file(latents)["latents"], made) and torch.equal(made[: len(given)], given)


def test_only_what_is_new(echo_rt, command, clip, tmp_path, frame_count):
    """The same frames behind it, and times of prompts that count from the first of them."""
    prompts = ("--prompt", "1.5:a lake")
    whole, new = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    both = ("--from", clip, "--latents")
    late = ("--prompt", f"{1.5 + 21 / 16}:a lake")
    assert echo_rt(*command, *late, *both, whole, "-o", tmp_path / "v.mp4", "--frames", 81).code == 0
    outcome = echo_rt(*command, *prompts, *both, new, "-o", tmp_path / "w.mp4", "--frames", 60, "--only-new")
    assert outcome.code == 0, outcome.err
    assert outcome.json["frames"] == 60 == frame_count(tmp_path / "w.mp4") and outcome.json["blocks"] == 5
    assert [(shown["frame"], shown["text"]) for shown in outcome.json["prompts"]] == [(0, "a fox"), (24, "a lake")]
    assert torch.equal(load_file(new)["latents"], load_file(whole)["latents"][6:])


@pytest.mark.parametrize("only_new", [False, True])
def test_in_pieces_and_gone_on_with(echo_rt, command, tmp_path, only_new):
    """The file is not needed any more, but may be named again; another one may not."""
    clip, folder = write_clip(tmp_path / "clip.mp4", 21), tmp_path / "day"
    more = ("--prompt", "2:a lake", *(("--only-new",) if only_new else ()))
    lasting = ("--segments", 1, "--snapshot-every", 1, "--latents")
    plain = echo_rt(
        *command,
        *more,
        "--from",
        clip,
        "-o",
        tmp_path / "v.mp4",
        "--frames",
        81,
        "--latents",
        tmp_path / "l.safetensors",
    )
    assert plain.code == 0, plain.err
    expected = load_file(tmp_path / "l.safetensors")["latents"]

    def recorded() -> torch.Tensor:
        segments = RecordingIndex.read(folder).segments
        return torch.cat([load_file(folder / s.latents_file)["latents"] for s in segments])

    first = echo_rt(*command, *more, *lasting, "--from", clip, "-o", folder, "--frames", 12 if only_new else 9)
    assert first.code == 0, first.err
    assert torch.equal(recorded(), expected[:3])
    if not only_new:  # the snapshot is amid what was given
        assert first.json["frames"] == 9
    clip.unlink()
    other = write_clip(tmp_path / "other.mp4", 21)
    wrong = echo_rt(*command, *more, *lasting, "--from", other, "--resume", folder, "--frames", 81)
    assert wrong.code == 2 and f"--from: the video was begun with '{clip}', got '{other}'" in wrong.error
    if not only_new:
        wrong = echo_rt(*command, *more, *lasting, "--from", clip, "--only-new", "--resume", folder, "--frames", 81)
        assert wrong.code == 2 and "--only-new: expected what the video was begun with" in wrong.error
    outcome = echo_rt(*command, *more, *lasting, "--from", clip, "--resume", folder, "--frames", 45)
    assert outcome.code == 0, outcome.err
    assert outcome.json["resumed_at_frame"] == first.json["frames"] and "from" not in outcome.json
    outcome = echo_rt(*command, "--prompt", "2:a lake", *lasting, "--resume", folder, "--frames", 81)
    assert outcome.code == 0, outcome.err
    assert torch.equal(recorded(), expected)


def test_a_video_that_was_begun_without_one(echo_rt, command, clip, tmp_path):
    lasting = ("--segments", 1, "--snapshot-every", 1)
    assert echo_rt(*command, *lasting, "-o", tmp_path / "day", "--frames", 9).code == 0
    outcome = echo_rt(*command, *lasting, "--from", clip, "--resume", tmp_path / "day", "--frames", 21)
    assert outcome.code == 2 and "--from: the video was begun with none, got" in outcome.error


def test_another_rate_is_told_once(echo_rt, command, tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", 9, fps=24)
    outcome = echo_rt(*command, "-o", tmp_path / "v.mp4", "--from", clip, "--frames", 9)
    assert outcome.code == 0, outcome.err
    rate, end = outcome.json["warnings"]
    assert "24 frames a second and the video 16" in rate and "0.667 times as fast" in rate
    assert "the video ends within the 9 frames of" in end


def test_another_size_has_to_be_fitted(echo_rt, command, tmp_path):
    clip, out = write_clip(tmp_path / "clip.mp4", 9, width=64, height=48), tmp_path / "v.mp4"
    arguments = (*command, "-o", out, "--from", clip, "--frames", 10)
    outcome = echo_rt(*arguments)
    assert outcome.code == 2 and "expected frames of 32x32 pixels, got 64x48; " in outcome.error
    assert "--fit" in outcome.error and not out.exists()
    for fit in ("crop", "pad"):
        assert echo_rt(*arguments, "--overwrite", "--fit", fit).code == 0
    assert out.exists()


def test_a_refused_video_is_refused_before_the_model_is_loaded(echo_rt, command, tmp_path, monkeypatch):
    monkeypatch.setattr("echo_rt.cli.generation.Runtime", None)
    clip = write_clip(tmp_path / "clip.mp4", 10)
    outcome = echo_rt(*command, "--segments", 1, "-o", tmp_path / "day", "--from", clip)
    assert outcome.code == 2 and "must fill blocks of 3 latent frames: expected 9 or 21 frames, got 10" in outcome.error
    assert not (tmp_path / "day").exists() and "warning" not in outcome.err


def test_a_block_of_a_folder_that_changes_its_recipe(small_model, tmp_path):
    """The frames of its own blocks are expected before loading, as after it."""
    shutil.copytree(small_model, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    config["echo_rt"] |= {"recipe": "self-forcing", "frames_per_block": 1}
    file.write_text(json.dumps(config))
    for recipe in (None, "self-forcing"):
        options, arguments = RuntimeOptions(recipe=recipe), SimpleNamespace(model=str(tmp_path / "model"))
        generation._check_initial(SimpleNamespace(options=options, arguments=arguments), 5)
        with pytest.raises(ConfigError, match="expected 5 or 9 frames, got 6"):
            generation._check_initial(SimpleNamespace(options=options, arguments=arguments), 6)


def test_a_picture(echo_rt, command, tmp_path, frame_count):
    sheet = ContactSheet(tmp_path / "picture.png", fps=16)
    sheet.write(np.full((9, 32, 32, 3), 90, np.uint8))
    sheet.close()
    arguments = (*command, "-o", tmp_path / "v.mp4", "--from", tmp_path / "picture.png", "--fit", "crop", "--frames", 9)
    outcome = echo_rt(*arguments)
    assert outcome.code == 2 and "a picture begins a video only where a block is 1 latent frame" in outcome.error
    outcome = echo_rt(*arguments, "--memory", "off", "--set", "frames_per_block=1")
    assert outcome.code == 0, outcome.err
    assert frame_count(tmp_path / "v.mp4") == 9 and outcome.json["from"]["fps"] is None
    assert "warnings" not in outcome.json


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--from", "absent.mp4"), "absent.mp4: expected a video or a picture, cannot read it: No such file"),
        (("--from", "text.mp4"), "text.mp4: expected a video or a picture, cannot read it: "),
        (("--fit", "crop"), "--fit: expected --from FILE with it"),
        (("--only-new",), "--only-new: expected --from FILE with it"),
        (
            ("--from", "v.mp4"),
            "--output: expected a file apart from what is read, got 'v.mp4', which belongs to --from",
        ),
    ],
)
def test_before_the_model_is_loaded(echo_rt, fake_runtime, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("text.mp4").write_text("no video\n" * 99)
    outcome = echo_rt(*FAKE, "-o", "v.mp4", *arguments)
    assert outcome.code == 2 and message in outcome.error
    assert fake_runtime.loaded_with == {}


def test_too_long_a_video(echo_rt, fake_runtime, clip, tmp_path, monkeypatch):
    monkeypatch.setattr("echo_rt.cli.generation.MOST_INITIAL_SECONDS", 1)
    outcome = echo_rt(*FAKE, "-o", tmp_path / "v.mp4", "--from", clip)
    assert outcome.code == 2 and "expected a video of 16 frames at most, got more" in outcome.error
    assert fake_runtime.loaded_with == {}
