"""Metadata of a snapshot's file that somebody wrote: it is refused in one line, or it is a snapshot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_rt.chunk import Chunk, ChunkStats, Vitals
from echo_rt.errors import SnapshotError
from echo_rt.snapshot import file as snapshot_file
from echo_rt.snapshot.snapshot import Snapshot

VITALS = Vitals(0.0, 1.0, 0, -1.0, 1.0, 0, None, float("nan"))
STATS = ChunkStats(1.0, 2.0, newest_temporal_id=3, shift=4, memory_attended=False, vitals=VITALS)
HELD = Chunk(0, torch.zeros(1, 2, 2, 3, dtype=torch.uint8), 0, torch.zeros(1, 1, 1, 1), STATS)
SMALL = Snapshot({"a": 1}, 1, 0, False, 3, {"t": torch.zeros(2)}, {}, held=(HELD,))

ANYTHING: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def read(path: Path, facts: object) -> Snapshot | None:
    """The snapshot whose file says ``facts``; None where it is refused."""
    tensors = {"state.t": torch.zeros(2), "held.0.frames": HELD.frames, "held.0.latents": HELD.latents}
    snapshot_file.write_file(path, tensors, facts)  # type: ignore[arg-type]
    try:
        return Snapshot.load(path)
    except SnapshotError as error:
        assert "\n" not in str(error) and str(path) in str(error) and len(str(error)) < 600
        return None


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("facts") / "s.safetensors"


def test_nan_in_the_statistics_of_a_held_block_comes_back(path: Path) -> None:
    facts = json.loads(json.dumps(SMALL._metadata(path)))
    loaded = read(path, facts)
    assert loaded is not None and repr(loaded.held[0].stats) == repr(STATS) and loaded.model == {"a": 1}


@settings(max_examples=200, deadline=None)
@given(facts=ANYTHING)
def test_any_json(path: Path, facts: object) -> None:
    assert read(path, facts) is None


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_one_value_replaced(path: Path, data: st.DataObject) -> None:
    """Anywhere in it, by anything: what is loaded has values of the right types."""
    facts = json.loads(json.dumps(SMALL._metadata(path)))
    node, key = facts, data.draw(st.sampled_from(sorted(facts)))
    while isinstance(node[key], dict | list) and node[key] and data.draw(st.booleans()):
        node = node[key]
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
    node[key] = data.draw(ANYTHING)
    loaded = read(path, facts)
    if loaded is not None:
        numbers = (loaded.seed, loaded.block, loaded.latents_decoded, loaded.offset, loaded.initial_blocks)
        assert all(type(number) is int for number in numbers) and 0 <= loaded.seed < 2**64
        assert isinstance(loaded.model, dict) and type(loaded.memory_ready) is type(loaded.caller_noise) is bool
        assert all(isinstance(block, Chunk) and isinstance(block.stats, ChunkStats) for block in loaded.held)
