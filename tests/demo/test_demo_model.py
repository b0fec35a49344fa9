"""The model in the package: it follows the prompt, remembers the balloon, and looks as it did when it was made.

``first_seconds.png`` holds every third frame of its first three blocks, one below the other, made in float32 by
``python -m tests.demo.test_demo_model``. A fault that ruins pictures and that no other test sees fails here.
"""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from echo_rt import Runtime
from echo_rt.errors import ConfigError, WeightsError
from echo_rt.weights.folder import DEMO_FOLDER
from training.evaluate import read
from training.measure import follows, frames_of, noons
from training.world import HEIGHT, Scene

SCENE = Scene("red", "ball", "desert", "red", 0, 0)
BLOCKS, EVERY = 3, 3
STORED = Path(__file__).with_name("first_seconds.png")
MOST_BYTES = 12_000_000
# Decibels beside the stored frames. Float32 differs between processors by the order of its sums alone.
LEAST_PSNR = {"float32": 55.0, "bfloat16": 45.0, "float16": 54.0, "float8": 40.0}


def first_seconds(**options: Any) -> Tensor:
    """Frames ``[F, H, W, 3]`` in 0..1 of the first blocks, every third."""
    with Runtime.from_pretrained("demo", **options) as runtime, runtime.stream(SCENE.prompt, seed=0) as stream:
        chunks = list(itertools.islice(stream, BLOCKS))
    return torch.cat([chunk.frames for chunk in chunks])[::EVERY].float() / 255


def psnr(one: Tensor, other: Tensor) -> float:
    return float(-10 * (one - other).square().mean().log10())


def test_it_is_small() -> None:
    sizes = [path.stat().st_size for path in DEMO_FOLDER.rglob("*") if path.is_file()]
    assert 0 < sum(sizes) <= MOST_BYTES


@pytest.mark.parametrize("dtype", LEAST_PSNR)
def test_first_seconds_are_the_stored_ones(dtype: str) -> None:
    image = pytest.importorskip("PIL.Image")
    stored = torch.from_numpy(np.array(image.open(STORED).convert("RGB"))).unflatten(0, (-1, HEIGHT)).float() / 255
    assert psnr(first_seconds(dtype=dtype), stored) >= LEAST_PSNR[dtype]


def test_it_follows_the_prompt_and_the_balloon_returns() -> None:
    morning = 4
    with Runtime.from_pretrained("demo") as runtime, runtime.stream(SCENE.prompt, seed=1) as stream:
        frames = frames_of(stream, [morning, *noons(range(3))])
    assert follows(read(frames[morning], morning), SCENE)
    balloons = [read(frames[number], number) for number in noons(range(3))]
    assert len({(each.balloon, each.lane) for each in balloons}) == 1


def test_a_folder_named_demo_is_written_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    with pytest.raises(WeightsError, match="expected a Wan2"):
        Runtime.from_pretrained("./demo")


@pytest.mark.parametrize("name", ["../echo.pt", "/echo.pt", "", 3, "sub/echo.pt"])
def test_a_folder_names_a_checkpoint_beside_its_config(tmp_path: Path, name: object) -> None:
    folder = tmp_path / "model"
    shutil.copytree(DEMO_FOLDER, folder)
    config = json.loads((folder / "config.json").read_text())
    config["echo_rt"]["checkpoint"] = name
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="expected the name of a file in the folder"):
        Runtime.from_pretrained(folder)


if __name__ == "__main__":
    from PIL import Image

    pictures = (255 * first_seconds(dtype="float32")).round().to(torch.uint8)
    Image.fromarray(pictures.flatten(0, 1).numpy()).save(STORED, optimize=True)
