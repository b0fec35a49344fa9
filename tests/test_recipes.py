"""The table of recipes: whole, of facts that there are, and found by a name or by the name of a published file."""

from __future__ import annotations

from pathlib import Path

import pytest

from echo_rt._C import RingLayout
from echo_rt.config import ModelConfig, SamplerConfig, TransformerConfig, WindowConfig
from echo_rt.errors import ConfigError
from echo_rt.options import OVERRIDES, RuntimeOptions
from echo_rt.recipes import RECIPES, Recipe, find_recipe, published_as

# B, sink, local, largest id, steps, those of the first block, EMA, whether a switch renews the sink
FOUR = (1000, 750, 500, 250)
PUBLISHED = {
    "echo-infinity-short": (3, 3, 9, 20, FOUR, (), False, False),
    "echo-infinity-long": (3, 3, 9, 20, FOUR, (), False, False),
    "self-forcing": (3, 0, 21, 1023, FOUR, (), True, False),
    "causal-forcing-chunkwise": (3, 0, 21, 1023, FOUR, (), False, False),
    "causal-forcing-framewise": (1, 0, 21, 1023, FOUR, (), True, False),
    "causal-forcing-framewise-2step": (1, 0, 21, 1023, (1000, 500), FOUR, True, False),
    "causal-forcing-framewise-1step": (1, 0, 21, 1023, (1000,), FOUR, True, False),
    "longlive": (3, 3, 9, 1023, FOUR, (), False, True),
    "longlive-infinity": (3, 3, 9, 11, FOUR, (), False, True),
    "self-gradient-forcing-chunkwise": (3, 3, 9, 20, FOUR, (), True, False),
    "self-gradient-forcing-framewise": (1, 4, 17, 20, FOUR, (), True, False),
    "rmd": (1, 0, 21, 1023, FOUR, (), False, False),
    "opsd-v-longlive": (3, 3, 9, 11, FOUR, (), False, False),
    "opsd-v-self-forcing": (3, 3, 9, 11, FOUR, (), False, False),
    "phymotion": (3, 3, 9, 11, FOUR, (), False, False),
}
WINDOW = ("frames_per_block", "sink_frames", "local_frames", "max_temporal_id", "denoising_steps", "first_block_steps")
MEMORY = {"memory_frames", "memory_reads", "rebuild_on_prompt_switch"}


def test_the_table_is_the_publishers() -> None:
    assert list(RECIPES) == list(PUBLISHED)
    for name, (*window, ema, renewed) in PUBLISHED.items():
        recipe = RECIPES[name]
        assert [recipe.facts[fact] for fact in WINDOW] == window, name
        assert (recipe.ema, recipe.facts["recache_sink"]) == (ema, renewed), name
        assert (recipe.facts["timestep_shift"], recipe.facts["context_timestep"]) == (5, 0)
    short, long = RECIPES["echo-infinity-short"], RECIPES["echo-infinity-long"]
    assert (short.facts["memory_reads"], short.facts["rebuild_on_prompt_switch"]) == ("rotated", False)
    assert (long.facts["memory_reads"], long.facts["rebuild_on_prompt_switch"]) == ("unrotated", True)
    assert (short.normalize_k, long.normalize_k) == (True, False)
    assert short.facts["memory_frames"] == long.facts["memory_frames"] == 3
    with_lora = {name for name, recipe in RECIPES.items() if recipe.lora}
    own = {"opsd-v-longlive", "opsd-v-self-forcing", "phymotion"}
    assert with_lora == {"echo-infinity-long", "longlive", "longlive-infinity", *own}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_fact_is_one_that_a_caller_may_choose(recipe: Recipe) -> None:
    memory = MEMORY if recipe.memory == "required" else set()
    assert set(recipe.facts) | MEMORY == set(OVERRIDES) and set(recipe.facts) & MEMORY == memory
    transformer = TransformerConfig(dim=24, ffn_dim=40, freq_dim=16, num_heads=2, num_layers=2)
    flat = ModelConfig(transformer, 4, 6).to_flat() | recipe.as_json()["facts"] | {"memory": None}
    config = ModelConfig.from_flat(flat)  # and one that can be
    assert config.window == WindowConfig(**{name: recipe.facts[name] for name in WindowConfig.__dataclass_fields__})
    assert config.sampler == SamplerConfig(
        **{name: recipe.facts[name] for name in SamplerConfig.__dataclass_fields__ if name in recipe.facts}
    )


@pytest.mark.parametrize(
    ("name", "held", "trained"),
    [
        ("self-gradient-forcing-chunkwise", 12, 21),
        ("self-gradient-forcing-framewise", 21, 21),
        ("rmd", 21, None),
        ("opsd-v-longlive", 12, 12),
        ("opsd-v-self-forcing", 12, 12),
        ("phymotion", 12, 12),
    ],
)
def test_what_a_block_sees_is_what_the_publishers_cache_holds(name: str, held: int, trained: int | None) -> None:
    """A list of frames that drops the oldest behind the sink; the newest has the last of the ``trained`` places."""
    facts = RECIPES[name].facts
    width, sink = facts["frames_per_block"], facts["sink_frames"]
    window = {fact: facts[fact] for fact in WindowConfig.__dataclass_fields__ if fact != "recache_sink"}
    layout = RingLayout(memory_frames=0, **window)
    frames: list[int] = []
    for block in range(1000 // width):
        frames += range(block * width, (block + 1) * width)
        del frames[sink : sink + max(0, len(frames) - held)]
        newest = frames[-1] if trained is None else min(frames[-1], trained - 1)
        places = {
            frame: frame if frame < sink else newest - (len(frames) - 1 - place) for place, frame in enumerate(frames)
        }
        local = range(layout.oldest_local(block), layout.last_frame(block) + 1)
        seen = {frame: frame for frame in range(min(sink, layout.last_frame(block) + 1))}
        assert seen | {frame: layout.temporal_id(block, frame) for frame in local} == places, (name, block)


def test_an_unknown_name_is_refused_with_the_closest() -> None:
    for ask in (find_recipe, lambda name: RuntimeOptions(recipe=name)):
        with pytest.raises(ConfigError, match=r"^recipe must be one of echo-infinity-short, .*'self-forcing'\?\)$"):
            ask("Self-Forcng")
        with pytest.raises(ConfigError, match=r"phymotion; got 3$"):
            ask(3)
    assert find_recipe("longlive") is RECIPES["longlive"]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("checkpoints/self_forcing_dmd.pt", "self-forcing"),
        ("anywhere/self_forcing_dmd.pt", "self-forcing"),
        ("checkpoints/chunkwise/causal_forcing.pt", "causal-forcing-chunkwise"),
        ("framewise/causal_forcing.pt", "causal-forcing-framewise"),
        ("causal-forcing++/framewise-2step.pt", "causal-forcing-framewise-2step"),
        ("causal-forcing++/framewise-1step.pt", "causal-forcing-framewise-1step"),
        ("LongLive-1.3B/models/longlive_base.pt", "longlive"),
        ("Self_Gradient_Forcing/chunkwise/ar/model.pt", "self-gradient-forcing-chunkwise"),
        ("checkpoints/framewise/ar/model.pt", "self-gradient-forcing-framewise"),
        ("RMD/stage2/model.pt", "rmd"),
        ("OPSD-V/checkpoints/opsdv_longlive_lora.pt", "opsd-v-longlive"),
        ("opsdv_self_forcing_lora.pt", "opsd-v-self-forcing"),
        ("PhyMotion-CausalForcing-1.3B", "phymotion"),
        ("causal_forcing.pt", None),
        ("chunkwise/longvideo.pt", None),
        ("chunkwise/ar_diffusion.pt", None),
        ("models/lora.pt", None),
        ("model.pt", None),
        ("ar/model.pt", None),
        ("chunkwise/model.pt", None),  # of Self Gradient Forcing Plus
        ("stage2/model.pt", None),
        ("self_forcing_dmd_ema_as_generator.pt", None),
        ("echo_infinity.pt", None),
        ("my_self_forcing_dmd.pt", None),
        ("self_forcing_dmd.pt/model.pt", None),
    ],
)
def test_a_published_file_is_known_by_its_name(path: str, name: str | None) -> None:
    published = published_as(Path("/models") / path)
    assert (None if published is None else published[0].name) == name
    assert published is None or path.endswith(published[1])


def test_a_file_is_known_by_the_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "framewise").mkdir()
    monkeypatch.chdir(tmp_path / "framewise")
    published = published_as("causal_forcing.pt")
    assert published == (RECIPES["causal-forcing-framewise"], "framewise/causal_forcing.pt")


def test_a_link_is_known_by_its_own_name(tmp_path: Path) -> None:
    """In the cache of the hub a file is called by its digest."""
    (tmp_path / "blob").write_bytes(b"")
    (tmp_path / "self_forcing_dmd.pt").symlink_to(tmp_path / "blob")
    assert published_as(tmp_path / "self_forcing_dmd.pt") == (RECIPES["self-forcing"], "self_forcing_dmd.pt")


def test_the_first_file_that_is_known_tells() -> None:
    known = published_as("a.pt", "opsdv_longlive_lora.pt", "longlive_base.pt")
    assert known is not None and known[0].name == "opsd-v-longlive"
    assert published_as("a.pt") is published_as() is None
