"""The ring, the anchors and the absolute frames against a rollout that has none of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closeness import relative_error
from naive_rollout import NaiveRollout
from random_model import build_rollout, drawn_noise, flat_config, random_weights
from torch import Tensor

from echo_rt.errors import ConfigError

# float32 rounding of two layers; a wrong slot, id or gate is off by 1e-2 and more.
BOUND = 1e-5

SINGLE = {"frames": 1, "layers": 1, "normalize_k": True, "rebuild_on_prompt_switch": True}
KEEPS = {"frames": 2, "layers": 2, "normalize_k": True, "rebuild_on_prompt_switch": False}
SHORT = [1000, 500]
ROTATED = {"frames": 3, "layers": 2, "normalize_k": True, "rebuild_on_prompt_switch": False, "reads": "rotated"}
NO_SINK = {"sink_frames": 0, "memory": None}

# (changes to the config, memory mode, blocks, blocks at which the prompt switches)
CASES = {
    "released-evolve": ({}, "evolve", 240, [30, 77, 78, 150]),
    "released-prior": ({"denoising_steps": SHORT}, "prior", 200, [3, 50, 100]),
    "released-off": ({"denoising_steps": SHORT}, "off", 200, [50, 160]),
    "no-encoder": ({"memory": None, "denoising_steps": [1000]}, "off", 200, [12]),
    "early-switches": ({"denoising_steps": SHORT}, "evolve", 40, [1, 2, 3, 4, 5, 6, 7, 8, 20]),
    "early-switches-prior": ({"denoising_steps": SHORT}, "prior", 30, [1, 2, 3, 4, 5, 6]),
    "one-frame-blocks": (
        {
            "frames_per_block": 1,
            "sink_frames": 3,
            "local_frames": 4,
            "max_temporal_id": 9,
            "memory": SINGLE,
            "denoising_steps": [900, 300],
        },
        "evolve",
        300,
        [1, 2, 3, 5, 8, 9, 60],
    ),
    "two-frame-blocks": (
        {
            "frames_per_block": 2,
            "sink_frames": 4,
            "local_frames": 6,
            "max_temporal_id": 12,
            "memory": KEEPS,
            "denoising_steps": SHORT,
        },
        "evolve",
        200,
        [1, 3, 6, 7, 50, 90],
    ),
    "smallest-window": (
        {
            "local_frames": 3,
            "max_temporal_id": 8,
            "denoising_steps": SHORT,
            "latent_height": 2,
        },
        "evolve",
        200,
        [1, 2, 3, 40],
    ),
    "late-saturation": (
        {"max_temporal_id": 60, "denoising_steps": SHORT, "timestep_shift": 3.0, "context_timestep": 20},
        "evolve",
        60,
        [25],
    ),
    "unlike-wan": (
        {
            "num_train_timesteps": 500,
            "denoising_steps": [500, 300, 100],
            "context_timestep": 40,
            "rope_theta": 1000.0,
            "eps": 1e-3,
            "patch_size": [1, 1, 2],
            "latent_height": 2,
            "latent_width": 6,
        },
        "evolve",
        24,
        [7],
    ),
    "rotated-reads": ({"memory": ROTATED, "denoising_steps": SHORT}, "evolve", 120, [2, 3, 40, 90]),
    "rotated-reads-rebuilt": (
        {"memory": ROTATED | {"rebuild_on_prompt_switch": True}, "denoising_steps": SHORT},
        "evolve",
        60,
        [1, 2, 3, 6, 8, 9, 31, 32],
    ),
    "rotated-reads-one-frame-blocks": (
        {
            "frames_per_block": 1,
            "sink_frames": 2,
            "local_frames": 4,
            "max_temporal_id": 9,
            "memory": SINGLE | {"reads": "rotated"},
            "denoising_steps": SHORT,
        },
        "evolve",
        60,
        [3, 20],
    ),
    "no-sink": (NO_SINK | {"max_temporal_id": 1023, "denoising_steps": SHORT}, "off", 60, [1, 2, 3, 4, 30]),
    # Absolute positions, and on from where Wan's table ends: bounded. Long blocks get there soon.
    "past-the-table": (
        {
            "frames_per_block": 33,
            "sink_frames": 33,
            "local_frames": 66,
            "max_temporal_id": 1023,
            "memory": None,
            "denoising_steps": [1000],
        },
        "off",
        36,
        [2, 33],
    ),
    "no-sink-bounded": (NO_SINK | {"max_temporal_id": 8, "denoising_steps": SHORT}, "off", 100, [3, 50]),
    "no-sink-one-frame-blocks": (
        NO_SINK | {"frames_per_block": 1, "local_frames": 5, "denoising_steps": [1000], "first_block_steps": SHORT},
        "off",
        60,
        [2, 5, 6, 40],
    ),
    "more-steps-at-first": ({"first_block_steps": [1000, 750, 500, 250], "denoising_steps": SHORT}, "evolve", 30, [3]),
    "fewer-steps-at-first": ({"first_block_steps": [800], "denoising_steps": SHORT}, "evolve", 12, [1]),
    "renewed-sink": (
        {"recache_sink": True, "memory": None, "max_temporal_id": 1023, "denoising_steps": SHORT},
        "off",
        40,
        [1, 2, 3, 4, 5, 20],
    ),
    # The sink's new keys are turned from their unrotated copies once the ids are bounded.
    "renewed-sink-bounded": (
        {"recache_sink": True, "memory": None, "max_temporal_id": 11, "denoising_steps": SHORT},
        "off",
        40,
        [1, 3, 4, 20],
    ),
    "renewed-sink-one-frame-blocks": (
        {
            "frames_per_block": 1,
            "sink_frames": 3,
            "local_frames": 4,
            "max_temporal_id": 9,
            "memory": SINGLE,
            "recache_sink": True,
            "denoising_steps": SHORT,
        },
        "evolve",
        60,
        [1, 2, 5, 8, 30],
    ),
}


# Past the second of two switches in a row in the steady state; later blocks only repeat it.
MOST = 80
LENGTHS = [
    *(pytest.param(case, MOST, id=case) for case in CASES),
    *(
        pytest.param(case, blocks, id=f"{case}-whole", marks=pytest.mark.long)
        for case, (_, _, blocks, _) in CASES.items()
        if blocks > MOST
    ),
]


@pytest.mark.parametrize(("case", "most"), LENGTHS)
def test_equals_a_rollout_that_keeps_the_whole_history(case: str, most: int) -> None:
    changes, mode, blocks, switches = CASES[case]
    blocks = min(blocks, most)
    flat = flat_config(**changes)
    weights = random_weights(flat)
    rollout = build_rollout(flat, weights, mode)
    naive = NaiveRollout(flat, weights, mode)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randn(1 + i % flat["text_len"], flat["text_dim"], generator=generator) for i in range(20)]
    shape = rollout.state.noise.shape  # drawn for each step by itself, so one shape does for all blocks

    def noise(block: int, step: int) -> Tensor:
        return drawn_noise(shape, 5, block)[step]

    rollout.start(prompts[0], seed=5)
    naive.set_prompt(prompts[0])
    attended = set()
    for block in range(blocks):
        if block in switches:
            prompt = prompts[1 + switches.index(block)]
            rollout.switch_prompt(prompt)
            naive.set_prompt(prompt)
        actual = rollout.next_block()
        error = relative_error(actual, naive.next_block(noise))
        assert error < BOUND, f"block {block}: latents are off by {error:.1e}"
        if mode == "evolve" and naive.memory is not None:
            error = relative_error(rollout.state.memory, naive.memory)
            assert error < BOUND, f"block {block}: the memory is off by {error:.1e}"
        attended.add(rollout.memory_attended(block))
    assert attended == ({False} if mode == "off" else {False, True})
    assert min(naive.ids_seen) == 0 and max(naive.ids_seen) <= flat["max_temporal_id"]


def test_addresses_never_change() -> None:
    flat = flat_config(denoising_steps=SHORT)
    rollout = build_rollout(flat, random_weights(flat), "evolve")
    state = rollout.state
    tensors = state.tensors() | {"x": state.x, "noise": state.noise, "write_index": state.write_index}
    before = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    rollout.start(torch.zeros(1, flat["text_dim"]))
    for block in range(12):
        if block == 7:
            rollout.switch_prompt(torch.ones(2, flat["text_dim"]))
        rollout.next_block()
    after = state.tensors() | {"x": state.x, "noise": state.noise, "write_index": state.write_index}
    assert {name: tensor.data_ptr() for name, tensor in after.items()} == before


def test_starting_again_forgets_the_video_before() -> None:
    flat = flat_config(denoising_steps=SHORT)
    rollout = build_rollout(flat, random_weights(flat), "evolve")

    def video() -> Tensor:
        rollout.start(torch.ones(2, flat["text_dim"]), seed=3)
        return torch.stack([rollout.next_block().clone() for _ in range(8)])

    first = video()
    rollout.switch_prompt(torch.zeros(1, flat["text_dim"]))
    assert torch.equal(first, video())


@pytest.mark.parametrize("first", [0, 325_000, 10_000_000, 2**31 - 100])
def test_frames_far_into_the_stream_are_as_exact_as_the_first(first: int) -> None:
    """A stream whose ids saturated is moved to ``first`` frames later: the same scores must come out.

    Only differences of ids count, so the latents must not depend on the frame number. The state of block 20 is
    carried over; keys that were rotated at old frames are turned on by the difference, in float64.
    """
    flat = flat_config(denoising_steps=SHORT)
    weights = random_weights(flat)
    size = flat["frames_per_block"]
    # A multiple of the ring's and the latents' period, so that every frame keeps its slot.
    period = flat["local_frames"] * (flat["local_frames"] + flat["sink_frames"])
    later = first - first % period
    latents = []
    for moved in (0, later):
        rollout = build_rollout(flat, weights, "evolve")
        rollout.start(torch.ones(3, flat["text_dim"]))
        for _ in range(20):
            rollout.next_block()
        state = rollout.state
        if moved:
            rates = state.rope.inverse_frequencies
            pairs = rates.shape[0]
            keys = state.kv[:, 0].double().unflatten(-1, (-1, 2))
            turn = torch.polar(torch.ones(pairs, dtype=torch.float64), rates * moved)
            turned = torch.view_as_complex(keys[..., :pairs, :].contiguous()) * turn
            keys[..., :pairs, :] = torch.view_as_real(turned)
            state.kv[:, 0] = keys.flatten(-2).float()
            state.block += moved // size
            state.positions[0] += moved // size
        made = []
        for _ in range(12):
            # The noise is keyed by the block, so the moved rollout is given the other's.
            noise = drawn_noise(state.noise.shape, 0, state.block + 1 - moved // size)
            made.append(rollout.next_block(noise).clone())
            newest = state.layout.last_frame(state.block)
            assert state.layout.temporal_id(state.block, newest) == flat["max_temporal_id"]
            assert state.positions[2] == state.layout.shift(state.block)
        latents.append(torch.stack(made))
    assert relative_error(latents[1], latents[0].double()) < BOUND


@pytest.mark.parametrize(
    ("changes", "mode", "words"),
    [
        ({"memory": None}, "evolve", "needs a memory encoder"),
        ({"memory": None}, "prior", "needs a memory encoder"),
    ],
)
def test_modes_that_need_a_memory_encoder_are_refused(changes: dict[str, Any], mode: str, words: str) -> None:
    flat = flat_config(**changes)
    with pytest.raises(ConfigError, match=words):
        build_rollout(flat, random_weights(flat), mode)
