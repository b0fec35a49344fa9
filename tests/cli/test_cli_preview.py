"""``--vae``: previews by a tiny decoder, and what is said where there is none."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture
def arguments(small_model):
    """A command that works; the prompt has no letters that a tokenizer would have to be loaded twice for."""
    model = ("generate", "--model", small_model, "--checkpoint", small_model / "echo_infinity.pt")
    return (*model, "--device", "cpu", "--quiet", "--prompt", "a red fox", "--seed", 4)


def test_a_preview_has_the_latents_of_the_video(echo_rt, arguments, tmp_path, frame_count):
    videos, latents = {}, {}
    for vae in ("wan", "tiny"):
        video, file = tmp_path / f"{vae}.mp4", tmp_path / f"{vae}.safetensors"
        outcome = echo_rt(*arguments, "--vae", vae, "--frames", 21, "-o", video, "--latents", file)
        assert outcome.code == 0, outcome.err
        assert frame_count(video) == 21
        videos[vae], latents[vae] = video.read_bytes(), load_file(file)["latents"]
    assert torch.equal(latents["wan"], latents["tiny"])
    assert videos["wan"] != videos["tiny"]


def test_no_tiny_decoder(echo_rt, arguments, small_model, tmp_path, frame_count):
    folder = tmp_path / "model"
    shutil.copytree(small_model, folder, ignore=shutil.ignore_patterns("taew*"))
    without = (*arguments, "--model", folder, "-o", tmp_path / "v.mp4", "--frames", 9)
    outcome = echo_rt(*without, "--vae", "tiny")
    assert outcome.code == 2
    assert str(folder) in outcome.error and "taew2_1{.pth,.safetensors} (of madebyollin's TAEHV)" in outcome.error
    outcome = echo_rt(*without, "--vae", "tinny")
    assert outcome.code == 2 and "expected 'wan', 'tiny' or the path of a tiny decoder's file" in outcome.error
    outcome = echo_rt(*without, "--vae", "")
    assert outcome.code == 2 and "--vae: expected a path, got ''" in outcome.error
    assert not (tmp_path / "v.mp4").exists()
    assert echo_rt(*without, "--vae", small_model / "taew2_1.pth").code == 0
    assert frame_count(tmp_path / "v.mp4") == 9


def test_a_decoder_is_not_written_over(echo_rt, arguments, tmp_path):
    file = tmp_path / "taew2_1.safetensors"
    file.write_bytes(b"mine")
    outcome = echo_rt(*arguments, "--vae", file, "--frames", 9, "-o", tmp_path / "v.mp4", "--latents", file)
    assert outcome.code == 2 and "--vae" in outcome.error and file.read_bytes() == b"mine"


def test_a_video_goes_on_with_the_decoder_it_was_begun_with(echo_rt, arguments, tmp_path):
    lasting = ("--segments", 1, "--snapshot-every", 1)
    folder = tmp_path / "day"
    assert echo_rt(*arguments, *lasting, "--vae", "tiny", "--frames", 21, "-o", folder).code == 0
    outcome = echo_rt(*arguments, *lasting, "--frames", 45, "--resume", folder)
    assert outcome.code == 2 and "vae is 'taew2_1' in the snapshot and 'wan' here" in outcome.error
    outcome = echo_rt(*arguments, *lasting, "--vae", "tiny", "--frames", 45, "--resume", folder)
    assert outcome.code == 0, outcome.err
