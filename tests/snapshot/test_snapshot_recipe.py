"""A snapshot goes on by the recipe that its video was made by, and one of before there were recipes as it was made."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from streaming import embeds, load, same, take, without_recipe

from echo_rt.errors import StreamError
from echo_rt.snapshot.snapshot import Snapshot
from echo_rt.weights.choice import TAKEN


def test_a_snapshot_says_what_was_taken(small_model: Path, tmp_path: Path) -> None:
    with load(small_model, recipe="longlive", memory="off") as runtime:
        with runtime.stream(prompt_embeds=embeds(runtime), seed=4) as stream:
            take(stream, 2)
            stream.snapshot(tmp_path / "s.safetensors")
            further = take(stream, 2)
        taken = runtime.taken
    snapshot = Snapshot.load(tmp_path / "s.safetensors")
    assert snapshot.model[TAKEN] == taken.for_snapshots() and taken.recipe == "longlive"
    with load(small_model, memory="off", like=snapshot) as runtime, runtime.resume(snapshot) as stream:
        assert same(take(stream, 2), further)
        assert stream.snapshot().model == snapshot.model
    with load(small_model, memory="off") as runtime, pytest.raises(StreamError, match="max_temporal_id is 1023 in the"):
        runtime.resume(snapshot)  # the folder names another recipe


def test_a_snapshot_of_before_recipes(small_model: Path, tmp_path: Path) -> None:
    """The folder has been written anew since, with a recipe that takes other weights."""
    with load(without_recipe(small_model, tmp_path / "old")) as runtime:
        assert runtime.taken.recipe is None and runtime.taken.ema is True
        with runtime.stream(prompt_embeds=embeds(runtime), seed=4) as stream:
            take(stream, 5)
            snapshot = stream.snapshot()
            further = take(stream, 2)
    facts = {name: value for name, value in snapshot.model.items() if name not in (TAKEN, "first_block_steps")}
    old = dataclasses.replace(snapshot, model=facts)
    with load(small_model, like=old) as runtime, runtime.resume(old) as stream:
        assert same(take(stream, 2), further)
    with load(small_model) as runtime, pytest.raises(StreamError, match="weights of the transformer"):
        runtime.resume(old)
