"""A stand-in for the runtime, for what the command line does around a stream."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from echo_rt.cli.main import main
from echo_rt.errors import StreamError
from echo_rt.options import MemoryMode
from echo_rt.weights.choice import Taken

TEXT_DIM, TEXT_LEN = 8, 4


@dataclass
class FakeStream:
    """Nine frames, then twelve a block, as Wan's VAE gives them; ``before_block`` may interfere."""

    prompt: Tensor
    seed: int
    before_block: Callable[[int], None]
    video_frames: int = 0
    block: int = 0
    closed: bool = False
    rollbacks: int = 0
    prompts: dict[int, Tensor] = field(default_factory=dict)
    prompts_of_blocks: list[float] = field(default_factory=list)

    @property
    def next_block(self) -> int:
        return self.block

    def __enter__(self) -> FakeStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def set_prompt(self, *, prompt_embeds: Tensor, block: int) -> None:
        self.prompts[block] = prompt_embeds

    def __next__(self) -> SimpleNamespace:
        if self.closed:
            raise StreamError("closed")
        self.before_block(self.block)
        self.prompt = self.prompts.get(self.block, self.prompt)
        count = 12 if self.block else 9
        frames = torch.full((count, 48, 64, 3), (self.block * 10) % 250, dtype=torch.uint8)
        self.prompts_of_blocks.append(float(self.prompt[0, 0]))
        self.block += 1
        self.video_frames += count
        return SimpleNamespace(frames=frames, latents=torch.full((3, 16, 6, 8), float(self.block - 1)))


class FakeRuntime:
    """Everything ``generate`` uses of a runtime. A prompt's embedding is the number it consists of."""

    fps = 16
    frame_size = (64, 48)
    memory = MemoryMode.EVOLVE
    backend, backend_reason = "torch", "the device is cpu"
    taken = Taken(
        "echo-infinity-long", "the folder names it", False, "as in the recipe", "folder", "c.pt", (("l.pt", 1.0),)
    )
    device = torch.device("cpu")
    config = SimpleNamespace(
        latent_shape=(16, 6, 8),
        transformer=SimpleNamespace(text_dim=TEXT_DIM, text_len=TEXT_LEN),
        window=SimpleNamespace(frames_per_block=3),
    )
    vae_config = SimpleNamespace(video_frames=lambda latents: max(0, 4 * latents - 3))

    def __init__(self) -> None:
        self.loaded_with: dict[str, Any] = {}
        self.before_block: Callable[[int], None] = lambda block: None
        self.while_loading: Callable[[], None] = lambda: None
        self.streams: list[FakeStream] = []
        self.encoded: list[str] = []
        self.closed = False

    def from_pretrained(self, model: Path, **options: Any) -> FakeRuntime:
        self.loaded_with = {"model": model, **options}
        self.while_loading()
        return self

    def encode_prompts(self, prompts: list[str]) -> list[Tensor]:
        self.encoded += prompts
        return [torch.full((2, TEXT_DIM), float(prompt)) for prompt in prompts]

    def stream(self, *, prompt_embeds: Tensor, seed: int, guard: Any) -> FakeStream:
        self.streams.append(FakeStream(prompt_embeds, seed, lambda block: self.before_block(block)))
        return self.streams[-1]

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def fake_runtime(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    """What ``Runtime.from_pretrained`` gives in this test."""
    runtime = FakeRuntime()
    monkeypatch.setattr("echo_rt.cli.generation.Runtime", runtime)
    return runtime


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line that an error is; fails when there is more, or less."""
        lines = [line for line in self.err.splitlines() if line.startswith("echo-rt: error: ")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0].removeprefix("echo-rt: error: ")


@pytest.fixture
def echo_rt(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs the command line in this process: ``echo_rt("tiny", path)``."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return run


@pytest.fixture
def frame_count() -> Callable[[Path], int]:
    """How many frames of a video can be decoded."""

    av = pytest.importorskip("av")

    def count(path: Path) -> int:
        with av.open(str(path)) as container:
            return sum(1 for _ in container.decode(video=0))

    return count
