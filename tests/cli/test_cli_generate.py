"""``generate`` with a real, small model: files, equality with the library, bad input, signals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from echo_rt.engine.prompts import save_prompt_embeds
from echo_rt.output import video
from echo_rt.runtime import Runtime


@pytest.fixture
def arguments(small_model, tmp_path):
    """A command that works; what a test appends overrides what is here."""
    checkpoint = small_model / "echo_infinity.pt"
    model = ("generate", "--model", small_model, "--checkpoint", checkpoint, "--device", "cpu", "--quiet")
    return (*model, "-o", tmp_path / "v.mp4", "--overwrite", "--frames", 30)


def test_the_same_frames_and_latents_as_the_library(echo_rt, arguments, small_model, tmp_path, monkeypatch):
    written = []
    write = video.VideoWriter.write
    monkeypatch.setattr(video.VideoWriter, "write", lambda self, frames: (written.append(frames), write(self, frames)))
    latents = tmp_path / "l.safetensors"
    prompts = ("--prompt", "a red fox", "--prompt", "1:a lake")
    outcome = echo_rt(*arguments, *prompts, "--seed", 7, "--latents", latents, "--json")
    assert outcome.code == 0, outcome.err
    assert [shown["frame"] for shown in outcome.json["prompts"]] == [0, 21]

    with Runtime.from_pretrained(small_model, checkpoint=small_model / "echo_infinity.pt", device="cpu") as runtime:
        assert outcome.json["size"] == list(runtime.frame_size) == [32, 32]
        chosen = (outcome.json["backend"], outcome.json["backend_reason"])
        assert chosen == (runtime.backend, runtime.backend_reason) == ("torch", "the device is cpu")
        chunks = []
        with runtime.stream("a red fox", seed=7) as stream:
            for chunk in stream:
                chunks.append(chunk)
                if stream.video_frames >= 30:
                    break
                if chunk.index == 1:
                    stream.set_prompt("a lake")
    assert torch.equal(torch.cat(written), torch.cat([chunk.frames for chunk in chunks])[:30])
    assert torch.equal(load_file(latents)["latents"], torch.cat([chunk.latents for chunk in chunks]))


def test_saved_embeddings_give_the_same_video(echo_rt, arguments, tmp_path):
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    embeds = tmp_path / "e.safetensors"
    prompt = ("--prompt", "a red fox", "--save-prompt-embeds", embeds)
    assert echo_rt(*arguments, *prompt, "--frames", 9, "--latents", first).code == 0
    assert echo_rt(*arguments, "--prompt-embeds", embeds, "--frames", 9, "--latents", second).code == 0
    assert torch.equal(load_file(first)["latents"], load_file(second)["latents"])


def test_a_smaller_size_without_memory(echo_rt, arguments, frame_count, tmp_path):
    outcome = echo_rt(*arguments, "--prompt", "a", "--size", "48x16", "--memory", "off", "--frames", 3, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["size"] == [48, 16] and outcome.json["memory"] == "off"
    assert frame_count(tmp_path / "v.mp4") == 3


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_very_long_prompt_is_cut_with_a_warning(echo_rt, arguments):
    outcome = echo_rt(*arguments, "--prompt", "fox " * 10_000, "--frames", 1)
    assert outcome.code == 0
    (line,) = outcome.err.splitlines()
    assert line.startswith("echo-rt: warning: ") and "64" in line


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "nowhere"], "nowhere"),
        (["--model", "."], "apart from what is read"),
        (["--checkpoint", "nowhere.pt"], "nowhere.pt"),
        (["--lora", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--lora", "a.pt:strong"], "--lora: expected FILE or FILE:STRENGTH with a finite STRENGTH, got 'strong'"),
        (["--lora", "a.pt:nan"], "with a finite STRENGTH, got 'nan'"),
        (["--lora", ":1"], "--lora: expected a path, got ''"),
        (["--lora-alpha", "8"], "--lora-alpha: expected --lora FILE with it, got none"),
        (["--lora", "a.pt", "--lora-alpha", "0"], "--lora-alpha: expected a number above 0, got '0'"),
        (["--size", "33x32"], "33"),
        (["--size", "32x40"], "40"),
        (["--size", "64x32"], "memory"),
        (["--prompt", "1: &nbsp; "], "empty"),
        (["--device", "toaster"], "toaster"),
        (["--backend", "magic"], "magic"),
        (["--attention", "magic"], "magic"),
        (["--lookahead", "-1"], "--lookahead: expected an integer in 0..100"),
        (["--lookahead", "101"], "--lookahead: expected an integer in 0..100"),
        (["--seed", str(2**64)], "2^64-1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(echo_rt, arguments, tmp_path, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "v.mp4").write_bytes(b"good")
    outcome = echo_rt(*arguments, "--prompt", "a red fox", *more, "--json")
    assert outcome.code == 2
    assert message in outcome.error
    assert outcome.json["error"] == outcome.error
    assert (tmp_path / "v.mp4").read_bytes() == b"good"
    assert [file.name for file in tmp_path.iterdir()] == ["v.mp4"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(echo_rt, arguments):
    outcome = echo_rt(*arguments, "--prompt", "a", "--device", "cuda")
    assert outcome.code == 2 and "cuda" in outcome.error


@pytest.fixture
def own_model(small_model, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(small_model, tmp_path / "model"))


DOWNLOADED = (
    "config.json",
    "diffusion_pytorch_model.safetensors",
    "Wan2.1_VAE.pth",
    "models_t5_umt5-xxl-enc-bf16.pth",
    "echo_infinity.pt",
    "google/umt5-xxl/tokenizer.json",
)


# Without config.json the sizes are those of the tensors.
@pytest.mark.parametrize(
    ("name", "damage"), [*((name, "half") for name in DOWNLOADED), *((name, "absent") for name in DOWNLOADED[1:])]
)
def test_a_download_that_is_not_whole(echo_rt, own_model, tmp_path, name, damage):
    file = own_model / name
    if damage == "half":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        file.unlink()
    model = ("generate", "--model", own_model, "--device", "cpu", "--quiet", "--frames", 1, "--prompt", "a fox")
    if name == "diffusion_pytorch_model.safetensors":
        outcome = echo_rt(*model, "-o", tmp_path / "v.mp4")
    else:
        outcome = echo_rt(*model, "-o", tmp_path / "v.mp4", "--checkpoint", own_model / "echo_infinity.pt")
    assert outcome.code == 2, outcome.err
    assert name.split("/")[0] in outcome.error
    assert not (tmp_path / "v.mp4").exists()


def test_weights_of_another_model(echo_rt, arguments, tmp_path):
    other = tmp_path / "other.safetensors"
    save_file({"something.weight": torch.zeros(3)}, other)
    for option in ("--checkpoint", "--lora"):
        outcome = echo_rt(*arguments, "--prompt", "a", option, other)
        assert outcome.code == 2 and "other.safetensors" in outcome.error


def test_a_folder_that_is_no_model(echo_rt, arguments, tmp_path):
    (tmp_path / "empty").mkdir()
    outcome = echo_rt(*arguments, "--prompt", "a", "--model", tmp_path / "empty")
    assert outcome.code == 2 and str(tmp_path / "empty") in outcome.error


@pytest.mark.parametrize(("value", "code", "message"), [(float("nan"), 2, "head.head.weight"), (3e38, 1, "block 0")])
def test_weights_that_are_not_numbers(echo_rt, own_model, tmp_path, value, code, message):
    file = own_model / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["head.head.weight"].fill_(value)
    save_file(tensors, file)
    outcome = echo_rt(
        *("generate", "--model", own_model, "--device", "cpu", "--prompt", "a", "--frames", 9, "--quiet"),
        *("-o", tmp_path / "v.mp4"),
    )
    assert outcome.code == code
    assert "NaN" in outcome.error and message in outcome.error
    assert not (tmp_path / "v.mp4").exists()


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("--latents", "diffusion_pytorch_model.safetensors"),
        ("--save-prompt-embeds", "sub/new.safetensors"),
        ("-o", "new.mp4"),
        ("--contact-sheet", "s.png"),
    ],
)
def test_nothing_is_written_into_the_model(echo_rt, own_model, tmp_path, option, name):
    (own_model / "sub").mkdir()
    before = {file: file.read_bytes() for file in own_model.rglob("*") if file.is_file()}
    (tmp_path / "link").symlink_to(own_model)
    for model, place in ((own_model, own_model), (tmp_path / "link", own_model), (own_model, tmp_path / "link")):
        arguments = ("--model", model, "--prompt", "a", "--frames", 1, "-o", tmp_path / "v.mp4", option, place / name)
        outcome = echo_rt("generate", *arguments)
        assert outcome.code == 2
        assert f"which belongs to --model {model}" in outcome.error and str(place / name) in outcome.error
    assert {file: file.read_bytes() for file in own_model.rglob("*") if file.is_file()} == before


def wait_until_frames_come(process: subprocess.Popen[str]) -> None:
    """Until the progress line of the first block."""
    assert process.stderr is not None
    for line in process.stderr:
        if "1 block ·" in line:
            return
    pytest.fail("no block was made")


@pytest.mark.parametrize(("signum", "code", "reason"), [(2, 130, "interrupted"), (15, 143, "terminated")])
def test_a_signal_leaves_a_playable_file(small_model, tmp_path, frame_count, signum, code, reason):
    path, embeds = tmp_path / "v.mp4", tmp_path / "e.safetensors"
    save_prompt_embeds(embeds, torch.ones(4, 32))  # spares the process the text encoder
    command = [sys.executable, "-m", "echo_rt", "generate", "--model", str(small_model), "--device", "cpu"]
    process = subprocess.Popen(
        [*command, "--prompt-embeds", str(embeds), "-o", str(path), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # As a shell script starts what it puts into the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    try:
        wait_until_frames_come(process)
        time.sleep(0.2)
        process.send_signal(signum)
        out, err = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == code, err
    assert "Traceback" not in err and "error" not in err
    report = json.loads(out)
    assert (report["exit_reason"], report["exit_code"]) == (reason, code)
    assert report["frames"] == frame_count(path) == 9 + 12 * (report["blocks"] - 1)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["e.safetensors", "v.mp4"]


def test_set_changes_the_rollout(echo_rt, arguments, tmp_path):
    latents = tmp_path / "l.safetensors"
    more = ("--prompt", "a red fox", "--latents", latents, "--frames", 60)
    assert echo_rt(*arguments, *more).code == 0
    before = load_file(latents)["latents"]
    assert echo_rt(*arguments, *more, "--set", "denoising_steps=1000,500", "--set", "local_frames=6").code == 0
    assert not torch.equal(load_file(latents)["latents"], before)


def test_set_takes_words_and_lists_of_one(echo_rt, arguments, tmp_path):
    latents = tmp_path / "l.safetensors"
    more = ("--prompt", "a red fox", "--latents", latents, "--frames", 60, "--set", "local_frames=3")
    made = []
    for facts in ((), ("memory_reads=rotated",), ("first_block_steps=500",)):
        assert echo_rt(*arguments, *more, *(word for fact in facts for word in ("--set", fact))).code == 0
        made.append(load_file(latents)["latents"])
    usual, rotated, first = made
    assert not torch.equal(first[:3], usual[:3])
    assert torch.equal(rotated[:6], usual[:6]) and not torch.equal(rotated, usual)


def test_set_names_a_fact_once(echo_rt, arguments):
    """Of two values one would be left out without a word."""
    outcome = echo_rt(*arguments, "--prompt", "a red fox", "--set", "local_frames=6", "--set", "local_frames=9")
    assert outcome.code == 2
    assert "--set: expected each NAME once, got local_frames again with 9" in outcome.error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("local_frames", "expected NAME=VALUE"),
        ("sinks=3", "got 'sinks=3'"),
        ("local_frames=many", "expected a number"),
        ("local_frames=7", "must be a multiple of frames_per_block 3, got 7"),
        ("denoising_steps=500,1000", "must be falling integers in 1..1000, got [500, 1000]"),
        ("rebuild_on_prompt_switch=maybe", "true or false"),
        ("recache_sink=1", "recache_sink must be true or false, got 1"),
        ("memory_reads=raw", "memory_reads must be one of unrotated, rotated; got 'raw'"),
        ("first_block_steps=250,500", "first_block_steps must be falling integers in 1..1000, got [250, 500]"),
        (
            "sink_frames=0",
            "sink_frames must be 3 or more beside a memory, got 0; without a sink the memory has to be off",
        ),
    ],
)
def test_set_with_a_mistake(echo_rt, arguments, text, message):
    outcome = echo_rt(*arguments, "--prompt", "a red fox", "--set", text)
    assert outcome.code == 2 and message in outcome.error
