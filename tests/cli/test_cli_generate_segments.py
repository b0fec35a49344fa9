"""``generate --segments``: what it writes, and which options and folders go with it."""

from __future__ import annotations

from pathlib import Path

import pytest

PROMPT = ("--model", "folder", "--prompt", "1")
LASTING = ("--segments", 2, "--snapshot-every", 2)


def test_segments_alone(echo_rt, fake_runtime, tmp_path, frame_count):
    outcome = echo_rt("generate", *PROMPT, "-o", tmp_path / "day", "--segments", 1, "--frames", 60, "--json")
    assert outcome.code == 0, outcome.err
    init, *others = sorted(file.name for file in (tmp_path / "day").iterdir())
    assert init.startswith("init-")
    assert others == [
        "recording.json",
        "video-00000.mp4",
        "video-00001.mp4",
        "video-00002.mp4",
        "video.m3u8",
    ]
    assert (outcome.json["frames"], outcome.json["segments"], outcome.json["latent_frames"]) == (60, 3, 0)
    assert "snapshots" not in outcome.json
    assert frame_count(tmp_path / "day" / "video.m3u8") == 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected -o OUT.mp4 (or --resume DIR), got neither"),
        (("-o", "v.mp4", "--resume", "day", "--segments", 1), "--resume and -o: expected one folder, got 'day'"),
        (("--resume", "day"), "--resume: expected --segments S with it"),
        (("-o", "v.mp4", "--snapshot-every", 3), "--snapshot-every: expected --segments S with it"),
        (("-o", "v.mp4", "--latents"), "--latents: expected FILE.safetensors"),
        (("-o", "day", "--segments", 1, "--latents", "l.safetensors"), "--latents: expected no file with --segments"),
        (("-o", "day", "--segments", 1, "--contact-sheet", "s.png"), "--contact-sheet: expected no --segments with it"),
        (("-o", "v.mp4", "--segments", 1), "-o: expected the name of a folder with --segments, got 'v.mp4'"),
        (("-o", "day", "--segments", 0), "--segments: expected a number above 0, got '0'"),
        (("-o", "day", "--segments", "x"), "--segments: expected a number above 0, got 'x'"),
        (("-o", "day", "--segments", 1, "--snapshot-every", 0), "--snapshot-every: expected an integer of 1"),
        (("-o", "day", "--segments", 1, "--snapshot-every", "1.5"), "--snapshot-every: expected an integer of 1"),
        (("-o", "folder/day", "--segments", 1), "expected a folder apart from what is read, got 'folder/day'"),
        (("-o", ".", "--segments", 1), "--output: expected a folder apart from what is read, got '.', which holds"),
        (("-o", "absent/day", "--segments", 1), "expected a folder to write into, got no folder absent"),
        (("-o", "file", "--segments", 1), "expected a folder to write into, got a file"),
        (("-o", "x" * 300, "--segments", 1), "name too long"),
        (
            ("--resume", "own", "--segments", 1),
            "expected snapshots to resume from (--snapshot-every makes them), found vi",
        ),
        (
            ("-o", "own", "--segments", 1),
            "expected a folder without a recording, found video-00000.mp4",
        ),
    ],
)
def test_contradictions(echo_rt, fake_runtime, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").write_text("")
    Path("own").mkdir()
    Path("own/video-00000.mp4").write_text("of somebody else")
    outcome = echo_rt("generate", *PROMPT, *arguments)
    assert outcome.code == 2 and message.lower() in outcome.error.lower()
    assert fake_runtime.loaded_with == {}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "folder", "own"]


def test_the_folder_of_a_soak_is_left_alone(echo_rt, fake_runtime, tmp_path):
    (tmp_path / "soak.json").write_text("{}")
    outcome = echo_rt("generate", *PROMPT, "-o", tmp_path, *LASTING)
    assert outcome.code == 2 and "got that of a soak: soak.json is in it" in outcome.err
    assert [file.name for file in tmp_path.iterdir()] == ["soak.json"]


def test_evidence_goes_into_a_folder(echo_rt, fake_runtime, tmp_path):
    (tmp_path / "file").touch()
    outcome = echo_rt("generate", *PROMPT, "-o", tmp_path / "v.mp4", "--evidence", tmp_path / "file")
    assert outcome.code == 2 and "expected a folder to write into, got a file" in outcome.err
