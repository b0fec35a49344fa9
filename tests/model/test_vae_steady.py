"""The decoder's steady state: no history is padded, concatenated or cloned, no layout changes, no memory is kept."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from naive_vae import random_weights, tiny_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from echo_rt.model.vae_decoder import VaeDecoder, VaeDecoderState
from echo_rt.ops.backends import available_backends, load_ops
from echo_rt.weights.shapes import vae_decoder_shapes

# What makes a moved, grown or converted copy of its input, or puts several together.
COPIES = {"clone", "roll", "cat", "stack", "constant_pad_nd", "_to_copy", "index", "index_select", "repeat"}
# What reads a value on the host, or has a size that depends on values.
HOST_READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"}

LATENTS, ROWS, COLUMNS = 3, 6, 4


class Watcher(TorchDispatchMode):
    """Notes the name and the result of every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[int, ...]]] = []
        self.made: list[weakref.ref[Tensor]] = []
        self.most_bytes = 0  # that were held at a time, of what was made here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        shape: tuple[int, ...] = ()
        if isinstance(result, Tensor):
            shape = tuple(result.shape)
            self.made.append(weakref.ref(result))
            pieces = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in self.alive}
            self.most_bytes = max(self.most_bytes, sum(pieces.values()))
        self.calls.append((func.overloadpacket.__name__, shape))
        return result

    @property
    def alive(self) -> list[Tensor]:
        return [tensor for made in self.made if (tensor := made()) is not None]


@pytest.fixture(scope="module")
def decoder() -> VaeDecoder:
    if available_backends()["emulated"] != "available":
        pytest.skip("the torch backend's operations are written with copies; the kernels are not there")
    config = tiny_config(dim_mult=(1, 1, 2), temporal_downsample=(True, True), num_res_blocks=1)
    weights = random_weights(vae_decoder_shapes(config))
    return VaeDecoder(config, weights, load_ops("emulated"), device="cpu", dtype=torch.bfloat16)


def steady_state(decoder: VaeDecoder) -> tuple[VaeDecoderState, Tensor]:
    """A stream some blocks on, and the latents of its next block."""
    state = decoder.new_state(ROWS, COLUMNS, LATENTS)
    latents = torch.randn(LATENTS, decoder.config.z_dim, ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        decoder.decode(latents, state)
    return state, latents


def watched(decoder: VaeDecoder, state: VaeDecoderState, latents: Tensor) -> Watcher:
    with torch.no_grad(), Watcher() as watcher:
        decoder.decode_next(latents, state, is_start=False)
    return watcher


def test_nothing_above_the_lowest_resolution_is_copied(decoder: VaeDecoder) -> None:
    calls = watched(decoder, *steady_state(decoder)).calls
    names = [name for name, _ in calls]
    assert names.count("rms_silu_window") > 10 and "_convolution" in names, "the watcher saw nothing"
    # The attention in the middle works on its few pixels in float32, as the layout of its heads wants them.
    lowest = LATENTS * ROWS * COLUMNS
    for name, shape in calls:
        if name in COPIES:
            pixels = torch.Size(shape[:-1]).numel()
            assert pixels <= lowest, f"{name} of {list(shape)}"
        assert name not in HOST_READS


def test_one_pass_for_all_between_two_convolutions(decoder: VaeDecoder) -> None:
    """No addition of bias or residual is left but at the ends of levels, where pictures are enlarged."""
    names = [name for name, _ in watched(decoder, *steady_state(decoder)).calls]
    levels = len(decoder.levels)
    frames = names.count("rms_silu_window")
    # At the end of a level: bias and residual; in the middle: before the attention, and its norm; the head's bias.
    assert names.count("add_") < frames / 2
    assert names.count("add_") <= 2 * (levels + 1) + 4


def test_every_block_is_the_same_work(decoder: VaeDecoder) -> None:
    state, latents = steady_state(decoder)
    assert watched(decoder, state, latents).calls == watched(decoder, state, latents).calls


def test_nothing_is_kept(decoder: VaeDecoder) -> None:
    state, latents = steady_state(decoder)
    lasting = {tensor.untyped_storage().data_ptr() for tensor in state.buffers().values()}
    watcher = watched(decoder, state, latents)
    gc.collect()
    left = [tensor for tensor in watcher.alive if tensor.untyped_storage().data_ptr() not in lasting]
    assert not left, "a block leaves tensors behind"


def test_what_was_read_is_let_go_of(decoder: VaeDecoder) -> None:
    """At full resolution: a sum that is a residual later, and what the convolution behind it makes, no more."""
    state, latents = steady_state(decoder)
    frames = 2 * state.plan.frames_at_once[-1]
    slice_bytes = frames * math.prod(state.tensors()["decoder.head.2"].shape[1:]) * 2
    video_bytes = decoder.decode(latents, state).nbytes
    # The most is held where a picture of twice the channels is enlarged: it, its result, and the slices below.
    assert watched(decoder, state, latents).most_bytes < video_bytes + 5 * slice_bytes


def test_the_watcher_would_see_it() -> None:
    with Watcher() as watcher:
        kept = torch.cat((torch.zeros(2, 3), torch.ones(2, 3)))
        torch.nn.functional.pad(kept, (1, 1))
    assert {"cat", "constant_pad_nd"} <= {name for name, _ in watcher.calls}
    assert [tuple(tensor.shape) for tensor in watcher.alive] == [(4, 3)]
