"""Published recipes, run by the publishers' own code, through the public interface: their files, their noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import relative_error
from safetensors.torch import load_file
from torch import Tensor

import echo_rt
from echo_rt.config import VaeConfig
from echo_rt.ops.backends import available_backends

_ABSOLUTE, _CAUSAL = {"max_temporal_id": 1023}, {"sink_frames": 0, "local_frames": 21}
_FOUR = [1000, 750, 500, 250]
# What each recipe is in options: which part of a checkpoint, and the facts of the rollout.
RECIPES: dict[str, dict[str, Any]] = {
    "echo-infinity-short": {
        "ema": False,
        "overrides": {"memory_reads": "rotated", "rebuild_on_prompt_switch": False},
    },
    "echo-infinity-long": {"ema": False, "overrides": {"rebuild_on_prompt_switch": True}},
    "self-forcing": {"ema": True, "overrides": _CAUSAL | _ABSOLUTE},
    "causal-forcing-chunkwise": {"ema": False, "overrides": _CAUSAL | _ABSOLUTE},
    "causal-forcing-framewise-2step": {
        "ema": True,
        "overrides": _CAUSAL
        | _ABSOLUTE
        | {"frames_per_block": 1, "denoising_steps": [1000, 500], "first_block_steps": _FOUR},
    },
    "longlive": {"ema": False, "overrides": _ABSOLUTE | {"recache_sink": True}},
    "longlive-infinity": {"ema": False, "overrides": {"max_temporal_id": 11, "recache_sink": True}},
}
BUNDLES = (
    "causal_forcing_chunkwise",
    "causal_forcing_framewise_2step",
    "echo_infinity_long",
    "echo_infinity_short",
    "longlive",
    "longlive_early_switch",
    "longlive_infinity_switch",
    "self_forcing",
    "self_forcing_no_sink",
)
BOUNDS = {"float32": 2e-6, "bfloat16": 1.5e-2}


def errors(bundle: Path, **options: Any) -> list[float]:
    """Of each block's latents."""
    config = json.loads((bundle / "config.json").read_text())
    inputs, expected = (load_file(bundle / f"{name}.safetensors") for name in ("inputs", "expected"))
    recipe = RECIPES[config["recipe"]]

    def noise(block: int, shape: tuple[int, ...]) -> Tensor:
        names = [f"noise.{block}", *(f"renoise.{block}.{step}" for step in range(shape[0] - 1))]
        return torch.stack([inputs[name] for name in names])

    *_, rows, columns = expected["latents.0"].shape
    stride = VaeConfig().spatial_stride
    with (
        echo_rt.Runtime.from_pretrained(
            bundle / config["model"],
            checkpoint=bundle / config["checkpoint"],
            lora=None if config["lora"] is None else bundle / config["lora"],
            width=columns * stride,
            height=rows * stride,
            device="cpu",
            **recipe | {"overrides": recipe["overrides"] | config["overrides"]} | options,
        ) as runtime,
        runtime.stream(prompt_embeds=inputs["prompt_embeds.0"], noise=noise) as stream,
    ):
        for number, block in enumerate(config["prompt_switch_blocks"], start=1):
            stream.set_prompt(prompt_embeds=inputs[f"prompt_embeds.{number}"], block=block)
        made = [next(stream).latents for _ in range(config["num_blocks"])]
    return [relative_error(latents, expected[f"latents.{block}"]) for block, latents in enumerate(made)]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", BUNDLES)
def test_a_published_recipe_is_what_its_publisher_runs(shared_golden: Path, name: str, dtype: str) -> None:
    found = errors(shared_golden / "recipes" / name, dtype=dtype)
    assert max(found) < BOUNDS[dtype], [f"{error:.1e}" for error in found]


@pytest.mark.skipif(available_backends()["emulated"] != "available", reason="this build has no emulated kernels")
@pytest.mark.parametrize("name", ["echo_infinity_short", "causal_forcing_framewise_2step", "longlive_early_switch"])
def test_a_published_recipe_on_emulated_kernels(shared_golden: Path, name: str) -> None:
    found = errors(shared_golden / "recipes" / name, dtype="bfloat16", backend="emulated")
    assert max(found) < BOUNDS["bfloat16"], [f"{error:.1e}" for error in found]
