"""What the tests of streams and runtimes share: a model as small as can be, and its videos."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import echo_rt
from echo_rt.weights.tiny_model import CHECKPOINT_FILE

PROMPT, OTHER = "a red fox in the snow", "the fox dives into a lake"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def require(device: str) -> str:
    """``device``, or the test is skipped."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return device


def load(folder: Path, **options: Any) -> echo_rt.Runtime:
    """The folder's model with its checkpoint, on the CPU in float32 unless ``options`` say otherwise."""
    arguments = {"checkpoint": folder / CHECKPOINT_FILE, "device": "cpu", "dtype": "float32"} | options
    return echo_rt.Runtime.from_pretrained(folder, **arguments)


def without_recipe(model: Path, folder: Path) -> Path:
    """``folder``, made a copy of a tiny model as one was written before there were recipes: it says its window."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["echo_rt"]["recipe"]
    config["echo_rt"] |= {"frames_per_block": 3, "sink_frames": 3, "local_frames": 9, "max_temporal_id": 20}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def embeds(runtime: echo_rt.Runtime, seed: int = 0) -> Tensor:
    """Embeddings of no prompt: quicker than encoding one."""
    generator = torch.Generator().manual_seed(seed)
    width = runtime.config.transformer.text_dim
    return torch.randn(5, width, generator=generator, dtype=torch.float32, device="cpu")


def take(stream: echo_rt.Stream, blocks: int) -> list[echo_rt.Chunk]:
    return [next(stream) for _ in range(blocks)]


def video(runtime: echo_rt.Runtime, blocks: int, *, seed: int = 0, prompt: int = 0) -> list[echo_rt.Chunk]:
    """The first blocks of a video, begun and ended here; ``prompt`` is the seed of its embeddings."""
    with runtime.stream(prompt_embeds=embeds(runtime, prompt), seed=seed) as stream:
        return take(stream, blocks)


def same(a: list[echo_rt.Chunk], b: list[echo_rt.Chunk]) -> bool:
    pairs = zip(a, b, strict=True)
    return all(torch.equal(x.frames, y.frames) and torch.equal(x.latents, y.latents) for x, y in pairs)


def within(seconds: float, act: Callable[[], Any]) -> Any:
    """What ``act`` returns or raises on a thread of its own; a failure, not a hang, if it does neither in time."""
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["value"] = act()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"still waiting after {seconds} s"
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]


def amid_blocks(stream: echo_rt.Stream, act: Callable[[int, int], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on ``act(block, step)`` is called before every denoising step of ``stream``."""
    rollout = stream._engine.rollout
    denoise = rollout._denoise

    def watched(step: int, *static_args: Any) -> None:
        act(rollout.state.block + 1, step)
        denoise(step, *static_args)

    monkeypatch.setattr(rollout, "_denoise", watched)


def poison(
    stream: echo_rt.Stream, patch: pytest.MonkeyPatch, at: set[int], times: int = 1, value: float = float("nan")
) -> None:
    """The next ``times`` times that a block of the state's number in ``at`` is made, a value of it is none."""
    left = [times]
    rollout = stream._engine.rollout  # type: ignore[union-attr]

    def spoil(block: int, step: int) -> None:
        if step == 0 and block in at and left[0]:
            left[0] -= 1
            rollout.state.x[0, 0, 0, 0] = value

    amid_blocks(stream, spoil, patch)


class Gate:
    """Holds a stream in the middle of its next block, until it is opened."""

    def __init__(self, stream: echo_rt.Stream, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self._opened = threading.Event(), threading.Event()

        def held(block: int, step: int) -> None:
            self.reached.set()
            assert self._opened.wait(60)

        amid_blocks(stream, held, monkeypatch)

    def open(self, after: float = 0.0) -> None:
        """Let go, at once or some seconds from now."""
        threading.Timer(after, self._opened.set).start() if after else self._opened.set()
