"""Live prompting: how soon a prompt shows, blends, and blocks dropped to make way for it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from streaming import OTHER, PROMPT, embeds, load, poison, same, take, within
from torch import Tensor

import echo_rt
from echo_rt import ConfigError, Guard, StreamError

FEW = {"denoising_steps": (1000, 500), "rebuild_on_prompt_switch": True}


@pytest.fixture(scope="module")
def runtime(small_model: Path) -> Any:
    with load(small_model, overrides=FEW) as runtime:
        yield runtime


def watched(stream: echo_rt.Stream, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Tensor, bool]]:
    """The switches of ``stream`` from now on: block, embeddings, whether the memory is rebuilt."""
    rollout, switches = stream._engine.rollout, []  # type: ignore[union-attr]
    switch = rollout.switch_prompt

    def noted(prompt: Tensor, rebuild: bool) -> None:
        switches.append((stream.next_prompt_block - 1, prompt, rebuild))
        switch(prompt, rebuild)

    monkeypatch.setattr(rollout, "switch_prompt", noted)
    return switches


def test_what_a_stream_says_of_itself(runtime: echo_rt.Runtime) -> None:
    with runtime.stream(PROMPT, seed=5) as stream:
        assert (stream.prompt, stream.seed) == (PROMPT, 5)
        stream.set_prompt("later", block=3)
        assert stream.prompt == PROMPT
        stream.set_prompt(OTHER)
        assert stream.prompt == OTHER
        next(stream)
        assert stream.prompt == OTHER and repr(stream) == f"<Stream {OTHER!r}, seed 5, next block 1>"
        snapshot = stream.snapshot()
        stream.set_prompt(prompt_embeds=embeds(runtime))
        assert stream.prompt is None
    assert "closed" in repr(stream)
    with runtime.resume(snapshot) as again:
        assert again.prompt == OTHER
        take(again, 3)
        assert again.prompt == "later"


def until_full(feed: echo_rt.Feed, stream: echo_rt.Stream) -> None:
    """Wait until two blocks wait in ``feed``, and its thread has left the stream, which nobody is told."""
    with stream._ready.lock:
        while feed.waiting < 2 or stream._owner is not None:
            stream._ready.changed.wait(0.05)


def test_how_many_frames_pass_before_a_prompt_shows(small_model: Path) -> None:
    with load(small_model, lookahead=1, overrides=FEW) as runtime, runtime.stream(PROMPT) as stream:
        assert stream.frames_until_prompt == 0
        next(stream)
        assert stream.frames_until_prompt == 12, "one block is begun ahead"
        with echo_rt.Feed(stream, depth=2) as feed:
            until_full(feed, stream)
            assert stream.frames_until_prompt == 36
            index = stream.next_prompt_block
            stream.set_prompt(OTHER)
            first = next(feed)
            assert index - first.index == 3
    with load(small_model, overrides=FEW) as runtime, runtime.stream(PROMPT) as stream:
        take(stream, 2)
        assert stream.frames_until_prompt == 0


# ---------------------------------------------------------------- blends


def test_a_blend_is_a_switch_for_each_block(runtime: echo_rt.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = embeds(runtime, 0), embeds(runtime, 1)[:3]
    with runtime.stream(prompt_embeds=old) as stream:
        take(stream, 2)
        switches = watched(stream, monkeypatch)
        stream.set_prompt(prompt_embeds=new, over=4)
        take(stream, 6)
    padded = torch.nn.functional.pad(new, (0, 0, 0, 2))
    assert [(block, rebuilt) for block, _, rebuilt in switches] == [(2, True), (3, False), (4, False), (5, False)]
    for number, (_, prompt, _) in enumerate(switches[:3], 1):
        torch.testing.assert_close(prompt, old + (padded - old) * number / 4)
    assert torch.equal(switches[3][1], new), "the end is the prompt itself"


def test_the_memory_is_rebuilt_at_the_first_switch_alone(
    runtime: echo_rt.Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    with runtime.stream(prompt_embeds=embeds(runtime)) as stream:
        take(stream, 6)
        rollout, rebuilt = stream._engine.rollout, []  # type: ignore[union-attr]
        rebuild = rollout._rebuild_memory
        monkeypatch.setattr(rollout, "_rebuild_memory", lambda: (rebuilt.append(rollout.state.block), rebuild()))
        stream.set_prompt(prompt_embeds=embeds(runtime, 1), over=3)
        take(stream, 5)
        assert rebuilt == [5]


def test_a_prompt_that_begins_amid_a_blend_ends_it(runtime: echo_rt.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    last = embeds(runtime, 2)
    with runtime.stream(prompt_embeds=embeds(runtime)) as stream:
        switches = watched(stream, monkeypatch)
        stream.set_prompt(prompt_embeds=embeds(runtime, 1), block=1, over=5)
        stream.set_prompt(prompt_embeds=last, block=3)
        take(stream, 7)
    assert [(block, rebuilt) for block, _, rebuilt in switches] == [(1, True), (2, False), (3, True)]
    assert torch.equal(switches[-1][1], last)


def test_a_snapshot_amid_a_blend_goes_on_with_it(runtime: echo_rt.Runtime, tmp_path: Path) -> None:
    file = tmp_path / "amid.safetensors"
    with runtime.stream(PROMPT) as stream:
        take(stream, 5)
        stream.set_prompt(OTHER, over=4)
        take(stream, 2)
        stream.snapshot(file)
        expected = take(stream, 5)
    with runtime.resume(file) as again:
        assert again.prompt == OTHER
        assert same(take(again, 5), expected)
        # And from the prompt that is in force then, which the snapshot holds.
    with runtime.resume(str(file)) as again:
        again.set_prompt(PROMPT, over=2)
        assert not same(take(again, 5), expected)


def test_a_snapshot_of_an_older_version(runtime: echo_rt.Runtime) -> None:
    with runtime.stream(PROMPT) as stream:
        next(stream)
        snapshot = stream.snapshot()
        expected = take(stream, 2)
    with runtime.resume(dataclasses.replace(snapshot, prompt=None, prompt_facts={})) as again:
        assert again.prompt is None
        with pytest.raises(StreamError, match="older version, without its prompt to blend from"):
            again.set_prompt(OTHER, over=3)
        assert same(take(again, 2), expected)
        again.set_prompt(OTHER)
        next(again)
        again.set_prompt(PROMPT, over=3)
        take(again, 3)


@pytest.mark.parametrize("facts", [{"now": {"over": 0}}, {"now": {"text": 3}}, {"4": {"continued": 1}}, {"now": [1]}])
def test_a_snapshot_with_odd_facts_is_refused(runtime: echo_rt.Runtime, facts: dict[str, Any]) -> None:
    with runtime.stream(PROMPT) as stream:
        next(stream)
        stream.set_prompt(OTHER, block=4)
        snapshot = dataclasses.replace(stream.snapshot(), prompt_facts=facts)
    with pytest.raises(StreamError, match=f"the snapshot's prompt for block {next(iter(facts))}: "):
        runtime.resume(snapshot)


@pytest.mark.parametrize("over", [0, -1, 1.5, True, "3", 10**9])
def test_blends_of_no_number_of_blocks(runtime: echo_rt.Runtime, over: Any) -> None:
    with runtime.stream(PROMPT) as stream, pytest.raises(ConfigError, match=r"over must be a number of blocks in 1"):
        stream.set_prompt(OTHER, over=over)


def test_going_back_amid_a_blend(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blend goes on where it was; the good state, of before it, gets the prompt of its block and a new memory."""
    with load(small_model, lookahead=1, overrides=FEW) as runtime:
        old, new = embeds(runtime), embeds(runtime, 1)
        with runtime.stream(prompt_embeds=old, guard=Guard("roll_back", keep_every=100)) as stream:
            take(stream, 4)
            switches = watched(stream, monkeypatch)
            stream.set_prompt(prompt_embeds=new, block=5, over=4)
            poison(stream, monkeypatch, {6})
            take(stream, 7)
            assert stream.rollbacks == 1
    # 5, 6 and 7 had begun when 6 was found bad; then the prompt of 6 at once, and the rest once more.
    assert [rebuilt for _, _, rebuilt in switches] == [True, False, False, True, False, False]
    for (_, prompt, _), quarters in zip(switches, (1, 2, 3, 2, 3, 4), strict=True):
        torch.testing.assert_close(prompt, old + (new - old) * quarters / 4)


# ---------------------------------------------------------------- dropping what is made


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_prompt_with_flush_shows_at_the_next_block(small_model: Path, lookahead: int) -> None:
    with load(small_model, lookahead=lookahead, overrides=FEW) as runtime:
        with runtime.stream(PROMPT) as stream:
            next(stream)
            with echo_rt.Feed(stream, depth=2) as feed:
                until_full(feed, stream)
                at = stream.next_prompt_block
                assert at == 3 + lookahead
                stream.set_prompt(OTHER, flush=True)
                assert (stream.next_block, stream.skipped, stream.frames_until_prompt) == (at, at - 1, 0)
                shown = [within(60, lambda: next(feed)) for _ in range(3)]
            assert [chunk.index for chunk in shown] == [at, at + 1, at + 2]
            assert shown[0].first_frame == runtime.vae_config.video_frames(3 * at)
            snapshot = stream.snapshot()
            rest = take(stream, 2)
            with pytest.raises(ConfigError, match="expected no block beside it, got 9"):
                stream.set_prompt(OTHER, block=9, flush=True)
        # The state was not rolled back: what was dropped has been made, and the video goes on from it.
        with runtime.stream(PROMPT) as stream:
            stream.set_prompt(OTHER, block=at)
            assert same(take(stream, at + 5)[at:], shown + rest)
        with runtime.resume(snapshot) as again:
            assert same(take(again, 2), rest)


def test_going_back_amid_what_is_dropped(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad block among those that nobody wants any more is not made again; the numbers go on after them."""
    with load(small_model, lookahead=1, overrides=FEW) as runtime:
        new = embeds(runtime, 1)
        with runtime.stream(prompt_embeds=embeds(runtime), guard=Guard("roll_back")) as stream:
            poison(stream, monkeypatch, {4})
            take(stream, 4)  # 4 is begun
            switches = watched(stream, monkeypatch)
            stream.set_prompt(prompt_embeds=new, flush=True)
            assert stream.next_block == 5
            assert [chunk.index for chunk in take(stream, 3)] == [5, 6, 7]
            assert (stream.rollbacks, stream.skipped) == (1, 1)
            assert [block for block, _, _ in switches] == [5, 5] or [block for block, _, _ in switches] == [5]
            snapshot = stream.snapshot()
            expected = take(stream, 2)
        with runtime.resume(snapshot) as again:
            assert [chunk.index for chunk in expected] == [8, 9] and same(take(again, 2), expected)
