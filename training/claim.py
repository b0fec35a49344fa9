"""``python -m training.claim``: what an evolving memory adds to a window, each model trained for itself.

Small models learn the world with calm days, on which the balloon stays down, so that it is hidden for one window or for
many. One kind has the memory; one has the window alone, trained for as many operations; one has a window twice as long.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from echo_rt import Runtime
from echo_rt.config import ModelConfig
from training.evaluate import Reading, read
from training.export import write_model
from training.latents import DAY_LATENTS, FRAMES, World, open_world
from training.measure import NOON, frames_of, share
from training.train_model import CONFIG, TRAINED_STEPS, Clips, Stage, initial_weights, train, with_steps
from training.train_vae import train_decoder, train_encoder
from training.world import DAY, HEIGHT, RISE, WIDTH, Scene, random_scene

CALM = 0.25  # share of the days in training
STAGES = (
    Stage("layout", blocks=3, clips=8, steps=150),
    Stage("recall", blocks=7, clips=4, steps=700),
    Stage("own context", blocks=7, clips=4, steps=900, own=0.4, rate=0.7),
    Stage("days", blocks=11, clips=3, steps=650, own=0.5, rate=0.4),
)
_SMALL = replace(
    with_steps(CONFIG, TRAINED_STEPS),
    transformer=replace(CONFIG.transformer, dim=128, ffn_dim=384, num_heads=4, num_layers=4),
)
_WINDOW = replace(_SMALL, memory=None)
_LONGER = _SMALL.window.local_frames
KINDS: dict[str, ModelConfig] = {
    "evolving memory": _SMALL,
    "window alone": _WINDOW,
    "window twice as long": replace(
        _WINDOW,
        window=replace(
            _WINDOW.window,
            local_frames=_WINDOW.window.local_frames + _LONGER,
            max_temporal_id=_WINDOW.window.max_temporal_id + _LONGER,
        ),
    ),
}
RUNS = [(kind, seed) for seed in range(3) for kind in KINDS if seed == 0 or kind != "window twice as long"]
CALM_DAYS = range(4)  # between two days with the balloon
_FIRST_SEED = 20_000


def operations(config: ModelConfig, world: World, folder: Path) -> int:
    """Count the floating-point operations, forward and backward, of a few steps of the longest stage.

    Clips without memory and with a prompt switch are drawn as in training, the same ones for every ``config``.
    """
    stage = max(STAGES, key=lambda stage: stage.steps)
    weights = {name: tensor.requires_grad_() for name, tensor in initial_weights(config).items()}
    clips = Clips(world, folder, config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # others are not counted on a CPU
        for step in range(20):
            clips.loss(weights, stage, random.Random(f"operations {step}")).backward()
    return int(counter.get_total_flops())


def stages_of(config: ModelConfig, world: World, folder: Path) -> tuple[Stage, ...]:
    """Return the stages, longer for a model whose steps cost less than those of one with memory, and the reverse."""
    longer = operations(_SMALL, world, folder) / operations(config, world, folder)
    return tuple(replace(stage, steps=round(stage.steps * longer)) for stage in STAGES)


def returns(runtime: Runtime, world: World, calm_days: int, count: int) -> dict[str, Any]:
    """Give a true day with a balloon and ``calm_days`` without, up to where the next one rises, and read that one."""
    size = runtime.config.window.frames_per_block
    day = 1 + calm_days
    blocks = day * DAY_LATENTS // size + 1
    assert FRAMES * (blocks * size - 1) < DAY * day + RISE[0], "what is given must end before the balloon rises"
    readings: list[tuple[Reading, Scene]] = []
    for index in range(count):
        scene = random_scene(random.Random(f"returns {index}"))
        calm = set(range(1, day))
        latents = world.clip(world.scenes.index(scene), 0, blocks * size, calm)
        number = DAY * day + NOON
        with runtime.stream(scene.prompt, seed=_FIRST_SEED + index, initial_latents=latents) as stream:
            readings.append((read(frames_of(stream, [number])[number], number, calm=True), scene))
    shown = [(reading, scene) for reading, scene in readings if reading.balloon is not None]
    return {
        "hidden frames": DAY * day + RISE[0] - RISE[1],
        "streams": count,
        "shown": len(shown) / count,
        "lane": share(reading.lane == scene.lane for reading, scene in shown) if shown else None,
        "colour": share(reading.balloon == scene.balloon for reading, scene in shown) if shown else None,
    }


def visible(runtime: Runtime, world: World, count: int) -> dict[str, Any]:
    """The same where the balloon is in the window all the time: a true video until it has risen, then read it."""
    size = runtime.config.window.frames_per_block
    blocks = -(-(RISE[0] // FRAMES + 2) // size)
    right = []
    for index in range(count):
        scene = random_scene(random.Random(f"returns {index}"))
        latents = world.clip(world.scenes.index(scene), 0, blocks * size)
        with runtime.stream(scene.prompt, seed=_FIRST_SEED + index, initial_latents=latents) as stream:
            reading = read(frames_of(stream, [NOON])[NOON], NOON, calm=True)
        right.append((reading.lane == scene.lane, reading.balloon == scene.balloon))
    return {
        "hidden frames": 0,
        "streams": count,
        "shown": 1.0,
        "lane": share(lane for lane, _ in right),
        "colour": share(colour for _, colour in right),
    }


def run(kind: str, seed: int, world: World, folder: Path, count: int) -> dict[str, Any]:
    """Train one model, or go on, write it, and measure it."""
    config = KINDS[kind]
    place = folder / f"{kind.replace(' ', '-')}-{seed}"
    stages = stages_of(config, world, folder)
    began = time.process_time()
    weights = train(world, place, config=config, stages=stages, seed=seed, calm=CALM)
    seconds = time.process_time() - began
    decoder, encoder = train_decoder(world, folder), train_encoder(world, folder)
    write_model(place / "model", config, weights, decoder, encoder, (WIDTH, HEIGHT))
    with Runtime.from_pretrained(place / "model") as runtime:
        rows = [visible(runtime, world, count), *(returns(runtime, world, days, count) for days in CALM_DAYS)]
    return {
        "kind": kind,
        "seed": seed,
        "steps": sum(stage.steps for stage in stages),
        "core seconds": round(seconds),
        "returns": rows,
    }


def main() -> None:
    """Train and measure every model; each result is kept, and a run that was stopped goes on."""
    parser = argparse.ArgumentParser(prog="python -m training.claim", description=main.__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/training"), help="(default %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("build/claim.json"), help="(default %(default)s)")
    parser.add_argument("--streams", type=int, default=48, help="that are read for each figure (default %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    world = open_world(arguments.folder / "world.pt").with_calm_days()
    results: list[dict[str, Any]] = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
    for kind, seed in RUNS:
        if not any((each["kind"], each["seed"]) == (kind, seed) for each in results):
            results.append(run(kind, seed, world, arguments.folder, arguments.streams))
            print(json.dumps(results[-1]), flush=True)
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
