"""What ``generate`` does around a stream, with a stand-in for the model."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from echo_rt.engine.prompts import load_prompt_embeds, save_prompt_embeds
from echo_rt.errors import NumericalError

PROMPT = ("--model", "folder", "--prompt", "1")


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_everything_at_once(echo_rt, fake_runtime, tmp_path, frame_count):
    outputs = [tmp_path / name for name in ("v.mp4", "l.safetensors", "s.png")]
    arguments = ("-o", outputs[0], "--latents", outputs[1], "--contact-sheet", outputs[2], "--frames", 20, "--seed", 7)
    outcome = echo_rt("generate", *PROMPT, *arguments, "--json")
    assert outcome.code == 0, outcome.err
    report = outcome.json
    assert report.pop("fps") > 0 and report.pop("elapsed") >= 0 and report.pop("held_up_seconds") >= 0
    assert report == {
        "frames": 20,
        "seconds": 1.25,
        "size": [64, 48],
        "video_fps": 16,
        "latent_frames": 6,
        "files": {"video": str(outputs[0]), "latents": str(outputs[1]), "contact_sheet": str(outputs[2])},
        "blocks": 2,
        "prompts": [{"frame": 0, "seconds": 0.0, "text": "1"}],
        "seed": 7,
        "memory": "evolve",
        "backend": "torch",
        "backend_reason": "the device is cpu",
        "recipe": "echo-infinity-long",
        "recipe_reason": "the folder names it",
        "ema": False,
        "ema_reason": "as in the recipe",
        "model": "folder",
        "checkpoint": "c.pt",
        "loras": [{"file": "l.pt", "strength": 1.0}],
        "exit_reason": "complete",
        "exit_code": 0,
    }
    assert frame_count(outputs[0]) == 20, "the second block is cut"
    latents = load_file(outputs[1])["latents"]
    assert latents[:, 0, 0, 0].tolist() == [0, 0, 0, 1, 1, 1], "latents of whole blocks"
    assert fake_runtime.streams[0].seed == 7 and fake_runtime.closed


def test_options_reach_the_runtime(echo_rt, fake_runtime, tmp_path):
    options = "--checkpoint c.pt --lora l.pt --lora m.pt:-0.5 --lora-alpha 8 --no-ema --recipe longlive --device cpu"
    options += " --dtype fp8 --memory prior --backend torch"
    options += " --vae-dtype float32 --vae tiny --vae-tiles 3 --attention sdpa --convolution phases --lookahead 2"
    options += " --float8-except *.ffn.2 --float8-except blocks.0.* --no-graphs --linear torch"
    options += " --text-encoder t.gguf --tokenizer words"
    options += " --size 128x96 --keep-text-encoder --frames 1 --quiet"
    outcome = echo_rt("generate", *PROMPT, "-o", tmp_path / "v.mp4", *options.split())
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")
    assert fake_runtime.loaded_with == {
        "model": Path("folder"),
        "checkpoint": "c.pt",
        "lora": ((Path("l.pt"), 1.0), (Path("m.pt"), -0.5)),
        "lora_alpha": 8.0,
        "ema": False,
        "recipe": "longlive",
        "device": "cpu",
        "dtype": "float8",
        "float8_except": ("*.ffn.2", "blocks.0.*"),
        "vae_dtype": "float32",
        "memory": "prior",
        "vae": "tiny",
        "vae_tiles": 3,
        "vae_file": None,
        "text_encoder": "t.gguf",
        "tokenizer": "words",
        "backend": "torch",
        "attention": "sdpa",
        "linear": "torch",
        "convolution": "phases",
        "lookahead": 2,
        "graphs": False,
        "width": 128,
        "height": 96,
        "check": False,
        "keep_text_encoder": True,
        "overrides": {},
        "like": None,
    }


def test_a_lora_with_a_colon_in_its_name(echo_rt, fake_runtime, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("step:100").mkdir()
    options = ("--lora", "step:100", "--lora", "step:200", "--lora", "step:100:-1e-1")
    assert echo_rt("generate", *PROMPT, "-o", "v.mp4", "--frames", 1, *options).code == 0
    expected = ((Path("step:100"), 1.0), (Path("step"), 200.0), (Path("step:100"), -0.1))
    assert fake_runtime.loaded_with["lora"] == expected


@pytest.mark.parametrize(("seconds", "frames"), [("2", 32), ("0.01", 1), ("1.3", 21)])
def test_seconds(echo_rt, fake_runtime, tmp_path, frame_count, seconds, frames):
    assert echo_rt("generate", *PROMPT, "-o", tmp_path / "v.mp4", "--seconds", seconds).code == 0
    assert frame_count(tmp_path / "v.mp4") == frames


def test_prompts_switch_at_the_first_block_from_their_time(echo_rt, fake_runtime, tmp_path):
    """Blocks begin at frames 0, 9, 21, 33, 45, 57: at 0, 0.56, 1.31, 2.06, 2.81 and 3.56 seconds."""
    prompts = ("--prompt", "1", "--prompt", "2.0625: 4", "--prompt", "0.6: 2", "--prompt", "1.1: 3", "--prompt", "3: 5")
    outcome = echo_rt("generate", "--model", "m", *prompts, "-o", tmp_path / "v.mp4", "--frames", 60, "--json")
    assert fake_runtime.streams[0].prompts_of_blocks == [1, 1, 3, 4, 4, 5]
    assert [(shown["frame"], shown["text"]) for shown in outcome.json["prompts"]] == [
        (0, "1"),
        (21, "3"),  # the prompt of 0.6 s would have begun with the same block
        (33, "4"),
        (57, "5"),
    ]
    assert fake_runtime.encoded == ["1", "2", "3", "4", "5"], "all before the stream begins, in one go"


def test_a_prompt_after_the_end_is_a_warning(echo_rt, fake_runtime, tmp_path):
    outcome = echo_rt("generate", *PROMPT, "--prompt", "9: 2", "-o", tmp_path / "v.mp4", "--seconds", 2, "--quiet")
    assert outcome.code == 0
    warning = "the prompt at 9 s comes after the end of the video at 2 s"
    assert outcome.err == f"echo-rt: warning: {warning}\n"
    arguments = ("generate", *PROMPT, "--prompt", "9: 2", "-o", tmp_path / "w.mp4", "--seconds", 2, "--json")
    assert echo_rt(*arguments).json["warnings"] == [warning]


def test_embeddings_are_saved_and_read(echo_rt, fake_runtime, tmp_path):
    saved = tmp_path / "e.safetensors"
    video = ("-o", tmp_path / "v.mp4", "--overwrite", "--frames", 30)
    assert echo_rt("generate", *PROMPT, *video, "--save-prompt-embeds", saved).code == 0
    embeds, prompt = load_prompt_embeds(saved)
    assert prompt == "1" and torch.equal(embeds, torch.ones(2, 8))

    fake_runtime.encoded.clear()
    arguments = ("--prompt-embeds", saved, "--prompt", "1: 2", "--save-prompt-embeds", saved)
    outcome = echo_rt("generate", "--model", "m", *arguments, *video, "--json")
    assert outcome.code == 0
    assert fake_runtime.encoded == ["2"]
    assert outcome.json["prompts"][0] == {"frame": 0, "seconds": 0.0, "file": str(saved)}
    assert fake_runtime.streams[1].prompts_of_blocks == [1, 1, 2]
    assert load_prompt_embeds(tmp_path / "e.0.safetensors")[0][0, 0] == 1
    assert load_prompt_embeds(tmp_path / "e.1.safetensors")[1] == "2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frames", "0"], "of 1 or more and at most 1000000000, got '0'"),
        (["--frames", "-3"], "got '-3'"),
        (["--frames", "1.5"], "got '1.5'"),
        (["--frames", "many"], "got 'many'"),
        (["--seconds", "0"], "above 0 and at most 1000000000, got '0'"),
        (["--seconds", "-1"], "got '-1'"),
        (["--seconds", "nan"], "got 'nan'"),
        (["--seconds", "inf"], "got 'inf'"),
        (["--seconds", "1e308"], "at most 1000000000, got '1e308'"),
        (["--frames", "1" * 30], "at most 1000000000, got '1111"),
        (["--frames", "1" * 400], "at most 1000000000, got '1111"),
        (["--frames", "1" * 5000], "expected an integer of 1 or more"),
        (["--seed", "1" * 400], "2^64-1"),
        (["--size", "1" * 5000 + "x8"], "WIDTHxHEIGHT"),
        (["--seed", "-1"], "got '-1'"),
        (["--seed", "x"], "got 'x'"),
        (["--size", "832"], "WIDTHxHEIGHT in pixels such as 832x480, got '832'"),
        (["--size", "0x480"], "got '0x480'"),
        (["--size=-8x8"], "WIDTHxHEIGHT"),
        (["--size", "8.5x8"], "got '8.5x8'"),
        (["--prompt", " "], "expected a prompt, got nothing"),
        (["--prompt", "2"], "two prompts begin at 0 s"),
        (["--latents", "l.pt"], "ends in .safetensors, got 'l.pt'"),
        (["--contact-sheet", "s.jpg"], "ends in .png, got 's.jpg'"),
        (["-o", "v.avi"], "ends in .mp4, got 'v.avi'"),
        (["--save-prompt-embeds", "e.pt"], "ends in .safetensors"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_found_before_loading(echo_rt, fake_runtime, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    outcome = echo_rt("generate", *PROMPT, "-o", "v.mp4", *arguments)
    assert outcome.code == 2
    assert message in outcome.error
    assert fake_runtime.loaded_with == {} and files(tmp_path) == []


def test_bad_embeddings_files(echo_rt, fake_runtime, tmp_path):
    arguments = ("generate", "--model", "m", "-o", tmp_path / "v.mp4", "--frames", 9, "--prompt-embeds")
    outcome = echo_rt(*arguments, tmp_path / "absent.safetensors")
    assert outcome.code == 2 and "absent.safetensors" in outcome.error
    (tmp_path / "half.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{")
    outcome = echo_rt(*arguments, tmp_path / "half.safetensors")
    assert outcome.code == 2 and "half.safetensors" in outcome.error
    assert fake_runtime.loaded_with == {}, "the files are read before the model"
    save_prompt_embeds(tmp_path / "wide.safetensors", torch.ones(2, 9))
    outcome = echo_rt(*arguments, tmp_path / "wide.safetensors")
    assert outcome.code == 2 and "wide.safetensors" in outcome.error and "9 wide" in outcome.error
    assert fake_runtime.streams == [] and not (tmp_path / "v.mp4").exists()


def fail_at(block: int, error: BaseException):
    def before_block(number: int) -> None:
        if number == block:
            raise error

    return before_block


@pytest.mark.parametrize(
    ("error", "code"),
    [(NumericalError("block 2: NaN"), 1), (RuntimeError("a bug"), 1), (MemoryError("much"), 1)],
)
def test_an_error_keeps_what_was_made(echo_rt, fake_runtime, tmp_path, frame_count, error, code):
    fake_runtime.before_block = fail_at(2, error)
    outcome = echo_rt("generate", *PROMPT, "-o", tmp_path / "v.mp4", "--latents", tmp_path / "l.safetensors", "--json")
    assert outcome.code == code
    assert str(error) in outcome.error
    report = outcome.json
    assert (report["frames"], report["exit_reason"], report["exit_code"]) == (21, "error", code)
    assert report["error"] == outcome.error
    assert frame_count(tmp_path / "v.mp4") == 21
    assert len(load_file(tmp_path / "l.safetensors")["latents"]) == 6
    assert fake_runtime.streams[0].closed and fake_runtime.closed
    assert files(tmp_path) == ["l.safetensors", "v.mp4"]


def test_an_error_before_the_first_block_leaves_what_is_there(echo_rt, fake_runtime, tmp_path):
    (tmp_path / "v.mp4").write_bytes(b"good")
    fake_runtime.before_block = fail_at(0, NumericalError("NaN"))
    assert echo_rt("generate", *PROMPT, "-o", tmp_path / "v.mp4", "--overwrite").code == 1
    assert (tmp_path / "v.mp4").read_bytes() == b"good" and files(tmp_path) == ["v.mp4"]


@pytest.mark.parametrize(("signum", "code", "reason"), [(2, 130, "interrupted"), (15, 143, "terminated")])
def test_a_signal_ends_after_the_block(echo_rt, fake_runtime, tmp_path, frame_count, signum, code, reason):
    fake_runtime.before_block = lambda block: os.kill(os.getpid(), signum) if block == 1 else None
    before = signal.getsignal(signum)
    outcome = echo_rt("generate", *PROMPT, "-o", tmp_path / "v.mp4", "--json")
    assert signal.getsignal(signum) is before
    assert outcome.code == code
    assert (outcome.json["frames"], outcome.json["exit_reason"]) == (21, reason)
    assert "error" not in outcome.json
    assert frame_count(tmp_path / "v.mp4") == 21


def test_a_second_signal_ends_at_once(echo_rt, fake_runtime, tmp_path, frame_count):
    def twice(block: int) -> None:
        if block == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("the block went on")

    fake_runtime.before_block = twice
    outcome = echo_rt("generate", *PROMPT, "-o", tmp_path / "v.mp4", "--json")
    assert outcome.code == 130
    assert outcome.json["frames"] == frame_count(tmp_path / "v.mp4") == 21


def test_a_signal_while_loading_ends_at_once(echo_rt, fake_runtime, tmp_path):
    fake_runtime.while_loading = lambda: os.kill(os.getpid(), signal.SIGTERM)
    outcome = echo_rt("generate", *PROMPT, "-o", tmp_path / "v.mp4", "--json")
    assert outcome.code == 143
    assert outcome.json == {"exit_reason": "terminated", "exit_code": 143}
    assert files(tmp_path) == []


@pytest.mark.parametrize(("signum", "code", "reason"), [(2, 130, "interrupted"), (15, 143, "terminated")])
def test_a_signal_while_the_request_is_read(echo_rt, fake_runtime, tmp_path, monkeypatch, signum, code, reason):
    from echo_rt.cli import request as generate

    parse = generate.parse_script
    monkeypatch.setattr(generate, "parse_script", lambda *texts: (os.kill(os.getpid(), signum), parse(*texts))[1])
    outcome = echo_rt("generate", *PROMPT, "-o", tmp_path / "v.mp4", "--json")
    assert (outcome.code, outcome.json) == (code, {"exit_reason": reason, "exit_code": code})
    assert fake_runtime.loaded_with == {} and files(tmp_path) == []


def test_a_signal_at_the_very_end_does_not_cost_the_report(echo_rt, fake_runtime, tmp_path, monkeypatch):
    from echo_rt.cli import stdio

    say, reached = stdio.say, []
    before = signal.signal(signal.SIGTERM, lambda signum, frame: reached.append(signum))
    monkeypatch.setattr(stdio, "say", lambda *args, **more: (os.kill(os.getpid(), signal.SIGTERM), say(*args, **more)))
    fake_runtime.before_block = lambda block: os.kill(os.getpid(), signal.SIGTERM) if block == 1 else None
    try:
        outcome = echo_rt("generate", *PROMPT, "-o", tmp_path / "v.mp4", "--json")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert reached == [], "the handler of before is not back yet"
    assert (outcome.code, outcome.json["exit_reason"], outcome.json["frames"]) == (143, "terminated", 21)


def test_a_signal_in_the_last_block_changes_nothing(echo_rt, fake_runtime, tmp_path):
    fake_runtime.before_block = lambda block: os.kill(os.getpid(), signal.SIGINT)
    outcome = echo_rt("generate", *PROMPT, "-o", tmp_path / "v.mp4", "--frames", 9, "--json")
    assert (outcome.code, outcome.json["exit_reason"]) == (0, "complete")


def test_summary_and_plain_progress(echo_rt, fake_runtime, tmp_path):
    outcome = echo_rt("generate", *PROMPT, "-o", tmp_path / "v.mp4", "--frames", 21)
    assert outcome.out.startswith(f"{tmp_path / 'v.mp4'}: 21 frames, 1.3 s of 64x48 at 16 fps, made at ")
    assert "1 block · 9/21 frames · 0:01 of video · " in outcome.err
