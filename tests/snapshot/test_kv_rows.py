"""What a snapshot leaves out of the KV buffer: little is stored, all comes back, and files of format 1 still load."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import as_of_another_version
from streaming import embeds, load, same, take

import echo_rt
from echo_rt.engine.state import RolloutState
from echo_rt.errors import StreamError
from echo_rt.ops.backends import load_ops
from echo_rt.snapshot.kv_rows import KV, MEMORY, RING, SINK, same_bits, split_kv
from echo_rt.snapshot.snapshot import Snapshot

_SHIFTED = 9  # blocks after which ids have shifted


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["torch", "emulated"])
def test_what_can_be_computed_again_is_left_out(small_model: Path, backend: str, dtype: str) -> None:
    if (backend, dtype) == ("emulated", "float32"):
        pytest.skip("no memory update")
    with (
        load(small_model, backend=backend, dtype=dtype) as runtime,
        runtime.stream(prompt_embeds=embeds(runtime)) as stream,
    ):
        take(stream, _SHIFTED)
        snapshot = stream.snapshot()
        config = runtime.config
        layers, rows = config.transformer.num_layers, config.memory_tokens
        sink = config.ring_begin - rows
        assert layers > 1 and snapshot.memory_ready and KV not in snapshot.tensors
        assert snapshot.tensors[MEMORY].shape[:3] == (1, 2, rows)
        assert snapshot.tensors[SINK].shape[:3] == (layers, 1, sink)
        assert snapshot.tensors[RING].shape[:3] == (layers, 2, config.cached_tokens - rows - sink)
        live = split_kv(runtime._engine.pipeline.live_tensors(), rows, sink)
        before = {name: live[name].clone() for name in (MEMORY, SINK, RING)}
        made = take(stream, 3)
    with load(small_model, backend=backend, dtype=dtype) as other, other.resume(snapshot) as stream:
        live = split_kv(other._engine.pipeline.live_tensors(), rows, sink)
        assert all(same_bits(live[name].contiguous(), tensor) for name, tensor in before.items())
        assert same(take(stream, 3), made)


def test_sink_keys_that_were_not_rotated_again_are_stored(small_model: Path) -> None:
    """In 16 bits: they come from a kernel that has not rounded before it rotates."""
    with load(small_model, dtype="bfloat16") as runtime, runtime.stream(prompt_embeds=embeds(runtime)) as stream:
        take(stream, 3)
        snapshot, made = stream.snapshot(), take(stream, 3)
    assert snapshot.tensors[SINK].shape[1] == 2
    with load(small_model, dtype="bfloat16") as other, other.resume(snapshot) as stream:
        assert same(take(stream, 3), made)


def test_a_quarter_of_the_released_size() -> None:
    from echo_rt.bench.settings import RELEASED

    config = RELEASED.config
    kv = RolloutState(config, load_ops("torch"), device=torch.device("meta"), dtype=torch.bfloat16).kv
    rows = split_kv({KV: kv}, config.memory_tokens, config.ring_begin - config.memory_tokens)
    stored = rows[MEMORY][:1].nbytes + rows[SINK][:, 1:].nbytes + rows[RING].nbytes
    assert 0.29 < 1 - stored / kv.nbytes < 0.30


def as_format_1(snapshot: Snapshot, runtime: echo_rt.Runtime, path: Path) -> None:
    """Write the state that ``runtime`` is in as the first format had it."""
    live = {name: tensor.clone() for name, tensor in runtime._engine.pipeline.live_tensors().items()}
    dataclasses.replace(snapshot, tensors=live).save(path)
    as_of_another_version(path, version="1", echo_rt="0.1.0")


@pytest.mark.parametrize("block", [3, _SHIFTED])
def test_format_1_goes_on_bit_for_bit(small_model: Path, tmp_path: Path, block: int) -> None:
    path = tmp_path / "s.safetensors"
    with load(small_model) as runtime, runtime.stream(prompt_embeds=embeds(runtime)) as stream:
        take(stream, block)
        as_format_1(stream.snapshot(), runtime, path)
        made = take(stream, 3)
    old = Snapshot.load(path)
    assert KV in old.tensors
    with load(small_model) as other, other.resume(old) as stream:
        assert same(take(stream, 3), made)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: {"rollout.surplus": torch.zeros(2)}, "rollout.surplus: expected no tensor of that name"),
        (lambda tensors: {"decoder.": torch.zeros(2)}, "decoder.: expected no tensor of that name"),
        (lambda tensors: {KV: tensors[RING]}, "rollout.kv: expected no tensor of that name"),
        (lambda tensors: {MEMORY: tensors[MEMORY][:, :1]}, "rollout.kv.memory: expected float32"),
        (lambda tensors: {SINK: tensors[SINK].repeat(1, 3, 1, 1, 1)}, "rollout.kv.sink: expected float32"),
        (lambda tensors: {RING: tensors[RING][:1]}, "rollout.kv.ring: expected float32"),
    ],
)
def test_other_tensors_are_refused(
    runtime: echo_rt.Runtime, change: Callable[[dict[str, Any]], dict[str, Any]], message: str
) -> None:
    with runtime.stream(prompt_embeds=embeds(runtime)) as stream:
        take(stream, 1)
        snapshot = stream.snapshot()
    tensors = dict(snapshot.tensors)
    with pytest.raises(StreamError, match=message):
        runtime.resume(dataclasses.replace(snapshot, tensors=tensors | change(tensors)))


def test_a_video_is_known_by_its_seed(runtime: echo_rt.Runtime) -> None:
    """That it was begun with: each rollback takes another."""
    from echo_rt.snapshot.snapshot import reseeded

    with runtime.stream(prompt_embeds=embeds(runtime), seed=2**64 - 1) as stream:
        take(stream, 1)
        snapshot = stream.snapshot()
    assert snapshot.is_of_video(2**64 - 1) and not snapshot.is_of_video(0) and not snapshot.is_of_video(2**64 - 2)
    later = dataclasses.replace(snapshot, seed=reseeded(reseeded(snapshot.seed)))
    assert later.is_of_video(2**64 - 1) and not snapshot.is_of_video(later.seed)
