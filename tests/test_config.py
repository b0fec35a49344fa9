from __future__ import annotations

import json
from typing import Any

import pytest
from random_model import flat_config

from echo_rt.config import ModelConfig, TextEncoderConfig, TransformerConfig, VaeConfig
from echo_rt.errors import ConfigError

MEMORY = {"frames": 3, "layers": 2, "normalize_k": False, "rebuild_on_prompt_switch": True}

# (changes, what the message must name)
BAD = [
    ({"sink_frames": 4}, ["sink_frames", "3", "4"]),
    ({"local_frames": 8}, ["local_frames", "3", "8"]),
    ({"sink_frames": 0}, ["sink_frames must be 3 or more beside a memory, got 0"]),
    ({"sink_frames": -3}, ["sink_frames must be an integer of 0 or more, got -3"]),
    ({"sink_frames": False}, ["sink_frames", "False"]),
    ({"recache_sink": 1}, ["recache_sink must be true or false, got 1"]),
    ({"memory": MEMORY | {"reads": "raw"}}, ["memory_reads must be one of unrotated, rotated; got 'raw'"]),
    ({"first_block_steps": [500, 500]}, ["first_block_steps", "[500, 500]"]),
    ({"first_block_steps": 500}, ["first_block_steps", "500"]),
    ({"sink_frames": 0, "memory": None, "local_frames": 9, "max_temporal_id": 7}, ["9", "7", "8"]),
    ({"frames_per_block": 0}, ["frames_per_block", "0"]),
    ({"frames_per_block": 1, "memory": MEMORY | {"frames": 2}}, ["memory", "2", "1"]),
    ({"max_temporal_id": 13}, ["3", "9", "15", "13", "14"]),
    ({"max_temporal_id": 10, "memory": None}, ["12", "10", "11"]),
    ({"dim": 25}, ["dim 25", "num_heads 2"]),
    ({"dim": 8}, ["head size", "8", "4"]),
    ({"num_heads": -2}, ["num_heads", "-2"]),
    ({"freq_dim": 15}, ["freq_dim", "15"]),
    ({"latent_height": 5}, ["6x5", "2x2"]),
    ({"latent_width": 0}, ["latent_width", "0"]),
    ({"patch_size": [2, 2, 2]}, ["patch_size", "[2, 2, 2]"]),
    ({"in_channels": 36}, ["36", "4"]),
    ({"denoising_steps": []}, ["denoising_steps", "[]"]),
    ({"denoising_steps": [250, 500]}, ["[250, 500]"]),
    ({"denoising_steps": [1001]}, ["1..1000", "[1001]"]),
    ({"denoising_steps": [500, 0]}, ["[500, 0]"]),
    ({"timestep_shift": 0}, ["timestep_shift", "above 0", "got 0"]),
    ({"context_timestep": 1001}, ["context_timestep", "1001"]),
    ({"memory": MEMORY | {"layers": 0}}, ["layers", "0"]),
    ({"memory": MEMORY | {"rebuild_on_prompt_switch": 3}}, ["rebuild_on_prompt_switch", "3"]),
    ({"timestep_shift": "fast"}, ["timestep_shift", "'fast'"]),
    ({"timestep_shift": float("inf")}, ["timestep_shift", "inf"]),
    ({"timestep_shift": float("nan")}, ["timestep_shift", "nan"]),
    ({"context_timestep": True}, ["context_timestep", "True"]),
    ({"denoising_steps": 500}, ["denoising_steps", "500"]),
    ({"denoising_steps": [True]}, ["denoising_steps", "[True]"]),
    ({"patch_size": [1, 0, 2]}, ["patch_size", "[1, 0, 2]"]),
    ({"eps": "small"}, ["eps", "'small'"]),
    ({"eps": -1.0}, ["eps", "-1.0"]),
    ({"memory": "x"}, ["memory", "'x'"]),
    ({"dim": "wide"}, ["dim", "'wide'"]),
    ({"dim": 2**21}, ["dim", "at most 1048576", "2097152"]),
    ({"num_layers": 1_000_000}, ["num_layers", "at most 1024", "1000000"]),
    ({"memory": MEMORY | {"layers": 1025}}, ["layers", "at most 1024", "1025"]),
    ({"local_frames": 3 * 2**20}, ["local_frames", "at most"]),
    ({"denoising_steps": list(range(2000, 0, -1)), "num_train_timesteps": 2000}, ["denoising_steps", "[2000, 1999"]),
    ({"rope_theta": float("nan")}, ["rope_theta", "nan"]),
    ({"eps": "x" * 10_000}, ["eps", "xxx"]),
]


@pytest.mark.parametrize(("changes", "words"), BAD, ids=lambda value: str(value)[:60])
def test_what_a_model_cannot_be_is_refused_by_name_and_number(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_flat(flat_config(**changes))
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words) and len(message) < 250, message


@pytest.mark.parametrize("missing", ["dim", "latent_height", "num_layers"])
def test_a_missing_entry_is_named(missing: str) -> None:
    flat = flat_config()
    del flat[missing]
    with pytest.raises(ConfigError, match=missing):
        ModelConfig.from_flat(flat)


RECIPES: dict[str, dict[str, Any]] = {
    "rotated": {"memory": MEMORY | {"reads": "rotated"}},
    "no-sink": {"sink_frames": 0, "local_frames": 21, "max_temporal_id": 1023, "memory": None},
    "framewise": {
        "frames_per_block": 1,
        "sink_frames": 0,
        "local_frames": 21,
        "max_temporal_id": 1023,
        "memory": None,
        "denoising_steps": [1000],
        "first_block_steps": [1000, 750, 500, 250],
    },
    "absolute": {"max_temporal_id": 1023, "memory": None, "recache_sink": True},
    "bounded": {"max_temporal_id": 11, "memory": None, "recache_sink": True},
}


@pytest.mark.parametrize("recipe", ["", *RECIPES])
def test_flat_round_trip(recipe: str) -> None:
    changes = RECIPES.get(recipe, {})
    config = ModelConfig.from_flat(flat_config(**changes))
    flat = json.loads(json.dumps(config.to_flat()))
    assert ModelConfig.from_flat(flat) == config and hash(ModelConfig.from_flat(flat)) == hash(config)
    assert flat | {**changes, "memory": flat["memory"]} == flat


def test_what_a_config_does_not_say_is_as_it_was() -> None:
    config = ModelConfig.from_flat(flat_config())
    assert config.memory is not None and not config.memory.reads_rotated
    assert config.sampler.first_block_steps == () and config.sampler.most_steps == 4
    assert config.window.recache_sink is False


def test_released_sizes_are_derived() -> None:
    wan = TransformerConfig(dim=1536, ffn_dim=8960, freq_dim=256, num_heads=12, num_layers=30)
    config = ModelConfig.from_flat(wan.__dict__ | {"latent_height": 60, "latent_width": 104, "memory": MEMORY})
    assert wan.head_dim == 128 and wan.rope_dims == (44, 42, 42)
    assert config.tokens_per_frame == 1560 and config.tokens_per_block == 4680 and config.memory_tokens == 4680
    assert config.window.cached_frames == 12


def test_vae_strides() -> None:
    vae = VaeConfig()
    assert (vae.spatial_stride, vae.temporal_stride) == (8, 4)
    assert [vae.video_frames(n) for n in (0, 1, 3, 6)] == [0, 1, 9, 21]
    with pytest.raises(ConfigError, match="z_dim 8"):
        VaeConfig(z_dim=8)
    with pytest.raises(ConfigError, match="temporal_downsample"):
        VaeConfig(temporal_downsample=(True,))


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (VaeConfig, {"dim_mult": ()}),
        (VaeConfig, {"dim_mult": (1,) * 70, "temporal_downsample": (True,) * 69}),
        (VaeConfig, {"dim_mult": (1, 2, 4, 10**9)}),
        (VaeConfig, {"num_res_blocks": 10**6}),
        (VaeConfig, {"latents_mean": (float("nan"),) * 16}),
        (VaeConfig, {"latents_std": ("1",) * 16}),
        (TextEncoderConfig, {"num_layers": 10**6}),
        (TextEncoderConfig, {"vocab_size": 2**40}),
        (TextEncoderConfig, {"relative_attention_num_buckets": 0}),
        (TextEncoderConfig, {"eps": float("nan")}),
    ],
    ids=str,
)
def test_numbers_of_no_model_are_refused(config: type[VaeConfig | TextEncoderConfig], changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        config(**changes)
