"""What the steady state may not do: read a value on the host, or copy, roll or concatenate the cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from random_model import build_rollout, flat_config, random_weights
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# What reads a tensor's value on the host, or has a size that depends on values: on a GPU each is a synchronization.
HOST_READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "_unique2"}
# What makes a moved or doubled copy of its input.
COPIES = {"clone", "roll", "cat", "_to_copy", "index_select", "index", "contiguous", "stack"}


class Recorder(TorchDispatchMode):
    """Notes every operation with the tensors it reads and the size of what it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[Tensor], int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [a for a in args if isinstance(a, Tensor)]
        inputs += [t for a in args if isinstance(a, (list, tuple)) for t in a if isinstance(t, Tensor)]
        result = func(*args, **(kwargs or {}))
        size = result.numel() if isinstance(result, Tensor) else 0
        self.calls.append((func.overloadpacket.__name__, inputs, size))
        return result


@pytest.fixture(scope="module", params=["evolve", "prior", "off"])
def steady_block(request: pytest.FixtureRequest) -> Iterator[tuple[Recorder, Tensor]]:
    """The operations of one block, with its memory update, after the window is full and the ids are saturated."""
    flat = flat_config(denoising_steps=[1000, 500])
    rollout = build_rollout(flat, random_weights(flat), request.param)
    rollout.start(torch.ones(2, flat["text_dim"]))
    for _ in range(9):
        rollout.next_block()
    with Recorder() as recorder:
        rollout.next_block()
    yield recorder, rollout.state.kv


def test_no_value_is_read_on_the_host(steady_block: tuple[Recorder, Tensor]) -> None:
    recorder, _ = steady_block
    names = {name for name, _, _ in recorder.calls}
    assert "addmm" in names and "index_copy_" in names, "the recorder saw nothing"
    assert not names & HOST_READS


def test_the_cache_is_not_copied(steady_block: tuple[Recorder, Tensor]) -> None:
    recorder, kv = steady_block
    storage = kv.untyped_storage().data_ptr()
    layer = kv[0, 0].numel()
    for name, inputs, size in recorder.calls:
        for tensor in inputs:
            of_cache = tensor.untyped_storage().data_ptr() == storage
            # Reading a block's worth (the memory update does) is not copying the window.
            if of_cache and name in COPIES:
                assert size < layer / 2, f"{name} of {size} of {layer} values of a layer's cache"


def test_the_recorder_would_see_both() -> None:
    cache = torch.zeros(4, 4)
    with Recorder() as recorder:
        torch.roll(cache, 1, 0)
        cache[0, 0].item()
    assert {"roll", "_local_scalar_dense"} <= {name for name, _, _ in recorder.calls}
