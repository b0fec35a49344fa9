"""The naive rollout is what the ring is tested against; the published implementation is what it is tested against."""

from __future__ import annotations

import json
from pathlib import Path

from closeness import relative_error
from naive_rollout import NaiveRollout
from safetensors.torch import load_file


def test_naive_rollout_reproduces_the_published_one(golden_dir: Path) -> None:
    bundle = golden_dir / "rollout_small"
    config = json.loads((bundle / "config.json").read_text())
    inputs, expected = load_file(bundle / "inputs.safetensors"), load_file(bundle / "expected.safetensors")
    naive = NaiveRollout(config, load_file(bundle / "weights.safetensors"), "evolve")
    naive.set_prompt(inputs["prompt_embeds.0"])
    for block in range(config["num_blocks"]):
        if block in config["prompt_switch_blocks"]:
            naive.set_prompt(inputs[f"prompt_embeds.{config['prompt_switch_blocks'].index(block) + 1}"])

        def noise(block: int, step: int) -> object:
            return inputs[f"noise.{block}" if step == 0 else f"renoise.{block}.{step - 1}"]

        assert relative_error(naive.next_block(noise), expected[f"latents.{block}"]) < 2e-6
        if naive.memory is not None:
            assert relative_error(naive.memory, expected[f"memory_state.{block}"]) < 2e-6
