"""Stages replayed instead of run, and queues beside one another: the same video, and nothing races.

A GPU replays graphs; here :mod:`recorder` replays lists of operations, with the addresses and the host's values of
the second time a stage ran, and keeps who touched which buffer when.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from recorder import Recorder, executed_by
from streaming import embeds, load, same, take, video
from torch import Tensor

import echo_rt
from echo_rt.engine.executor import stage_name
from echo_rt.engine.rollout import Rollout
from echo_rt.model.memory import MemoryEncoder

MODES = ["evolve", "prior", "off"]
FEW_STEPS = {"denoising_steps": (1000, 500)}
# Past the filling of the window, the saturation of the ids, and the second time of every stage.
WARM, BLOCKS = 11, 15
# What may happen between stages once all are replayed: frames, latents and vitals on their way to the host, and from
# there to whoever asked.
BETWEEN_STAGES = {"slice", "copy_", "clone", "_local_scalar_dense", "detach", "alias"}


@pytest.fixture(scope="module", params=MODES)
def plain(request: pytest.FixtureRequest, small_model: Path) -> tuple[str, list[echo_rt.Chunk]]:
    """A memory mode, and the video that is made without replays."""
    with load(small_model, memory=request.param, overrides=FEW_STEPS) as runtime:
        return request.param, video(runtime, BLOCKS, seed=3)


@dataclass
class Recording:
    recorder: Recorder
    chunks: list[echo_rt.Chunk]
    replayed: list[bool]  # of each block: whether nothing of it was run
    between: Counter[str]  # operations outside of all stages, in the blocks that were replayed whole


def record(folder: Path, ignored: set[tuple[str, str]] | None = None, **options: Any) -> Recording:
    recorder = Recorder()
    recorder.ignored = ignored or set()
    made = Recording(recorder, [], [], Counter())
    with executed_by(recorder), load(folder, overrides=FEW_STEPS, **options) as runtime:
        recorder.watch(runtime._engine.pipeline.buffers())  # type: ignore[union-attr]
        with runtime.stream(prompt_embeds=embeds(runtime), seed=3) as stream, recorder:
            for _ in range(BLOCKS):
                runs, replays, outside = recorder.runs, recorder.replays, recorder.outside.copy()
                made.chunks.append(next(stream))
                made.replayed.append(recorder.runs - runs == recorder.replays - replays)
                if made.replayed[-1]:
                    made.between += recorder.outside - outside
    return made


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_a_replayed_video_is_the_video(
    plain: tuple[str, list[echo_rt.Chunk]], small_model: Path, lookahead: int
) -> None:
    mode, expected = plain
    made = record(small_model, memory=mode, lookahead=lookahead)
    assert same(made.chunks, expected)
    assert all(made.replayed[WARM:]), "a stage of the steady state was run, not replayed"
    assert not any(made.replayed[:3])
    assert made.recorder.races() == []
    assert set(made.between) <= BETWEEN_STAGES, "work between stages that no graph holds"


# A stage, one that it has to wait for in another queue, and the buffer that the two would race for.
ORDERS = [
    ("Rollout._update_memory", "Rollout._begin", "state.evicted_k"),
    ("Rollout._publish_memory", "Rollout._update_memory", "state.memory_k"),
    ("Pipeline._decode", "Pipeline._hand_over", "pipeline._latents"),
]


@pytest.mark.parametrize(("stage", "awaited", "buffer"), ORDERS)
def test_a_missing_wait_is_found(small_model: Path, stage: str, awaited: str, buffer: str) -> None:
    races = record(small_model, {(stage, awaited)}, memory="evolve", lookahead=1).recorder.races()
    assert any(buffer in race and stage in race for race in races), races


def test_latents_handed_over_too_early_are_found(small_model: Path) -> None:
    """The decoder's input may change only once the block before has left it."""
    races = record(small_model, {("Pipeline._hand_over", "")}, lookahead=1).recorder.races()
    assert any("pipeline._latents" in race for race in races), races


def test_a_memory_that_reads_the_cache_itself_is_found(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why what is evicted is set aside first: the first pass overwrites it while the memory looks at it."""
    update = MemoryEncoder.update

    def careless(self: MemoryEncoder, state: Tensor, k: Tensor, v: Tensor, out: Tensor, gate_mean: Tensor) -> None:
        ring = caches[0].ring_k[: len(k)]
        update(self, state, ring, v, out, gate_mean)

    caches: list[Any] = []
    monkeypatch.setattr(MemoryEncoder, "update", careless)
    recorder = Recorder()
    with executed_by(recorder), load(small_model, memory="evolve", overrides=FEW_STEPS) as runtime:
        caches.append(runtime._engine.rollout.state)  # type: ignore[union-attr]
        recorder.watch(runtime._engine.pipeline.buffers())  # type: ignore[union-attr]
        with runtime.stream(prompt_embeds=embeds(runtime)) as stream, recorder:
            take(stream, BLOCKS)
    assert any("state.ring_k" in race for race in recorder.races())


def test_a_value_of_the_host_in_a_stage_is_found(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that asks the host for the block's number does the same block for ever once it is replayed."""
    keep = Rollout._keep

    def careless(self: Rollout, span: Any, memory_ready: bool) -> None:
        self.state.x.add_(self.state.block / 1000)
        keep(self, span, memory_ready)

    monkeypatch.setattr(Rollout, "_keep", careless)
    with load(small_model, overrides=FEW_STEPS) as runtime:
        expected = video(runtime, BLOCKS, seed=3)
    assert not same(record(small_model).chunks, expected)


def test_prompt_switches_between_replays(small_model: Path) -> None:
    def film(runtime: echo_rt.Runtime) -> list[echo_rt.Chunk]:
        with runtime.stream(prompt_embeds=embeds(runtime), seed=5) as stream:
            for block in (2, 8, 15):
                stream.set_prompt(prompt_embeds=embeds(runtime, block), block=block)
            return take(stream, BLOCKS + 2)

    with load(small_model, overrides=FEW_STEPS) as runtime:
        expected = film(runtime)
    for lookahead in (0, 1):
        recorder = Recorder()
        with executed_by(recorder), load(small_model, lookahead=lookahead, overrides=FEW_STEPS) as runtime, recorder:
            recorder.watch(runtime._engine.pipeline.buffers())  # type: ignore[union-attr]
            assert same(film(runtime), expected)
            assert same(film(runtime), expected), "a second video, replayed from its start"
        assert recorder.races() == []


SHORT = {"denoising_steps": (1000,), "local_frames": 6}
RECIPES = {
    "rotated-reads": {"overrides": SHORT | {"memory_reads": "rotated", "max_temporal_id": 14}},
    "no-sink": {"memory": "off", "overrides": SHORT | {"sink_frames": 0}},
    "first-block-steps": {"memory": "off", "overrides": SHORT | {"first_block_steps": (1000, 500)}},
    "renewed-sink": {"memory": "off", "overrides": SHORT | {"recache_sink": True, "max_temporal_id": 8}},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_replays_with_the_facts_of_recipes(small_model: Path, recipe: str) -> None:
    def film(runtime: echo_rt.Runtime, **noise: Any) -> list[echo_rt.Chunk]:
        with runtime.stream(prompt_embeds=embeds(runtime), seed=5, **noise) as stream:
            stream.set_prompt(prompt_embeds=embeds(runtime, 1), block=2)
            return take(stream, 7)

    def constant(block: int, shape: tuple[int, ...]) -> Tensor:
        return torch.full(shape, block / 100)

    options = RECIPES[recipe]
    with load(small_model, **options) as runtime:
        expected, of_constant = film(runtime), film(runtime, noise=constant)
    recorder = Recorder()
    with executed_by(recorder), load(small_model, lookahead=1, **options) as runtime, recorder:
        recorder.watch(runtime._engine.pipeline.buffers())  # type: ignore[union-attr]
        for _ in range(3):  # what comes once in a video is replayed from the third one on
            assert same(film(runtime), expected)
        assert same(film(runtime, noise=constant), of_constant)
    assert recorder.replays > recorder.runs / 2
    assert recorder.races() == []


def test_a_resumed_video_does_not_race(small_model: Path) -> None:
    recorder = Recorder()
    with executed_by(recorder), load(small_model, overrides=FEW_STEPS) as runtime, recorder:
        recorder.watch(runtime._engine.pipeline.buffers())  # type: ignore[union-attr]
        with runtime.stream(prompt_embeds=embeds(runtime)) as stream:
            take(stream, 2)
            snapshot = stream.snapshot()
        with runtime.resume(snapshot) as stream:
            take(stream, 2)
    assert recorder.races() == []


def test_stages_are_named_after_their_functions() -> None:
    assert stage_name(Rollout._begin) == "Rollout._begin"
