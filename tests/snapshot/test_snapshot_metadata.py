"""Metadata of a snapshot's file that somebody wrote: it is refused in one line, or it is a snapshot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fuzzing import ANYTHING, changed, one_line
from hypothesis import given

from echo_rt.chunk import Chunk, ChunkStats, Vitals
from echo_rt.errors import SnapshotError
from echo_rt.snapshot import file as snapshot_file
from echo_rt.snapshot.snapshot import Snapshot

VITALS = Vitals(0.0, 1.0, 0, -1.0, 1.0, 0, None, float("nan"))
STATS = ChunkStats(1.0, 2.0, newest_temporal_id=3, shift=4, memory_attended=False, vitals=VITALS)
HELD = Chunk(0, torch.zeros(1, 2, 2, 3, dtype=torch.uint8), 0, torch.zeros(1, 1, 1, 1), STATS)
SMALL = Snapshot({"a": 1}, 1, 0, False, 3, {"t": torch.zeros(2)}, {}, held=(HELD,))


def read(path: Path, facts: object) -> Snapshot | None:
    """The snapshot whose file says ``facts``; None where it is refused."""
    tensors = {"state.t": torch.zeros(2), "held.0.frames": HELD.frames, "held.0.latents": HELD.latents}
    snapshot_file.write_file(path, tensors, facts)  # type: ignore[arg-type]
    try:
        return Snapshot.load(path)
    except SnapshotError as error:
        assert str(path) in str(error)
        one_line(error)
        return None


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("facts") / "s.safetensors"


def test_nan_in_the_statistics_of_a_held_block_comes_back(path: Path) -> None:
    facts = json.loads(json.dumps(SMALL._metadata(path)))
    loaded = read(path, facts)
    assert loaded is not None and repr(loaded.held[0].stats) == repr(STATS) and loaded.model == {"a": 1}


@given(facts=ANYTHING)
def test_any_json(path: Path, facts: object) -> None:
    assert read(path, facts) is None


@given(facts=changed(json.loads(json.dumps(SMALL._metadata(Path("s"))))))
def test_one_value_replaced(path: Path, facts: object) -> None:
    """Anywhere in it, by anything: what is loaded has values of the right types."""
    loaded = read(path, facts)
    if loaded is not None:
        numbers = (loaded.seed, loaded.block, loaded.latents_decoded, loaded.offset, loaded.initial_blocks)
        assert all(type(number) is int for number in numbers) and 0 <= loaded.seed < 2**64
        assert isinstance(loaded.model, dict) and type(loaded.memory_ready) is type(loaded.caller_noise) is bool
        assert all(isinstance(block, Chunk) and isinstance(block.stats, ChunkStats) for block in loaded.held)
