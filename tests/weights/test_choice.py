"""Which recipe a model is run by, of which weights, and what is said of it, by loading files as they are published."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from random_weights import MODEL, TRANSFORMER, random_tensors, transformer, write_original
from torch import Tensor

from echo_rt.config import MemoryConfig
from echo_rt.errors import ConfigError, WeightsError
from echo_rt.options import MemoryMode, RuntimeOptions
from echo_rt.recipes import RECIPES
from echo_rt.weights.choice import TAKEN
from echo_rt.weights.load_model import LoadedModel, load_model
from echo_rt.weights.shapes import MEMORY_PREFIX, memory_shapes, transformer_shapes

WINDOW = {"frames_per_block": 3, "sink_frames": 3, "local_frames": 6, "max_temporal_id": 15}
PLAIN, EMA, NO_PARTS = 0, 5, 9  # seeds


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan2.1 folder as it is published."""
    return write_original(tmp_path_factory.mktemp("stock"))


def memory(normalize_k: bool = True) -> dict[str, Tensor]:
    config = dataclasses.replace(MODEL, memory=MemoryConfig(frames=3, normalize_k=normalize_k))
    return random_tensors(memory_shapes(config), 100)


def part(seed: int, memory_tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    named = {f"model.{name}": tensor for name, tensor in transformer(seed).items()}
    return named | {f"model.{MEMORY_PREFIX}{name}": tensor for name, tensor in (memory_tensors or {}).items()}


def saved(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def both(path: Path) -> Path:
    return saved(path, {"generator": part(PLAIN), "generator_ema": part(EMA)})


def lora(path: Path, memory_tensors: Mapping[str, Tensor] | None = None) -> Path:
    shape = transformer_shapes(TRANSFORMER)["blocks.0.self_attn.q.weight"]
    name = "base_model.model.blocks.0.self_attn.q.lora_{}.weight"
    factors = {name.format("A"): torch.ones(2, shape[1]), name.format("B"): torch.ones(shape[0], 2)}
    encoder = {} if memory_tensors is None else {"query_memory_encoder": dict(memory_tensors)}
    return saved(path, {"generator_lora": factors, **encoder})


def load(folder: Path, snapshot: Mapping[str, Any] | None = None, **options: Any) -> LoadedModel:
    return load_model(folder, RuntimeOptions(**{"device": "cpu", "width": 48, "height": 32} | options), snapshot)


def seed_of(loaded: LoadedModel) -> int:
    """Of whose weights the transformer is."""
    name = "blocks.0.norm3.weight"
    (seed,) = (
        seed
        for seed in (PLAIN, EMA, NO_PARTS)
        if torch.equal(loaded.tensors.transformer[name], transformer(seed)[name])
    )
    return seed


def own_folder(stock: Path, folder: Path, **facts: Any) -> Path:
    """``stock`` with an object ``echo_rt`` in its config."""
    shutil.copytree(stock, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"echo_rt": facts}))
    return folder


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*arguments, **options)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    return str(caught.value)


# ---------------------------------------------------------------- which recipe


def test_a_memory_encoder_in_the_checkpoint(stock: Path, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"generator": part(PLAIN, memory()), "generator_ema": part(EMA)})
    loaded = load(stock, checkpoint=path)
    assert (loaded.taken.recipe, loaded.taken.recipe_reason) == (
        "echo-infinity-short",
        "the checkpoint has a memory encoder",
    )
    assert loaded.mode is MemoryMode.EVOLVE and loaded.config.memory is not None
    assert loaded.config.memory.reads_rotated and not loaded.config.memory.rebuild_on_prompt_switch
    assert seed_of(loaded) == PLAIN and loaded.taken.cautions == ()


@pytest.mark.parametrize("in_checkpoint", [False, True])
def test_a_memory_encoder_in_the_lora(stock: Path, tmp_path: Path, in_checkpoint: bool) -> None:
    path = saved(tmp_path / "a.pt", {"generator": part(PLAIN, memory() if in_checkpoint else None)})
    given = lora(tmp_path / "l.pt", memory(normalize_k=False))
    loaded = load(stock, checkpoint=path, lora=given)
    assert (loaded.taken.recipe, loaded.taken.recipe_reason) == ("echo-infinity-long", "the LoRA has a memory encoder")
    assert loaded.config.memory is not None and loaded.config.memory.rebuild_on_prompt_switch
    assert not loaded.config.memory.reads_rotated
    assert loaded.taken.loras == ((str(given), 1.0),)


@pytest.mark.parametrize(
    ("path", "name", "seed"),
    [
        ("checkpoints/self_forcing_dmd.pt", "self-forcing", EMA),
        ("chunkwise/causal_forcing.pt", "causal-forcing-chunkwise", PLAIN),
        ("framewise/causal_forcing.pt", "causal-forcing-framewise", EMA),
        ("causal-forcing++/framewise-2step.pt", "causal-forcing-framewise-2step", EMA),
        ("longlive_base.pt", "longlive", PLAIN),
        ("chunkwise/ar/model.pt", "self-gradient-forcing-chunkwise", EMA),
        ("framewise/ar/model.pt", "self-gradient-forcing-framewise", EMA),
        ("RMD/stage2/model.pt", "rmd", PLAIN),
    ],
)
def test_a_published_file(stock: Path, tmp_path: Path, path: str, name: str, seed: int) -> None:
    """Also where it is a link to a file of another name, as in the cache of the hub."""
    given = tmp_path / path
    given.parent.mkdir(exist_ok=True, parents=True)
    given.symlink_to(both(tmp_path / "blob.pt"))
    loaded = load(stock, checkpoint=given)
    assert (loaded.taken.recipe, seed_of(loaded)) == (name, seed)
    known_by = path.removeprefix("checkpoints/").removeprefix("causal-forcing++/")
    assert f"recipe {name} ({known_by} is published under this name)" in loaded.taken.line
    facts = RECIPES[name].facts
    window, sampler = loaded.config.window, loaded.config.sampler
    assert window.sink_frames == facts["sink_frames"] and window.recache_sink == facts["recache_sink"]
    assert sampler.denoising_steps == facts["denoising_steps"]
    assert sampler.first_block_steps == facts["first_block_steps"]
    assert loaded.mode is MemoryMode.OFF and loaded.config.memory is None


@pytest.mark.parametrize(
    ("base", "published", "name"),
    [
        ("longlive_base.pt", "opsdv_longlive_lora.pt", "opsd-v-longlive"),
        ("self_forcing_dmd_ema_as_generator.pt", "opsdv_self_forcing_lora.pt", "opsd-v-self-forcing"),
        ("chunkwise/causal_forcing.pt", "PhyMotion-CausalForcing-1.3B", "phymotion"),
    ],
)
def test_a_published_lora_says_more_than_its_base(
    stock: Path, tmp_path: Path, base: str, published: str, name: str
) -> None:
    path = both(tmp_path / base)
    given = tmp_path / published
    lora(given if given.suffix else given / "adapter_model.bin")
    loaded = load(stock, checkpoint=path, lora=given)
    assert (loaded.taken.recipe, loaded.taken.recipe_reason) == (name, f"{published} is published under this name")
    assert seed_of(loaded) == PLAIN and loaded.taken.cautions == ()
    window = loaded.config.window
    assert (window.sink_frames, window.local_frames, window.max_temporal_id) == (3, 9, 11)
    assert load(stock, checkpoint=path, lora=given, recipe="longlive").taken.recipe == "longlive"


def test_what_nothing_tells_is_refused(stock: Path, tmp_path: Path) -> None:
    listed = f"expected a recipe by name, one of {', '.join(RECIPES)} (echo-rt recipes shows them)"
    for path in ("a.pt", "framewise/ar_diffusion.pt", "causal_forcing.pt", "model.pt", "stage2/model.pt"):
        told = refusal(stock, checkpoint=both(tmp_path / path))
        assert told == f"neither tensors nor name of {tmp_path / path} tell how it is sampled: {listed}"
    told = refusal(stock)
    assert "a stock Wan2.1 without a checkpoint" in told and told.endswith(listed)
    told = refusal(stock, checkpoint=both(tmp_path / "chunkwise" / "longvideo.pt"))
    assert "Rolling-Forcing" in told and told.endswith(listed)
    # A folder cannot know what is put into it; who names a recipe for it all the same, is warned.
    folder = own_folder(stock, tmp_path / "own", recipe="self-forcing")
    assert "Rolling-Forcing" in refusal(folder, checkpoint=tmp_path / "chunkwise" / "longvideo.pt")
    named = load(folder, checkpoint=tmp_path / "chunkwise" / "longvideo.pt", recipe="self-forcing")
    assert "Rolling-Forcing" in named.taken.cautions[0]
    # A memory encoder says nothing of the transformer that it was trained beside.
    assert "a stock Wan2.1" in refusal(stock, lora=lora(tmp_path / "l.pt", memory(False)))


def test_one_that_is_named_wins(stock: Path, tmp_path: Path) -> None:
    path = both(tmp_path / "self_forcing_dmd.pt")
    loaded = load(stock, checkpoint=path, recipe="causal-forcing-framewise-1step", overrides={"local_frames": 12})
    assert (loaded.taken.recipe, loaded.taken.recipe_reason) == ("causal-forcing-framewise-1step", "asked for by name")
    assert loaded.config.sampler.denoising_steps == (1000,)
    assert loaded.config.window.local_frames == 12, "overrides act on top"
    assert load(stock, recipe="self-forcing").taken.recipe == "self-forcing", "the folder may hold what was distilled"


# ---------------------------------------------------------------- what the folder says


def test_a_folder_names_one(stock: Path, tmp_path: Path) -> None:
    folder = own_folder(stock, tmp_path / "own", recipe="longlive", local_frames=6)
    path = both(tmp_path / "self_forcing_dmd.pt")
    loaded = load(folder, checkpoint=path)
    assert (loaded.taken.recipe, loaded.taken.recipe_reason) == ("longlive", "the folder names it")
    assert (loaded.config.window.local_frames, loaded.config.window.recache_sink) == (6, True)
    # What it says beside belongs to that recipe.
    assert load(folder, checkpoint=path, recipe="longlive").config.window.local_frames == 6
    assert load(folder, checkpoint=path, recipe="longlive-infinity").config.window.local_frames == 9
    wrong = own_folder(stock, tmp_path / "wrong", recipe="long-live")
    told = refusal(wrong, checkpoint=path)
    assert told.startswith(f"{wrong}: echo_rt in config.json: recipe must be one of") and "'longlive'?" in told


def test_facts_of_a_folder_act_on_top(stock: Path, tmp_path: Path) -> None:
    folder = own_folder(stock, tmp_path / "own", local_frames=12)
    loaded = load(folder, checkpoint=both(tmp_path / "self_forcing_dmd.pt"))
    assert loaded.taken.recipe == "self-forcing"
    assert (loaded.config.window.sink_frames, loaded.config.window.local_frames) == (0, 12)


@pytest.mark.parametrize("normalize_k", [False, True])
def test_a_folder_of_before_recipes_runs_as_before(stock: Path, tmp_path: Path, normalize_k: bool) -> None:
    """It says its whole window; the averaged weights were taken, and the memory's keys told whether it is rebuilt."""
    folder = own_folder(stock, tmp_path / "own", **WINDOW)
    encoder = memory(normalize_k)
    path = saved(tmp_path / "a.pt", {"generator": part(PLAIN, encoder), "generator_ema": part(EMA, encoder)})
    loaded = load(folder, checkpoint=path)
    assert loaded.taken.recipe is None and loaded.taken.line == (
        f"model {folder}: the EMA weights of {path} ({loaded.taken.ema_reason}), sampled as its config.json says"
    )
    assert {name: getattr(loaded.config.window, name) for name in WINDOW} == WINDOW
    assert seed_of(loaded) == EMA
    assert loaded.config.memory == MemoryConfig(normalize_k=normalize_k, rebuild_on_prompt_switch=not normalize_k)
    named = load(folder, checkpoint=path, recipe="echo-infinity-short")
    assert named.config.window.local_frames == 9, "its facts are not those of a recipe that is named"


# ---------------------------------------------------------------- what a snapshot says


def test_a_snapshot_goes_on_with_its_recipe(stock: Path, tmp_path: Path) -> None:
    path = both(tmp_path / "self_forcing_dmd.pt")
    made = load(stock, checkpoint=path, recipe="longlive")
    snapshot = {TAKEN: made.taken.for_snapshots()}
    loaded = load(stock, snapshot, checkpoint=path)
    assert loaded.config == made.config and loaded.taken.for_snapshots() == made.taken.for_snapshots()
    assert loaded.taken.recipe_reason == "as in the snapshot"
    assert load(stock, snapshot, checkpoint=path, recipe="self-forcing").taken.recipe == "self-forcing"
    told = refusal(stock, {TAKEN: {"recipe": "of tomorrow"}}, checkpoint=path)
    assert told.startswith("the snapshot's recipe must be one of")


@pytest.mark.parametrize("snapshot", [{}, {TAKEN: "?"}, {TAKEN: {"recipe": None}}], ids=str)
def test_a_snapshot_of_before_recipes_goes_on_as_before(
    stock: Path, tmp_path: Path, snapshot: Mapping[str, Any]
) -> None:
    path = both(tmp_path / "self_forcing_dmd.pt")
    loaded = load(stock, snapshot, checkpoint=path)
    assert (loaded.taken.recipe, seed_of(loaded)) == (None, EMA)
    assert loaded.config == dataclasses.replace(MODEL, memory=None, transformer=loaded.config.transformer)


# ---------------------------------------------------------------- what is not downloaded yet


def test_the_downloads_of_a_recipe_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    def commands(**options: Any) -> str:
        with pytest.raises(WeightsError, match="to download it: ") as caught:
            load(Path("Wan-AI/Wan2.1-T2V-1.3B"), **options)
        return str(caught.value).partition("to download it: ")[2]

    base, hub = "hf download Wan-AI/Wan2.1-T2V-1.3B", "hf download Efficient-Large-Model/LongLive-1.3B models/"
    to = " --local-dir LongLive-1.3B"
    assert commands() == base
    assert commands(recipe="longlive") == f"{base} && {hub}longlive_base.pt{to} && {hub}lora.pt{to}"
    assert commands(checkpoint=tmp_path / "longlive_base.pt") == commands(recipe="longlive"), "told by the name"
    of_opsd_v = commands(lora=tmp_path / "opsdv_longlive_lora.pt")
    assert of_opsd_v == commands(recipe="opsd-v-longlive") and "MeiGen-AI/OPSD-V" in of_opsd_v
    # What is there needs no download.
    there = both(tmp_path / "a.pt")
    assert commands(recipe="longlive", checkpoint=there) == f"{base} && {hub}lora.pt{to}"
    assert commands(recipe="longlive", checkpoint=there, lora=there) == base
    # One repository, whole, for two options.
    assert (
        commands(recipe="echo-infinity-long")
        == f"{base} && hf download Echo-Team/Echo-Infinity --local-dir Echo-Infinity"
    )


# ---------------------------------------------------------------- which weights


@pytest.mark.parametrize(
    ("parts", "recipe", "asked", "ema", "reason"),
    [
        ("both", "self-forcing", None, True, "as in the recipe"),
        ("both", "self-forcing", False, False, "asked for"),
        ("both", "longlive", None, False, "as in the recipe"),
        ("both", "longlive", True, True, "asked for"),
        ("generator", "self-forcing", None, False, "it has no others, the recipe's are the EMA weights"),
        ("generator_ema", "longlive", None, True, "it has no others, the recipe's are the plain ones"),
        ("bare", "self-forcing", None, None, "it has no others, the recipe's are the EMA weights"),
        ("bare", "longlive", None, None, "it has no others"),
    ],
)
def test_which_weights(
    stock: Path, tmp_path: Path, parts: str, recipe: str, asked: bool | None, ema: bool | None, reason: str
) -> None:
    content = {"generator": part(PLAIN), "generator_ema": part(EMA)}
    path = saved(
        tmp_path / "a.pt",
        content if parts == "both" else part(NO_PARTS) if parts == "bare" else {parts: content[parts]},
    )
    loaded = load(stock, checkpoint=path, recipe=recipe, ema=asked)
    assert (loaded.taken.ema, loaded.taken.ema_reason) == (ema, reason)
    assert seed_of(loaded) == {True: EMA, False: PLAIN, None: NO_PARTS}[ema]
    assert reason in loaded.taken.line


@pytest.mark.parametrize(("parts", "asked"), [("generator", True), ("generator_ema", False), ("bare", True)])
def test_weights_that_are_asked_for_and_not_there(stock: Path, tmp_path: Path, parts: str, asked: bool) -> None:
    path = saved(tmp_path / "a.pt", part(PLAIN) if parts == "bare" else {parts: part(PLAIN)})
    with pytest.raises(WeightsError, match="which was asked for"):
        load(stock, checkpoint=path, recipe="self-forcing", ema=asked)


# ---------------------------------------------------------------- what does not fit


def test_a_recipe_that_does_not_fit_the_weights(stock: Path, tmp_path: Path) -> None:
    without = both(tmp_path / "a.pt")
    for name in ("echo-infinity-short", "echo-infinity-long"):
        told = refusal(stock, checkpoint=without, recipe=name)
        assert f"recipe {name!r} needs a memory encoder, and {without} has none" in told
    assert load(stock, checkpoint=without, recipe="echo-infinity-long", memory="off").config.memory is None
    having = saved(tmp_path / "b.pt", {"generator": part(PLAIN, memory())})
    told = refusal(stock, checkpoint=having, recipe="longlive")
    assert f"recipe 'longlive' has no memory, and {having} has a memory encoder" in told
    assert load(stock, checkpoint=having, recipe="longlive", memory="off").config.memory is None
    told = refusal(stock, checkpoint=having, recipe="self-forcing", memory="evolve")
    assert "sink_frames must be 3 or more beside a memory" in told
    told = refusal(stock, checkpoint=having, overrides={"frames_per_block": 1, "sink_frames": 1, "local_frames": 9})
    assert "3 memory frames are more than frames_per_block 1" in told


@pytest.mark.parametrize("fact", [{"memory_reads": "raw"}, {"memory_frames": 0}, {"rebuild_on_prompt_switch": 1}])
def test_facts_of_a_memory_are_checked_where_there_is_none(stock: Path, tmp_path: Path, fact: dict[str, Any]) -> None:
    told = refusal(stock, checkpoint=both(tmp_path / "a.pt"), recipe="self-forcing", overrides=fact)
    assert "memory: " in told


def test_what_is_not_as_published_is_a_warning(stock: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "echo_rt.recipe")
    path = both(tmp_path / "longlive_base.pt")
    loaded = load(stock, checkpoint=path)
    (caution,) = loaded.taken.cautions
    assert caution == "recipe longlive is published with a LoRA, and none is given"
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [caution]
    assert caplog.messages[0] == loaded.taken.line
    assert load(stock, checkpoint=path, lora=lora(tmp_path / "l.pt")).taken.cautions == ()

    having = saved(tmp_path / "b.pt", {"generator": part(PLAIN, memory(normalize_k=False))})
    (caution,) = load(stock, checkpoint=having).taken.cautions
    assert "echo-infinity-short normalizes its keys, this one does not normalize them" in caution

    folder = own_folder(stock, tmp_path / "own", recipe="echo-infinity-long")
    (caution,) = load(folder, checkpoint=path).taken.cautions
    assert "made for a memory encoder, and there is none: it runs without" in caution
    assert load(folder, checkpoint=path, memory="off").taken.cautions == ()


def test_what_was_taken_in_a_line(stock: Path, tmp_path: Path) -> None:
    path, given = both(tmp_path / "longlive_base.pt"), lora(tmp_path / "l.pt")
    taken = load(stock, checkpoint=path, lora=given).taken
    assert taken.line == (
        "recipe longlive (longlive_base.pt is published under this name): the plain weights of "
        f"{path} (as in the recipe), with the LoRA {given} at strength 1, in {stock}"
    )
    assert taken.as_json() == {
        "recipe": "longlive",
        "recipe_reason": "longlive_base.pt is published under this name",
        "ema": False,
        "ema_reason": "as in the recipe",
        "model": str(stock),
        "checkpoint": str(path),
        "loras": [{"file": str(given), "strength": 1.0}],
    }
    assert load(stock, recipe="longlive").taken.line == (f"recipe longlive (asked for by name): the weights of {stock}")
