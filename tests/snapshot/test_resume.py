"""Snapshots: what a stream needs to go on, all of it and bit for bit, on a runtime that has seen nothing of it."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import pytest
import torch
from streaming import DEVICES, embeds, load, require, same, take, video

import echo_rt
from echo_rt.errors import StreamError


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("memory", ["evolve", "prior"])
def test_resume_without_a_prompt_switch(small_model: Path, memory: str, device: str) -> None:
    """A switch makes text keys, window and memory anew; here all of them have to come out of the snapshot."""
    options = {"memory": memory, "device": require(device)}
    points, further = (2, 5, 9), 4
    with load(small_model, **options) as used:
        snapshots, made = {}, []
        with used.stream(prompt_embeds=embeds(used), seed=11) as stream:
            for block in range(max(points) + further):
                if block in points:
                    snapshots[block] = stream.snapshot()
                made.append(next(stream))
        video(used, 7, seed=99, prompt=99)  # the buffers hold another video, its memory included
        for at, snapshot in snapshots.items():
            expected = made[at : at + further]
            with load(small_model, **options) as fresh:
                for runtime in (used, fresh):
                    with runtime.resume(snapshot) as stream:
                        assert stream.next_block == at
                        assert stream.video_frames == sum(chunk.frames.shape[0] for chunk in made[:at])
                        again = take(stream, further)
                    assert same(again, expected), (at, "used" if runtime is used else "fresh")
                    assert facts(again) == facts(expected)


# Facts of published recipes, as options, and by which name a runtime without them refuses the snapshot.
RECIPES = {
    "memory_reads": {"overrides": {"memory_reads": "rotated"}},
    "sink_frames": {"memory": "off", "overrides": {"sink_frames": 0, "local_frames": 6}},
    "first_block_steps": {"overrides": {"denoising_steps": [500], "first_block_steps": [1000, 500]}},
    "recache_sink": {"memory": "off", "overrides": {"recache_sink": True, "max_temporal_id": 11}},
}


@pytest.mark.parametrize("fact", RECIPES)
def test_a_snapshot_goes_on_with_the_facts_of_its_recipe(small_model: Path, tmp_path: Path, fact: str) -> None:
    options, points = RECIPES[fact], (0, 2, 4, 9)
    with load(small_model, **options) as runtime, runtime.stream(prompt_embeds=embeds(runtime), seed=6) as stream:
        stream.set_prompt(prompt_embeds=embeds(runtime, 1), block=3)
        made = []
        for block in range(max(points) + 2):
            if block in points:
                stream.snapshot(tmp_path / f"{block}.safetensors")
            made.append(next(stream))
    with load(small_model, **options) as fresh:
        for block in points:
            with fresh.resume(echo_rt.Snapshot.load(tmp_path / f"{block}.safetensors")) as stream:
                assert same(take(stream, 2), made[block : block + 2]), f"from block {block}"
    with (
        load(small_model, memory=options.get("memory")) as other,
        pytest.raises(StreamError, match=rf"of another model: .*\b{fact}\b"),
    ):
        other.resume(echo_rt.Snapshot.load(tmp_path / "4.safetensors"))


def test_a_snapshot_without_the_later_facts_goes_on_as_before(small_model: Path, tmp_path: Path) -> None:
    """One that an earlier version wrote."""
    with load(small_model) as runtime, runtime.stream(prompt_embeds=embeds(runtime), seed=1) as stream:
        take(stream, 2)
        snapshot, expected = stream.snapshot(), take(stream, 2)
        model = {name: value for name, value in snapshot.model.items() if name not in RECIPES}
        model["memory"] = {name: value for name, value in snapshot.model["memory"].items() if name != "reads"}
        model["sink_frames"] = snapshot.model["sink_frames"]
        assert len(model) == len(snapshot.model) - 2
        path = tmp_path / "old.safetensors"
        dataclasses.replace(snapshot, model=model).save(path)
        written = path.read_bytes()
        assert not any(name in written for name in (b"caller_noise", b"initial_blocks", b"recache_sink"))
        stream.close()
        with runtime.resume(echo_rt.Snapshot.load(path)) as again:
            assert same(take(again, 2), expected)


def test_initial_blocks_are_part_of_the_snapshot(small_model: Path, tmp_path: Path) -> None:
    """They are no generated ones: the first of those comes behind them, with steps of its own."""
    steps = {"denoising_steps": [500], "first_block_steps": [1000, 500]}
    with load(small_model, overrides=steps) as runtime:
        rollout = runtime._engine.rollout  # type: ignore[union-attr]
        with runtime.stream(prompt_embeds=embeds(runtime)) as stream:
            assert rollout.noise_shape[0] == 2
            take(stream, 2)
            assert rollout.noise_shape[0] == 1
            rollout.state.initial_blocks = 2
            snapshot = stream.snapshot(tmp_path / "s.safetensors")
            expected = take(stream, 2)
        assert echo_rt.Snapshot.load(tmp_path / "s.safetensors").initial_blocks == snapshot.initial_blocks == 2
        asked: list[tuple[int, int]] = []

        def noise(block: int, shape: tuple[int, ...]) -> torch.Tensor:
            asked.append((block, shape[0]))
            return torch.zeros(shape)

        with runtime.resume(snapshot) as stream:
            assert rollout.generated_blocks == 0
            assert same(take(stream, 2), expected)
        with runtime.resume(dataclasses.replace(snapshot, caller_noise=True), noise=noise) as stream:
            take(stream, 2)
        assert asked == [(0, 2), (1, 1)]
        with runtime.stream(prompt_embeds=embeds(runtime)):
            assert rollout.state.initial_blocks == 0
        for wrong in (-1, 3):
            with pytest.raises(StreamError, match="contradicts itself"):
                runtime.resume(dataclasses.replace(snapshot, initial_blocks=wrong))


def facts(chunks: list[echo_rt.Chunk]) -> list[tuple[int, int, int, int, bool]]:
    return [
        (c.index, c.first_frame, c.stats.newest_temporal_id, c.stats.shift, c.stats.memory_attended) for c in chunks
    ]


@pytest.mark.parametrize("device", DEVICES)
def test_a_pending_prompt_is_part_of_the_snapshot(small_model: Path, device: str) -> None:
    with load(small_model, device=require(device), lookahead=0) as runtime:
        with runtime.stream(prompt_embeds=embeds(runtime), seed=2) as stream:
            before = take(stream, 6)
            stream.set_prompt(prompt_embeds=embeds(runtime, 1))
            snapshot = pickle.loads(pickle.dumps(stream.snapshot()))
            after = take(stream, 4)
        assert not same(after[:1], video(runtime, 7, seed=2)[6:]), "the switch changes nothing"
        for _ in range(2):  # a snapshot can be resumed more than once
            with runtime.resume(snapshot) as stream:
                assert same(take(stream, 4), after)
        # Without the switch it is the old video that goes on.
        with runtime.resume(dataclasses.replace(snapshot, prompts={})) as stream:
            unswitched = take(stream, 1)
        assert same(before + unswitched, video(runtime, 7, seed=2))


def test_a_snapshot_holds_copies(small_model: Path) -> None:
    with load(small_model) as runtime, runtime.stream(prompt_embeds=embeds(runtime)) as stream:
        take(stream, 2)
        snapshot = stream.snapshot()
        before = {name: tensor.clone() for name, tensor in snapshot.tensors.items()}
        take(stream, 4)
        assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot.tensors.items())


def test_dtype_is_part_of_what_a_snapshot_fits(small_model: Path) -> None:
    with load(small_model) as runtime, runtime.stream(prompt_embeds=embeds(runtime)) as stream:
        snapshot = stream.snapshot()
    with (
        load(small_model, dtype="bfloat16") as other,
        pytest.raises(StreamError, match="dtype is 'float32' in the snapshot and 'bfloat16' here"),
    ):
        other.resume(snapshot)


@pytest.mark.parametrize("device", DEVICES)
def test_a_stream_is_its_rollout(small_model: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block for block the latents of a bare rollout that switches prompts just once for each ``set_prompt``."""
    switches = {0: 1, 5: 2, 8: 3}
    with load(small_model, device=require(device), lookahead=0) as runtime:
        assert runtime._engine is not None
        rollout = runtime._engine.rollout
        rollout.start(embeds(runtime), seed=4)
        expected = []
        for block in range(11):
            if block in switches:
                rollout.switch_prompt(embeds(runtime, switches[block]))
            made = rollout.next_block()
            with rollout._executor.eager():  # on a GPU it is in the executor's queue that it is made
                expected.append(made.to("cpu", copy=True))
        calls: list[int] = []
        switch = rollout.switch_prompt

        def counted(prompt_embeds: torch.Tensor, rebuild: bool) -> None:
            calls.append(rollout.state.block + 1)
            switch(prompt_embeds, rebuild)

        monkeypatch.setattr(rollout, "switch_prompt", counted)
        with runtime.stream(prompt_embeds=embeds(runtime), seed=4) as stream:
            for block, latents in enumerate(expected):
                if block in switches:
                    stream.set_prompt(prompt_embeds=embeds(runtime, switches[block]))
                assert torch.equal(next(stream).latents, latents), f"block {block}"
        assert calls == list(switches)
