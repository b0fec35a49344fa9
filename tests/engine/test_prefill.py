"""Blocks that are given in place of generated ones: the same rollout from there, by stages that graphs replay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from closeness import relative_error
from naive_rollout import NaiveRollout
from random_model import build_rollout, drawn_noise, flat_config, random_weights
from recorder import Recorder, executed_by
from streaming import embeds, load, same, take

import echo_rt
from echo_rt.engine.engine import Engine
from echo_rt.errors import ConfigError

BOUND = 1e-5  # float32 rounding; a wrong slot, id or gate is off by 1e-2 and more
FEW_STEPS = {"denoising_steps": (1000, 500)}


@pytest.mark.parametrize("given", [1, 2, 4, 5, 9])
@pytest.mark.parametrize("mode", ["evolve", "prior", "off"])
def test_it_is_the_rollout_of_the_formulas(mode: str, given: int) -> None:
    """Nine blocks are past the first eviction, the first memory that fits, and the saturation of the ids."""
    flat = flat_config(denoising_steps=[1000, 500])
    weights = random_weights(flat)
    ours, naive = build_rollout(flat, weights, mode), NaiveRollout(flat, weights, mode)
    prompts = torch.randn(2, flat["text_len"], flat["text_dim"], generator=torch.Generator().manual_seed(3))
    ours.start(prompts[0], seed=5)
    naive.set_prompt(prompts[0])
    latents = torch.randn(given, *ours.noise_shape[1:], generator=torch.Generator().manual_seed(4))
    for block in latents:
        ours.given_block(block)
        naive.given_block(block)
    assert ours.state.initial_blocks == given

    def noise(block: int, step: int) -> torch.Tensor:
        return drawn_noise(ours.noise_shape, 5, block)[step]

    for block in range(given, given + 8):
        if block == given + 3:
            ours.switch_prompt(prompts[1])
            naive.set_prompt(prompts[1])
        assert relative_error(ours.next_block(), naive.next_block(noise)) < BOUND
        if mode == "evolve" and naive.memory is not None:
            assert relative_error(ours.memory, naive.memory) < BOUND  # type: ignore[arg-type]
    assert ours.state.initial_blocks == given
    with pytest.raises(ConfigError, match="only before the first that is generated"):
        ours.given_block(latents[0])


def test_a_memory_may_be_updated_by_given_blocks_alone() -> None:
    flat = flat_config()
    weights = random_weights(flat)
    ours, naive = build_rollout(flat, weights, "evolve"), NaiveRollout(flat, weights, "evolve")
    prompt = torch.randn(flat["text_len"], flat["text_dim"], generator=torch.Generator().manual_seed(3))
    ours.start(prompt)
    naive.set_prompt(prompt)
    for latents in torch.randn(12, *ours.noise_shape[1:], generator=torch.Generator().manual_seed(4)):
        ours.given_block(latents)
        naive.given_block(latents)
    assert naive.memory is not None and relative_error(ours.memory, naive.memory) < BOUND  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "came"),
    [
        (lambda x: x[:4], r"got float32 \[4, 4, 4, 6\]"),
        (lambda x: x[:0], r"got float32 \[0, 4, 4, 6\]"),
        (lambda x: x[..., :4], r"got float32 \[6, 4, 4, 4\]"),
        (lambda x: x.half(), r"got float16 \[6, 4, 4, 6\]"),
        (lambda x: x[0], r"got float32 \[4, 4, 6\]"),
    ],
)
def test_what_is_no_whole_block(change: Callable[[torch.Tensor], torch.Tensor], came: str) -> None:
    rollout = build_rollout(flat_config(), random_weights(flat_config()), "off")
    latents = torch.zeros(6, *rollout.config.latent_shape)
    with pytest.raises(ConfigError, match=rf"initial latents float32 \[k\*3, 4, 4, 6\], {came}"):
        rollout.split_blocks(change(latents))


# ---------------------------------------------------------------- through the engine

GIVEN, BLOCKS = 14, 24


def film(runtime: echo_rt.Runtime) -> list[echo_rt.Chunk]:
    """A video of given blocks, past the second time that each of their stages comes, and generated ones."""
    engine: Engine = runtime._engine  # type: ignore[assignment]
    with runtime.stream(prompt_embeds=embeds(runtime), seed=3) as stream:
        shape = engine.rollout.state.x.shape
        engine.prefill(torch.randn(GIVEN * shape[0], *shape[1:], generator=torch.Generator().manual_seed(2)))
        assert engine.initial_blocks == GIVEN
        chunks = take(stream, BLOCKS)
        assert engine.initial_blocks == GIVEN
        return chunks


@pytest.fixture(scope="module", params=["evolve", "prior", "off"])
def plain(request: pytest.FixtureRequest, small_model: Path) -> tuple[str, list[echo_rt.Chunk]]:
    with load(small_model, memory=request.param, overrides=FEW_STEPS, check=True) as runtime:
        return request.param, film(runtime)


@pytest.mark.parametrize("lookahead", [0, 2])
def test_given_blocks_are_replayed(plain: tuple[str, list[echo_rt.Chunk]], small_model: Path, lookahead: int) -> None:
    mode, expected = plain
    recorder = Recorder()
    with executed_by(recorder), load(small_model, memory=mode, overrides=FEW_STEPS, lookahead=lookahead) as runtime:
        recorder.watch(runtime._engine.pipeline.buffers())  # type: ignore[union-attr]
        with recorder:
            assert same(film(runtime), expected)
        assert recorder.replays > recorder.runs / 2
    assert recorder.races() == []


def test_given_blocks_are_handed_out_as_they_are(plain: tuple[str, list[echo_rt.Chunk]], small_model: Path) -> None:
    mode, chunks = plain
    given = torch.randn(GIVEN * 3, *chunks[0].latents.shape[1:], generator=torch.Generator().manual_seed(2))
    assert torch.equal(torch.cat([chunk.latents for chunk in chunks[:GIVEN]]), given)
    assert [chunk.index for chunk in chunks] == list(range(BLOCKS))
    assert [chunk.first_frame for chunk in chunks] == [0, *range(9, 12 * BLOCKS - 9, 12)]
    attended = [chunk.stats.memory_attended for chunk in chunks]
    assert attended[-1] == (mode != "off") and not attended[0]


def test_a_memory_that_is_read_too_early_is_found(small_model: Path) -> None:
    """The figures of a given block's pass tell of the memory that is made beside it."""
    recorder = Recorder()
    recorder.ignored = {("Rollout._keep", "Rollout._update_memory")}
    with executed_by(recorder), load(small_model, overrides=FEW_STEPS, lookahead=1) as runtime:
        recorder.watch(runtime._engine.pipeline.buffers())  # type: ignore[union-attr]
        with recorder:
            film(runtime)
    assert any("state.memory" in race for race in recorder.races())


def test_only_copies_to_and_from_the_host_are_outside_of_stages(small_model: Path) -> None:
    recorder = Recorder()
    with executed_by(recorder), load(small_model, overrides=FEW_STEPS) as runtime:
        engine: Engine = runtime._engine  # type: ignore[assignment]
        with runtime.stream(prompt_embeds=embeds(runtime)) as stream:
            engine.prefill(torch.zeros(GIVEN * 3, *engine.rollout.config.latent_shape))
            with recorder:
                take(stream, GIVEN - 1)
                before = recorder.outside.copy()
                next(stream)
    assert set(recorder.outside - before) <= {"slice", "select", "copy_", "clone", "_local_scalar_dense", "detach"}
