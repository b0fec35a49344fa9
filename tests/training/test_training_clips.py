"""Clips of the world: the demo model learns more colours than it is measured with."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from training.latents import LinearCode, World, all_scenes, open_world
from training.world import HELD_OUT, MORE_COLOURS, OBJECT_COLOURS

pytest.importorskip("tokenizers")
from training.train_model import CONFIG, Clips, Stage, initial_weights

LATENTS = (13, CONFIG.transformer.in_channels, CONFIG.latent_height, CONFIG.latent_width)


def test_a_model_learns_from_clips_of_further_colours(tmp_path: Path) -> None:
    scenes = all_scenes(["red", next(iter(MORE_COLOURS))])
    code = LinearCode(torch.zeros(1), torch.zeros(1, 1), torch.ones(1))
    clips = Clips(World(code, scenes, torch.randn(len(scenes), *LATENTS)), tmp_path)
    weights = {name: tensor.requires_grad_() for name, tensor in initial_weights(seed=0).items()}
    clips.loss(weights, Stage("prompts", blocks=2, clips=2, steps=1), random.Random(0)).backward()
    gradient = weights["blocks.0.cross_attn.v.weight"].grad
    assert gradient is not None and gradient.isfinite().all() and gradient.abs().sum() > 0


def test_further_colours_are_other_ones() -> None:
    assert not MORE_COLOURS.keys() & OBJECT_COLOURS.keys()
    scenes = all_scenes([*OBJECT_COLOURS, *MORE_COLOURS])
    assert {(scene.colour, scene.shape, scene.place) for scene in scenes if scene.is_held_out} == HELD_OUT


def test_latents_of_other_colours_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.latents.fit_code", lambda scenes: LinearCode(*torch.zeros(3, 1)))
    monkeypatch.setattr("training.latents.LinearCode.encode", lambda self, video: torch.zeros(1))
    monkeypatch.setattr("training.latents.render", lambda scenes: torch.zeros(1))
    path = tmp_path / "world.pt"
    for colours in (["red"], ["blue"], ["red", "blue"]):
        world = open_world(path, colours)
        assert len(world.table) == len(world.scenes) == len(all_scenes(colours))
        assert torch.load(path, weights_only=True)["colours"] == colours
        assert len(open_world(path, colours).table) == len(world.table)
