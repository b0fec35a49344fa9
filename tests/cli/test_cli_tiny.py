"""``tiny``: writes a folder that ``generate`` takes, and says so."""

from __future__ import annotations

import shlex


def test_what_it_says_to_run_runs(echo_rt, tmp_path, monkeypatch, frame_count):
    monkeypatch.chdir(tmp_path)
    outcome = echo_rt("tiny", "a model")
    assert (outcome.code, outcome.err) == (0, "")
    command = shlex.split(outcome.out.splitlines()[1])
    assert command[:2] == ["echo-rt", "generate"]
    made = echo_rt(*command[1:], "--seconds", "0.5", "--device", "cpu")
    assert made.code == 0, made.err
    assert frame_count(tmp_path / "tiny.mp4") == 8


def test_an_existing_folder(echo_rt, tmp_path):
    folder = tmp_path / "model"
    outcome = echo_rt("tiny", folder, "--json")
    assert outcome.json == {
        "folder": str(folder),
        "checkpoint": str(folder / "echo_infinity.pt"),
        "seed": 0,
        "exit_code": 0,
    }
    before = (folder / "echo_infinity.pt").read_bytes()
    outcome = echo_rt("tiny", folder, "--seed", 1)
    assert outcome.code == 2 and str(folder) in outcome.error
    assert (folder / "echo_infinity.pt").read_bytes() == before
    assert echo_rt("tiny", folder, "--seed", 1, "--overwrite").code == 0
    assert (folder / "echo_infinity.pt").read_bytes() != before


def test_mistakes(echo_rt, tmp_path):
    outcome = echo_rt("tiny", tmp_path / "model", "--seed", "x")
    assert outcome.code == 2 and "'x'" in outcome.error
    outcome = echo_rt("tiny", tmp_path / "model", "--seed=-1")
    assert outcome.code == 2 and "-1" in outcome.error
    (tmp_path / "file").write_text("")
    outcome = echo_rt("tiny", tmp_path / "file")
    assert outcome.code == 2 and "file" in outcome.error
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
