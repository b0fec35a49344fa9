"""Thousands of damaged files: each is refused in one line, or is as good as a whole one; nothing in it ever runs.

``ECHO_RT_DAMAGES`` files of each kind are tried (150), from the seed ``ECHO_RT_DAMAGE_SEED`` (0) on. A message names
the seed that it is about, so that one case can be tried alone.
"""

from __future__ import annotations

import io
import os
import random
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from damage import (
    BYTES,
    Damage,
    Trap,
    header_edited,
    other_file,
    pickled_code,
    with_valid_digest,
)
from safetensors.torch import save
from streaming import embeds, load, take

import echo_rt
from echo_rt.config import TransformerConfig
from echo_rt.errors import EchoError, SnapshotError
from echo_rt.snapshot.snapshot import Snapshot
from echo_rt.weights.generator import load_generator
from echo_rt.weights.shapes import transformer_shapes
from echo_rt.weights.tensors import FingerprintedTensors

COUNT = int(os.environ.get("ECHO_RT_DAMAGES", "150"))
FIRST_SEED = int(os.environ.get("ECHO_RT_DAMAGE_SEED", "0"))
TRANSFORMER = TransformerConfig(dim=24, ffn_dim=40, freq_dim=16, num_heads=2, num_layers=2, text_dim=20, text_len=8)
_ROOM = 2**30  # bytes that a loader may ask for beyond what the process has; the files have a thousandth of it
_PATIENCE = 20.0  # seconds for one file


@pytest.fixture
def small_room() -> Iterator[None]:
    """A process that cannot get much more memory than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def runtime(small_model: Path) -> Iterator[echo_rt.Runtime]:
    with load(small_model) as made:
        yield made


@pytest.fixture(scope="module")
def snapshot(runtime: echo_rt.Runtime, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of one with everything in it."""
    path = tmp_path_factory.mktemp("snapshot") / "s.safetensors"
    with runtime.stream(prompt_embeds=embeds(runtime), seed=3) as stream:
        chunks = take(stream, 6)
        stream.set_prompt(prompt_embeds=embeds(runtime, 1))
        made = stream.snapshot()
    Snapshot(**{**vars(made), "held": tuple(chunks[-1:])}).save(path)
    return path.read_bytes()


def try_all(
    whole: bytes, path: Path, damages: tuple[Damage, ...], read: Callable[[bytes], str], trap: Path
) -> Counter[str]:
    """What ``read`` says of each damaged file, which is at ``path``; it gets the file's bytes too."""
    outcomes: Counter[str] = Counter()
    for seed in range(FIRST_SEED, FIRST_SEED + COUNT):
        dice = random.Random(seed)
        damage = dice.choice(damages)
        damaged = damage(whole, dice)
        path.write_bytes(damaged)
        began = time.perf_counter()
        try:
            outcome = read(damaged)
        except EchoError as error:
            outcome = f"{damage.__name__} refused"
            assert "\n" not in str(error) and str(path) in str(error) and len(str(error)) < 8000, (seed, str(error))
        except BaseException as error:
            raise AssertionError(f"seed {seed}, {damage.__name__}: {type(error).__name__}: {error}") from error
        assert time.perf_counter() - began < _PATIENCE, f"seed {seed}, {damage.__name__}: took too long"
        assert not trap.exists(), f"seed {seed}, {damage.__name__}: code in the file was run"
        outcomes[outcome] += 1
    print(dict(sorted(outcomes.items())))
    return outcomes


@pytest.mark.usefixtures("small_room")
def test_damaged_snapshots(snapshot: bytes, tmp_path: Path) -> None:
    """Whatever differs from what was written, in a single bit, is refused."""
    path, trap = tmp_path / "s.safetensors", tmp_path / "trap"

    def read(damaged: bytes) -> str:
        Snapshot.load(path)
        assert damaged == snapshot, "a damaged snapshot was taken for a whole one"
        return "unchanged"

    outcomes = try_all(snapshot, path, (*BYTES, header_edited, other_file(trap)), read, trap)
    assert outcomes["unchanged"] < COUNT / 10


@pytest.mark.usefixtures("small_room")
def test_forged_snapshots(snapshot: bytes, runtime: echo_rt.Runtime, tmp_path: Path) -> None:
    """With a checksum that fits: other facts, keys, shapes, offsets. What is read can be resumed or is refused."""
    path, trap = tmp_path / "s.safetensors", tmp_path / "trap"

    def forged(content: bytes, dice: random.Random) -> bytes:
        return with_valid_digest(header_edited(content, dice))

    def read(damaged: bytes) -> str:
        loaded = Snapshot.load(path)
        try:
            runtime.resume(loaded).close()
        except EchoError as error:
            assert "\n" not in str(error)
            return "loaded, not resumed"
        return "resumed"

    outcomes = try_all(snapshot, path, (forged,), read, trap)
    assert outcomes["forged refused"] > COUNT / 4 and outcomes["loaded, not resumed"] > 0


def checkpoint(kind: str) -> bytes:
    generator = torch.Generator().manual_seed(1)
    shapes = transformer_shapes(TRANSFORMER)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if kind == "safetensors":
        return save(tensors, {"format": "pt"})
    buffer = io.BytesIO()
    torch.save({"generator": tensors, "step": 3}, buffer, _use_new_zipfile_serialization=kind == "zip")
    return buffer.getvalue()


@pytest.mark.usefixtures("small_room")
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_damaged_checkpoints(kind: str, tmp_path: Path) -> None:
    """There is no checksum in these: damage inside a tensor gives other weights, but never NaN, and nothing else."""
    trap = tmp_path / "trap"
    path = tmp_path / ("c.safetensors" if kind == "safetensors" else "c.pt")
    own: tuple[Damage, ...] = {"safetensors": (header_edited,), "zip": (pickled_code(trap),), "legacy": ()}[kind]

    def read(damaged: bytes) -> str:
        weights = FingerprintedTensors(load_generator(path, TRANSFORMER).transformer, str(path))
        for name, shape in transformer_shapes(TRANSFORMER).items():
            tensor = weights[name]
            assert tuple(tensor.shape) == shape and bool(tensor.isfinite().all())
        return "loaded"

    whole = checkpoint(kind)
    path.write_bytes(whole)
    assert read(whole) == "loaded"
    outcomes = try_all(whole, path, (*BYTES, other_file(trap), *own), read, trap)
    assert sum(count for outcome, count in outcomes.items() if outcome.endswith("refused")) > COUNT / 4


@pytest.mark.parametrize("zipped", [True, False])
def test_the_traps_work(tmp_path: Path, zipped: bool) -> None:
    """What the files with code in them would do to a loader that trusts them."""
    trap, path = tmp_path / "trap", tmp_path / "c.pt"
    torch.save({"a": Trap(trap)}, path, _use_new_zipfile_serialization=zipped)
    torch.load(path, weights_only=False)
    assert trap.exists()
    if zipped:
        trap.rmdir()
        path.write_bytes(pickled_code(trap)(checkpoint("zip"), random.Random(0)))
        torch.load(path, weights_only=False)
        assert trap.exists()


def test_a_message_names_the_file(snapshot: bytes, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    path.write_bytes(snapshot[:-1])
    with pytest.raises(SnapshotError, match=r"s\.safetensors: the snapshot is damaged: expected a safetensors file"):
        Snapshot.load(path)
