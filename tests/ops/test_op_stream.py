"""``advance`` and ``qkv_norm_rope_store`` block after block: the sink, the ring as it fills, is full, goes round.

The whole cache is looked at after every block: what the block wrote, and that nothing else has changed by a bit.
"""

from __future__ import annotations

import pytest
import torch
from cases import EPS, Sizes
from op_checks import BOUNDS, assert_close, assert_same, case, rms
from torch import Tensor

from echo_rt.ops.backends import available_backends, load_ops
from echo_rt.ops.schema import Ops

BACKENDS = [name for name, status in available_backends().items() if status == "available"]
# Two frames a block: one block of sink, three of ring.
SIZES = Sizes(frames=2, tokens=3, heads=2, head_dim=14, sink_frames=2, local_frames=6, memory_frames=2)
RING_BLOCKS = SIZES.local_frames // SIZES.frames
FAR = 2**31 // SIZES.frames


@pytest.fixture(params=BACKENDS)
def ops(request: pytest.FixtureRequest) -> Ops:
    return load_ops(request.param)


class Cache:
    """A layer's keys and values with their unrotated ring, and what each row must hold by now."""

    def __init__(self, ops: Ops, dtype: torch.dtype) -> None:
        s = SIZES
        self.ops, self.dtype = ops, dtype
        self.advance = case(ops, "advance", s, dtype)
        _, self.norm_q, self.norm_k, _, self.spatial, *_ = case(ops, "qkv_norm_rope_store", s, dtype)
        self.kv = torch.randn(2, s.rows, s.heads, s.head_dim, dtype=torch.float32).to(self.spatial.device, dtype)
        self.first_kept = s.memory_frames * s.tokens
        self.raw = self.kv[0, self.first_kept :].clone()
        self.generator = torch.Generator().manual_seed(1)

    def rows_of(self, block: int) -> slice:
        """Where a walk through the slots has come to, with no arithmetic of the ring's own."""
        s = SIZES
        first = (
            s.memory_frames if block == 0 else s.memory_frames + s.sink_frames + (block - 1) % RING_BLOCKS * s.frames
        )
        return slice(first * s.tokens, (first + s.frames) * s.tokens)

    def turned(self, x: Tensor, block: int) -> Tensor:
        """``x [n, H, d]`` in float64, every pair turned by the angle of its absolute frame and of its place."""
        s, rates = SIZES, self.advance[6].double()
        frames = block * s.frames + torch.arange(s.frames, device=x.device)
        angles = frames.double()[:, None] * rates
        temporal = torch.complex(angles.cos(), angles.sin()).repeat_interleave(s.tokens, 0)
        spatial = torch.view_as_complex(self.spatial.double()).repeat(s.frames, 1)
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.cat((temporal, spatial), -1)[:, None]).flatten(-2)

    def write(self, block: int) -> None:
        """One block, and all that must be true of it."""
        s = SIZES
        before, raw_before = self.kv.clone(), self.raw.clone()
        self.ops.advance(*self.advance)
        positions, temporal, index = self.advance[0], self.advance[7], self.advance[9]
        qkv = torch.randn(s.frames * s.tokens, 3 * s.dim, generator=self.generator).to(self.kv)
        q = self.ops.qkv_norm_rope_store(
            qkv, self.norm_q, self.norm_k, temporal, self.spatial, *self.kv, index, self.raw, self.first_kept, EPS
        )
        rows = self.rows_of(block)
        assert positions[0] == block
        assert index.tolist() == list(range(rows.start, rows.stop))

        wide_q, wide_k, v = (part.unflatten(-1, (s.heads, s.head_dim)) for part in qkv.chunk(3, -1))
        wide_q, wide_k = (
            rms(x.flatten(1).double(), norm.double()).view_as(x)
            for x, norm in ((wide_q, self.norm_q), (wide_k, self.norm_k))
        )
        theirs = self.turned(wide_q, block).to(self.dtype), self.turned(wide_k, block).to(self.dtype)
        assert_close(q, theirs[0], self.turned(wide_q, block), BOUNDS[self.dtype])
        assert_close(self.kv[0, rows], theirs[1], self.turned(wide_k, block), BOUNDS[self.dtype])
        raw_rows = slice(rows.start - self.first_kept, rows.stop - self.first_kept)
        assert_close(self.raw[raw_rows], wide_k.to(self.dtype), wide_k, BOUNDS[self.dtype])

        before[0, rows], before[1, rows] = self.kv[0, rows], v
        raw_before[raw_rows] = self.raw[raw_rows]
        assert_same(self.kv, before)
        assert_same(self.raw, raw_before)


@pytest.mark.parametrize("dtype", BOUNDS, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_a_ring_from_its_first_block_on(ops: Ops, dtype: torch.dtype) -> None:
    cache = Cache(ops, dtype)
    phases = []
    for block in range(2 * RING_BLOCKS + 2):
        cache.write(block)
        phases.append((cache.rows_of(block).start // SIZES.tokens, int(cache.advance[0][2])))
    slots = [slot for slot, _ in phases]
    sink, ring = SIZES.memory_frames, SIZES.memory_frames + SIZES.sink_frames
    # The sink; filling; exactly full with the fourth block; round by one, and then once more.
    assert slots == [sink, *[ring, ring + 2, ring + 4] * 2, ring]
    shifts = [shift for _, shift in phases]
    assert shifts[0] == 0 < shifts[-1], "the ids saturate on the way"


@pytest.mark.parametrize("dtype", BOUNDS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("start", [1000, FAR - 2], ids=["saturated", "past-2^31-frames"])
def test_a_ring_far_into_a_stream(ops: Ops, dtype: torch.dtype, start: int) -> None:
    cache = Cache(ops, dtype)
    cache.advance[0][0] = start - 1
    for block in range(start, start + RING_BLOCKS + 2):
        cache.write(block)
        # The newest frame keeps the largest id.
        assert (block + 1) * SIZES.frames - 1 - int(cache.advance[0][2]) == cache.advance[5]
