"""A day in minutes: positions of more frames than a day has, and blocks of the smallest model across every boundary."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from faults import nan_again_and_again
from random_model import flat_config
from soaking import LONG, PROMPTS, hashes, intervals, soak_of

import echo_rt.soak
from echo_rt.config import ModelConfig
from echo_rt.engine.state import RolloutState, ring_layout
from echo_rt.ops.backends import available_backends, load_ops
from echo_rt.ops.schema import POSITION_FIELDS
from echo_rt.runtime import Runtime
from echo_rt.soak import Limits, Outcome
from echo_rt.soak.checks import Status
from echo_rt.soak.journal import JOURNAL_FILE, Line, read_lines
from echo_rt.soak.probes import host_memory
from echo_rt.weights.tiny_model import CHECKPOINT_FILE

VERY_LONG = int(os.environ.get("ECHO_RT_LONG_BLOCKS", "100000"))
DAY = 1_400_000  # latent frames; a day of 16 video frames a second has a fourth of that
BACKENDS = [name for name, status in available_backends().items() if status == "available" and name != "cuda"]


def test_positions_of_a_day() -> None:
    """Every block of the released window, through the planner that the block loop asks."""
    config = ModelConfig.from_flat(flat_config())
    window, memory, layout = config.window, config.memory_frames, ring_layout(config)
    size, sink, local, newest = window.frames_per_block, window.sink_frames, window.local_frames, window.max_temporal_id
    ring_begin, slots = memory + sink, memory + sink + local
    holds: list[int | None] = [None] * slots  # slot -> absolute frame
    shift = 0
    for block in range(-(-DAY // size)):
        first, last = block * size, block * size + size - 1
        assert layout.first_frame(block) == first and layout.last_frame(block) == last
        where = [layout.slot(frame) for frame in range(first, last + 1)]
        assert where == list(range(where[0], where[0] + size))
        if layout.is_sink_block(block):
            assert where[0] == memory + first and not layout.evicts(block)
        else:
            old = holds[where[0]]
            assert layout.evicts(block) == (old is not None)
            assert old is None or layout.evicted_frame(block) == old
        holds[where[0] : where[0] + size] = range(first, last + 1)

        moved = layout.shift(block)
        assert moved >= shift and moved == max(0, last - newest)
        shift = moved
        assert layout.temporal_id(block, last) == min(last, newest)
        if last < sink:
            assert layout.attended_end(block) == memory + last + 1
            continue
        # The sink stays, the ring holds the newest frames: each once, with ids between the sink's and the largest.
        oldest = layout.oldest_local(block)
        filled = layout.local_filled(block)
        held = sorted(frame for frame in holds[ring_begin:] if frame is not None)
        assert held == list(range(oldest, last + 1)) and len(held) == filled <= local
        assert holds[memory:ring_begin] == list(range(sink))
        assert layout.attended_end(block) == ring_begin + filled
        first_memory = layout.temporal_id(block, layout.memory_frame(block))
        assert layout.memory_fits(block) == (first_memory >= sink)
        if filled:
            assert layout.temporal_id(block, oldest) >= sink
    assert last + 1 >= DAY and layout.memory_fits(block)


def sampled_blocks(size: int) -> Iterator[int]:
    """The first ones, a thousand over the day, the last ones."""
    blocks = DAY // size
    yield from range(12)
    yield from range(12, blocks - 12, blocks // 1000)
    yield from range(blocks - 12, blocks)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_device_is_where_the_planner_is(backend: str) -> None:
    config = ModelConfig.from_flat(flat_config())
    window, layout, ops = config.window, ring_layout(config), load_ops(backend)
    state = RolloutState(config, ops, device=torch.device("cpu"), dtype=torch.float32)
    frequencies = state.rope.inverse_frequencies
    for block in sampled_blocks(window.frames_per_block):
        state.positions[POSITION_FIELDS.index("block")] = block - 1
        ops.advance(
            state.positions,
            window.frames_per_block,
            window.sink_frames,
            window.local_frames,
            config.memory_frames,
            window.max_temporal_id,
            frequencies,
            state.rope.temporal_block,
            state.rope.temporal_anchor,
            state.write_index,
        )
        first = layout.first_frame(block)
        slot = layout.slot(first)
        expected = (block, first, layout.shift(block), layout.memory_frame(block), slot)
        assert tuple(state.positions.tolist()) == expected
        begin = slot * config.tokens_per_frame
        assert state.write_index.tolist() == list(range(begin, begin + config.tokens_per_block))
        # Angles of the block's own frames, whole turns and all, as float64 has them.
        frames = torch.arange(first, first + window.frames_per_block, dtype=torch.float64)
        angles = frames[:, None] * frequencies
        exact = torch.stack((angles.cos(), angles.sin()), dim=-1)
        torch.testing.assert_close(state.rope.temporal_block.double(), exact, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- blocks

# The host's growth in the suite's short run is what an allocator settles at, not a leak of a block.
LIMITS = Limits(
    latency_ratio=None, latency_zscore=None, snapshot_stall=None, drift=1.0, host_slope=2048.0, host_slack=8 * 2**20
)


def soak_in_lives(model: Path, out: Path, blocks: int, lives: int) -> Outcome:
    """A soak that is stopped after every ``blocks / lives`` blocks, without a snapshot, and taken up again."""
    config = soak_of(
        model,
        out,
        blocks=blocks,
        prompts=PROMPTS,
        switch_every=7,
        snapshot_every=40,
        hash_every=3,
        keep=2,
        interval=0.5,
        limits=LIMITS,
    )
    for life in range(1, lives):
        with pytest.raises(_Gone):
            echo_rt.soak.run(config, watchers=[_Reaper(blocks * life // lives)])
    return echo_rt.soak.run(config)


class _Gone(BaseException):
    """As good as a kill for what is on the disk: nothing is tidied up that a kill would leave."""


class _Reaper:
    def __init__(self, block: int) -> None:
        self._block = block

    def block_done(self, block: int, frames: int, seconds: float) -> None:
        if block >= self._block:
            raise _Gone

    def line_done(self, line: object, verdicts: object) -> None: ...


@pytest.mark.slow
@pytest.mark.parametrize(("blocks", "lives"), [(480, 2), pytest.param(5000, 8, marks=LONG)])
def test_every_promise_across_every_boundary(blocks: int, lives: int, smallest_model: Path, tmp_path: Path) -> None:
    outcome = soak_in_lives(smallest_model, tmp_path / "out", blocks, lives)
    status = {verdict.promise: verdict.status for verdict in outcome.verdicts}
    print("\n".join(f"{v.promise}: {v.status.value}: {v.evidence}" for v in outcome.verdicts))
    assert outcome.exit_code == 0 and outcome.end == "complete" and outcome.blocks == blocks
    asked = ("stream", "finite", "positions", "hashes", "host memory", "latent drift")
    assert {name: status[name] for name in asked} == dict.fromkeys(asked, Status.KEPT)
    lines = intervals(tmp_path / "out")
    assert {line["run"] for line in lines} == set(range(1, lives + 1))
    assert sum(line["switch_latency"]["blocks"] for line in lines) >= blocks // 7
    assert sorted(hashes(tmp_path / "out")) == list(range(0, blocks, 3))


class _Census(_Reaper):
    """What a process holds, after every ``every`` blocks: resident bytes, Python objects, open files, threads."""

    def __init__(self, block: int, every: int, held: list[tuple[int, ...]]) -> None:
        super().__init__(block)
        self._every, self._held = every, held

    def line_done(self, line: Line, verdicts: object) -> None:
        if self._held and line["block"] < self._held[-1][0] + self._every:
            return
        gc.collect()
        counts = len(gc.get_objects()), len(os.listdir("/proc/self/fd")), threading.active_count()
        self._held.append((line["block"], host_memory()["rss"], *counts))


@pytest.mark.slow
@pytest.mark.parametrize(("blocks", "lives", "growth"), [(400, 2, 12), pytest.param(VERY_LONG, 10, 4, marks=LONG)])
def test_nothing_grows(
    blocks: int, lives: int, growth: int, smallest_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompt switches, snapshots, processes that are gone, rollbacks: ``growth`` MiB at most after the first fifth."""
    nan_again_and_again(monkeypatch, blocks // (2 * lives))  # of so many blocks that are made, one is not finite
    video = dict(prompts=PROMPTS, switch_every=100, snapshot_every=max(30, blocks // 200), hash_every=10)
    limits = Limits(latency_ratio=None, latency_zscore=None, snapshot_stall=None)
    given = dict(blocks=blocks, vae="tiny", roll_back=True, interval=min(5.0, blocks / 1000), limits=limits)
    config = soak_of(smallest_model, tmp_path / "out", **video, **given)
    held: list[tuple[int, ...]] = []
    for life in range(1, lives):
        with pytest.raises(_Gone):
            echo_rt.soak.run(config, watchers=[_Census(blocks * life // lives, blocks // 20, held)])
    outcome = echo_rt.soak.run(config, watchers=[_Census(blocks, blocks // 20, held)])
    assert outcome.end == "complete" and outcome.exit_code == 3
    assert [v.promise for v in outcome.verdicts if v.status is Status.BROKEN] == ["finite"]
    first, *later = [each for each in held if each[0] >= blocks // 5]
    print(f"held at block {first[0]}: {first[1:]}, at block {later[-1][0]}: {later[-1][1:]}")
    most = [max(each[kind] for each in later) - first[kind] for kind in range(1, 5)]
    assert most[0] <= growth * 2**20, "resident bytes"
    assert most[1] < 3000 and most[2] <= 2 and most[3] <= 1, "objects, files, threads"
    lines = list(read_lines(config.folder))
    made = {block for line in lines if "blocks" in line for block in range(line["first_block"], line["block"] + 1)}
    assert made == set(range(blocks)) and max(line.get("rollbacks", 0) for line in lines) > 0
    assert len(list((config.folder / "snapshots").iterdir())) <= config.keep
    assert (config.folder / JOURNAL_FILE).stat().st_size < 300 * blocks + 2000 * len(lines)


@pytest.mark.parametrize("blocks", [150, pytest.param(5000, marks=LONG)])
def test_memory_after_many_blocks_is_that_after_fifty(blocks: int, smallest_model: Path) -> None:
    """No promise in between: the stream itself, and every Python object that it leaves behind."""
    with Runtime.from_pretrained(
        smallest_model, checkpoint=smallest_model / CHECKPOINT_FILE, device="cpu", overrides={"denoising_steps": [1000]}
    ) as runtime:
        embeds = torch.randn(5, runtime.config.transformer.text_dim, generator=torch.Generator().manual_seed(0))
        with runtime.stream(prompt_embeds=embeds) as stream:

            def held_at(block: int) -> tuple[int, int, int]:
                while stream.next_block < block:
                    next(stream)
                gc.collect()
                rss = host_memory()["rss"]
                assert rss is not None
                return rss, len(gc.get_objects()), len(os.listdir("/proc/self/fd"))

            before = held_at(50)
            for turn in range(1, 4):  # the allocator of a process that has run other tests may grow once
                after = held_at(50 + turn * (blocks - 50))
                grown, objects, files = (b - a for a, b in zip(before, after, strict=True))
                print(f"{grown:+} bytes and {objects:+} objects in {blocks - 50} blocks")
                assert objects < 100 and files == 0
                # Less than one block's frames for every hundred blocks: nothing a block makes can stay.
                if grown <= 4 * 2**20:
                    return
                before = after
    pytest.fail("each of three times it grew")
