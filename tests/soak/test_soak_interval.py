"""What is gathered of blocks, and what is found wrong with them."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from random_model import flat_config

from echo_rt.chunk import Chunk, ChunkStats, Vitals
from echo_rt.config import ModelConfig
from echo_rt.soak.interval import Figures, digest

CONFIG = ModelConfig.from_flat(flat_config())
VITALS: dict[str, Any] = dict(
    latent_mean=0.5,
    latent_std=1.0,
    latent_nonfinite=0,
    video_min=-1.0,
    video_max=1.0,
    video_nonfinite=0,
    memory_norm=0.7,
    gate_mean=None,
)


def chunk(index: int, *, vitals: dict[str, Any] | None = None, stats: dict[str, Any] | None = None) -> Chunk:
    last = 3 * index + 2
    place = dict(newest_temporal_id=min(last, 20), shift=max(0, last - 20), generate_seconds=0.1, decode_seconds=0.1)
    return Chunk(
        index=index,
        frames=torch.full((9 if index == 0 else 12, 2, 2, 3), index, dtype=torch.uint8),
        first_frame=max(0, 12 * index - 3),
        latents=torch.full((3, 4, 4, 6), float(index)),
        stats=ChunkStats(
            **(place | dict(memory_attended=False, vitals=Vitals(**(VITALS | (vitals or {})))) | (stats or {}))
        ),
    )


def figures(**changes: Any) -> Figures:
    return Figures(CONFIG, **(dict(expected={}, block=0, frame=0, hash_every=4) | changes))


def line(made: Figures) -> dict[str, Any]:
    return made.line(fps=16)


def misplaced(made: Figures, chunks: Iterable[Chunk], rollbacks: int = 0) -> list[Any]:
    """What is wrong with the place of the first of these blocks that is out of place."""
    for each in chunks:
        made.add(each, 0.1, warm=True, switching=False, rollbacks=rollbacks)
    return line(made)["position"]["misplaced"]


def test_blocks_in_their_turn() -> None:
    made = figures()
    assert misplaced(made, map(chunk, range(30))) == []
    assert (made.block, made.frame) == (30, 357)


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        (dict(index=11), "expected block 10 from frame 117, found 11 from frame 117"),
        (dict(first_frame=118), "expected block 10 from frame 117, found 10 from frame 118"),
        (dict(stats=dict(newest_temporal_id=21)), "newest id 21 is not in 0..20"),
        (dict(stats=dict(newest_temporal_id=-1)), "newest id -1 is not in 0..20"),
        (dict(stats=dict(shift=7)), "the shift went back from 9 to 7"),
        (dict(stats=dict(shift=13)), "id 20 and shift 13 are -1 frames behind"),
    ],
)
def test_a_block_out_of_place(changes: dict[str, Any], wrong: str) -> None:
    out = replace(chunk(10, stats=changes.pop("stats", None)), **changes)
    assert misplaced(figures(), [*map(chunk, range(10)), out])[1] == wrong


def test_a_rollback_is_no_block_out_of_place() -> None:
    made, place = figures(), dict(newest_temporal_id=20)
    assert misplaced(made, map(chunk, range(12))) == []
    # The state goes back from block 12 to block 8, the video goes on.
    went_on = [chunk(index, stats=place | dict(shift=3 * (index - 4) - 18)) for index in range(12, 16)]
    assert misplaced(made, went_on[:3], rollbacks=1) == []
    assert misplaced(made, [chunk(15)], rollbacks=1) == [15, "id 20 and shift 27 are -12 frames behind"]
    assert misplaced(figures(block=12, frame=141, offset=4), went_on) == []


def test_hashes_tell_blocks_apart_by_latents_and_frames() -> None:
    one = chunk(5)
    other_pixel, other_latent = chunk(5), chunk(5)
    other_pixel.frames[0, 0, 0, 0] += 1
    other_latent.latents[0, 0, 0, 0] += 1e-6
    assert digest(one) == digest(chunk(5))
    assert len({digest(one), digest(other_pixel), digest(other_latent)}) == 3


def test_the_thread_that_makes_blocks_does_not_wait_for_a_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = [], threading.Event()

    def held(block: Chunk) -> str:
        begun.append(block.index)
        assert go_on.wait(60)
        return digest(block)

    monkeypatch.setattr("echo_rt.soak.interval.digest", held)
    interval = figures(expected={4: "other"})
    for index in range(5):
        interval.add(chunk(index), 0.1, warm=True, switching=False)
    assert begun in ([], [0]), "a hash after the other, none of them ready"
    go_on.set()
    assert line(interval)["mismatches"] == [(4, "other", digest(chunk(4)))]


def test_hashes_that_are_known() -> None:
    interval = figures(expected={0: digest(chunk(0)), 4: "other", 8: "never reached", 3: "not hashed"})
    for index in range(6):
        interval.add(chunk(index), 0.1, warm=True, switching=False)
    made = line(interval)
    assert made["hashes"] == [(0, digest(chunk(0))), (4, digest(chunk(4)))]
    assert made["mismatches"] == [(4, "other", digest(chunk(4)))] and made["compared"] == 2
    interval.add(chunk(6), 0.1, warm=True, switching=False)
    assert line(interval)["compared"] == 0


def test_statistics_of_an_interval() -> None:
    interval = figures(outlier_from=10.0)
    interval.add(chunk(0, vitals=dict(latent_mean=1.0, video_min=-2.0)), 9.0, warm=False, switching=False)
    interval.add(chunk(1, vitals=dict(latent_mean=2.0, video_max=3.0)), 0.1, warm=True, switching=False)
    for index, since in ((2, 0), (3, 1), (4, 2)):
        interval.add(chunk(index), 0.5 if since < 2 else 0.1, warm=True, switching=since < 2)
    made = line(interval)
    assert made["latents"] == {"mean": pytest.approx((1 + 2 + 3 * 0.5) / 5), "std": 1.0}
    assert made["video"] == {"min": -2.0, "max": 3.0} and made["memory_state"]["gate_mean"] is None
    assert made["latency"]["max"] == 9000.0 and made["latency"]["max_block"] == 0 and made["warm"] is False
    assert sum(made["latency"]["bins"].values()) == 2 and made["latency"]["p99"] == pytest.approx(100, rel=1e-3)
    assert made["switch_latency"] == {"blocks": 2, "max": 500.0}
    assert made["position"]["least_newest_id"] == 2 and made["position"]["most_newest_id"] == 14


def test_nan_is_counted_and_leaves_json_whole() -> None:
    interval = figures()
    interval.add(chunk(0), 0.1, warm=True, switching=False)
    nan = float("nan")
    for index, count in ((1, 3), (2, 5)):
        spoilt = dict(latent_mean=nan, latent_std=nan, latent_nonfinite=count, video_nonfinite=1, memory_norm=nan)
        interval.add(chunk(index, vitals=spoilt), 0.1, warm=True, switching=False)
    made = line(interval)
    assert made["nonfinite"] == {"latent": 8, "video": 2, "block": 1}
    assert made["latents"] == {"mean": None, "std": None} and made["memory_state"]["norm"] is None


def test_outliers_of_an_interval() -> None:
    interval = figures(outlier_from=10.0)
    for index in range(100):
        interval.add(chunk(index), 0.3 if index == 90 else 0.1, warm=True, switching=False)
    made = line(interval)["zscore"]
    assert (made["block"], made["outliers"], made["judged"]) == (90, 1, 36) and made["max"] == pytest.approx(200)
