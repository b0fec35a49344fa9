"""Arguments that a runtime or a stream cannot have: each is refused in one line of a kind that a caller can act on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from streaming import load

import echo_rt
from echo_rt.errors import BackendError, ConfigError, WeightsError


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"ema": "yes"}, ConfigError, "ema must be True, False or None, got 'yes'"),
        ({"ema": True, "checkpoint": None}, ConfigError, "expected a checkpoint beside ema=True"),
        ({"ema": False, "checkpoint": None}, ConfigError, "expected a checkpoint beside ema=False"),
        ({"checkpoint": 3}, ConfigError, "checkpoint must be a path or None, got 3"),
        ({"lora": ""}, ConfigError, "lora must be a path, a list of .*; got ''"),
        ({"lora": [("l.pt", "1")]}, ConfigError, "strength of a LoRA must be a finite number, got '1' for l.pt"),
        ({"lora": "l.pt", "lora_alpha": 0}, ConfigError, "lora_alpha must be a number above 0, got 0"),
        ({"lora_alpha": 8}, ConfigError, "expected a LoRA beside lora_alpha=8"),
        ({"attention": ["sdpa"]}, BackendError, r"attention must be one of .*; got \['sdpa'\]"),
        ({"overrides": {3: 1}}, ConfigError, "overrides may name .*; got 3$"),
        ({"overrides": [1]}, ConfigError, r"overrides must be a mapping of names to values, got \[1\]"),
        ({"tokenizer": 3}, ConfigError, "tokenizer must be a path or None, got 3"),
        ({"text_encoder": "gone"}, WeightsError, "text_encoder: expected a file or folder, found none at gone"),
        ({"vae": "tiny", "vae_file": "x"}, ConfigError, "vae_file .* expected vae='wan' beside it, got 'tiny'"),
        ({"device": (1,)}, ConfigError, "device must be 'cpu', 'cuda' or 'cuda:N'"),
    ],
    ids=str,
)
def test_odd_options(small_model: Path, options: dict[str, object], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        load(small_model, **options)


def test_what_is_no_path() -> None:
    with pytest.raises(echo_rt.SnapshotError, match="expected the path of a snapshot, got 3"):
        echo_rt.Snapshot.load(3)  # type: ignore[arg-type]
    with pytest.raises(echo_rt.PromptError, match="expected the path of prompt embeddings, got 3"):
        echo_rt.load_prompt_embeds(3)  # type: ignore[arg-type]
    with pytest.raises(echo_rt.TargetError, match="expected the path of a file to write, got 3"):
        echo_rt.save_prompt_embeds(3, torch.zeros(1, 2))  # type: ignore[arg-type]


def test_no_folder_at_all() -> None:
    with pytest.raises(echo_rt.WeightsError, match="expected the path of a folder"):
        echo_rt.Runtime.from_pretrained(None)  # type: ignore[arg-type]


def test_odd_arguments_of_a_stream(small_model: Path) -> None:
    with load(small_model) as runtime:
        width = runtime.config.transformer.text_dim
        dense = torch.zeros(2, width)
        for wrong, words in (
            (dense.to_sparse(), "expected a dense tensor"),
            (dense.to("meta"), "expected a dense tensor"),
            (dense.to(torch.float8_e4m3fn), "16, 32 or 64 bits"),
        ):
            with pytest.raises(echo_rt.PromptError, match=words):
                runtime.stream(prompt_embeds=wrong)
        with pytest.raises(echo_rt.PromptError, match="empty"):
            runtime.stream("\u200b")
        with (
            runtime.stream(prompt_embeds=dense) as stream,
            stream.feed() as feed,
            pytest.raises(ConfigError, match="a number of seconds, got '1'"),
        ):
            feed.poll("1")  # type: ignore[arg-type]
        with pytest.raises(echo_rt.PromptError, match="expected a sequence of prompts, got one text: 'a fox'"):
            runtime.encode_prompts("a fox")
        with pytest.raises(ConfigError, match="guard must be a Guard or None, got 'stop'"):
            runtime.stream(prompt_embeds=dense, guard="stop")  # type: ignore[arg-type]
        with pytest.raises(echo_rt.StreamError, match=r"expected a Snapshot .*, got an int"):
            runtime.resume(3)  # type: ignore[arg-type]
        with pytest.raises(echo_rt.SnapshotError, match="x: "):
            runtime.resume("x")
        with pytest.raises(ConfigError, match=r"got a str; for a file, give echo_rt\.output\.VideoFile\(path\)"):
            runtime.stream(prompt_embeds=dense, initial_video="x.mp4")  # type: ignore[arg-type]
        with runtime.stream(prompt_embeds=dense, seed=np.int64(3)) as stream:  # type: ignore[arg-type]
            next(stream)
            with pytest.raises(ConfigError, match="path must be a file's path or None, got 3"):
                stream.snapshot(3)  # type: ignore[arg-type]
            snapshot = stream.snapshot()
        assert snapshot.seed == 3
        for block in (-2, 7):
            with pytest.raises(echo_rt.StreamError, match=f"contradicts itself: 3 latents decoded .* at block {block}"):
                runtime.resume(dataclasses.replace(snapshot, block=block))
        with pytest.raises(echo_rt.StreamError, match="the snapshot's prompt for block 9: "):
            runtime.resume(dataclasses.replace(snapshot, prompts={9: dense[:, :-1]}))
