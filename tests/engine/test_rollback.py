"""Going back from a bad block: prompts, numbers, evidence and good blocks all keep their places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from recorder import Recorder
from streaming import embeds, load, poison, take
from torch import Tensor

import echo_rt
from echo_rt import Guard, NumericalError

FEW_STEPS = {"denoising_steps": (1000, 500)}
LONG = 20.0


def test_a_prompt_begins_with_its_block_whatever_is_gone_back_from(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block 7 was begun, with its prompt, when block 6 was found to be bad."""
    with load(small_model, lookahead=1, overrides=FEW_STEPS) as runtime:
        stream = runtime.stream(prompt_embeds=embeds(runtime), guard=Guard("roll_back", keep_every=100))
        engine, rollout = stream._engine, stream._engine.rollout  # type: ignore[union-attr]
        next(stream)
        later = embeds(runtime, 5)
        stream.set_prompt(prompt_embeds=later, block=7)
        begun: dict[int, list[bool]] = {}  # by blocks of the video: whether the later prompt was in force
        told = [False]
        switch, next_block, put_back = rollout.switch_prompt, rollout.next_block, type(engine).load_state

        def switched(prompt: Tensor, rebuild: bool) -> None:
            told[0] = torch.equal(prompt, later)
            switch(prompt, rebuild)

        def noted(noise: Tensor | None) -> Tensor:
            begun.setdefault(stream.next_prompt_block - 1, []).append(told[0])
            return next_block(noise)

        def back(self: Any, snapshot: echo_rt.Snapshot, seed: int) -> None:
            told[0] = False
            put_back(self, snapshot, seed)

        monkeypatch.setattr(type(engine), "load_state", back)
        monkeypatch.setattr(rollout, "switch_prompt", switched)
        monkeypatch.setattr(rollout, "next_block", noted)
        poison(stream, monkeypatch, {6})
        take(stream, 8)
        assert stream.rollbacks == 1
        assert begun[6] == [False, False] and begun[7] == [True, True]


@pytest.mark.parametrize("policy", ["stop", "roll_back"])
def test_prompts_that_have_begun_are_kept_only_for_going_back(small_model: Path, policy: str) -> None:
    """A long stream with many prompts must not keep them all."""
    with load(small_model, lookahead=1, overrides=FEW_STEPS) as runtime:
        stream = runtime.stream(prompt_embeds=embeds(runtime), guard=Guard(policy, keep_every=2))
        for block in range(9):
            stream.set_prompt(prompt_embeds=embeds(runtime, block))
            next(stream)
        assert len(stream._blocks._prompts_since) <= (0 if policy == "stop" else 3)


@pytest.mark.parametrize("memory", ["evolve", "prior", "off"])
def test_it_goes_back_in_every_memory_mode(small_model: Path, monkeypatch: pytest.MonkeyPatch, memory: str) -> None:
    with load(small_model, overrides=FEW_STEPS, memory=memory) as runtime:
        stream = runtime.stream(prompt_embeds=embeds(runtime), guard=Guard("roll_back", keep_every=2))
        poison(stream, monkeypatch, {5})
        assert [chunk.index for chunk in take(stream, 8)] == list(range(8))
        assert stream.rollbacks == 1


def test_a_good_state_is_good(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The context pass alone went wrong: the block is whole, the keys it leaves behind are not."""
    with load(small_model, overrides=FEW_STEPS) as runtime:
        stream = runtime.stream(prompt_embeds=embeds(runtime), guard=Guard("roll_back", keep_every=3))
        rollout, spoiled = stream._engine.rollout, []  # type: ignore[union-attr]
        keep = rollout._keep

        def careless(*static_args: Any) -> None:
            keep(*static_args)
            if rollout.state.block + 1 == 3 and not spoiled:
                spoiled.append(1)
                rollout.state.kv[0, 1, rollout.config.memory_tokens] = float("nan")  # a value of the sink

        monkeypatch.setattr(rollout, "_keep", careless)
        chunks = take(stream, 8)  # the state after block 3 holds it, the one after block 0 does not
        assert stream.rollbacks == 1
        assert [chunk.index for chunk in chunks] == list(range(8))


def test_blocks_before_a_bad_one_are_handed_out(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks 1, 2 and 3 are in flight when a good state is due; only 3 is bad."""
    with load(small_model, lookahead=3, overrides=FEW_STEPS) as runtime:
        stream = runtime.stream(prompt_embeds=embeds(runtime), guard=Guard("roll_back"))
        poison(stream, monkeypatch, {3})
        assert [chunk.index for chunk in take(stream, 3)] == [0, 1, 2]
        with pytest.raises(NumericalError, match="block 3"):
            next(stream)


def test_a_snapshot_that_fails_loses_no_block_before_the_bad_one(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(small_model, lookahead=3, overrides=FEW_STEPS) as runtime:
        stream = runtime.stream(prompt_embeds=embeds(runtime))
        poison(stream, monkeypatch, {3})
        next(stream)
        with pytest.raises(NumericalError, match="block 3"):
            stream.snapshot()
        assert [chunk.index for chunk in take(stream, 2)] == [1, 2]


def test_every_bad_block_has_its_evidence(small_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Three times the same block of the video: the first, before any other noise, tells most."""
    with load(small_model, overrides=FEW_STEPS) as runtime:
        guard = Guard("roll_back", attempts=2, evidence=tmp_path)
        stream = runtime.stream(prompt_embeds=embeds(runtime), guard=guard)
        next(stream)
        poison(stream, monkeypatch, set(range(1, 100)), times=100)
        with pytest.raises(NumericalError):
            take(stream, 3)
    assert len(list(tmp_path.glob("*.json"))) == len(list(tmp_path.glob("*[0-9].safetensors"))) == 3


def test_attempts_are_counted_in_a_row(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(small_model, overrides=FEW_STEPS) as runtime:
        stream = runtime.stream(prompt_embeds=embeds(runtime), guard=Guard("roll_back", attempts=1))
        poison(stream, monkeypatch, {3}, times=2)  # with two good blocks between
        take(stream, 8)
        assert stream.rollbacks == 2


def test_blocks_are_numbered_as_the_video_is_behind_a_rollback(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(small_model, overrides=FEW_STEPS) as runtime:
        stream = runtime.stream(prompt_embeds=embeds(runtime), guard=Guard("roll_back"))
        poison(stream, monkeypatch, {4})
        take(stream, 6)
        switched: list[int] = []

        def note(stream: echo_rt.Stream) -> None:
            rollout = stream._engine.rollout  # type: ignore[union-attr]
            monkeypatch.setattr(rollout, "switch_prompt", lambda prompt, rebuild: switched.append(stream.next_block))

        note(stream)
        assert (stream.rollbacks, stream.next_prompt_block) == (1, 6)
        stream.set_prompt(prompt_embeds=embeds(runtime, 1), block=7)
        stream.set_prompt(prompt_embeds=embeds(runtime, 2), block=9)
        take(stream, 2)
        snapshot = stream.snapshot()
        stream.close()
        with runtime.resume(snapshot) as again:
            note(again)
            assert again.next_prompt_block == again.next_block == 8
            take(again, 2)
        assert switched == [7, 9]


def test_going_back_races_with_nothing(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("echo_rt.engine.engine.make_executor", lambda device, graphs: recorder)
        runtime = load(small_model, lookahead=1, overrides=FEW_STEPS)
    with runtime:
        recorder.watch(runtime._engine.pipeline.buffers())  # type: ignore[union-attr]
        with recorder:
            with runtime.stream(prompt_embeds=embeds(runtime)) as stream:
                take(stream, 3)
                snapshot = stream.snapshot()
                take(stream, 2)
            with runtime.resume(snapshot) as stream:
                take(stream, 4)
    assert recorder.races() == []
