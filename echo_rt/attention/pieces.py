"""Attention to all keys made of attention to pieces of them, for the multiprocessors that a last wave leaves idle.

A library cuts the queries of a head into tiles, and a multiprocessor computes one after the other. A block of the
released model has 444 tiles of 128 queries, an H200 132 multiprocessors: three full waves and a third of one, which
takes as long as a full one. Twice as many tiles of half the keys are 6.7 waves of half the length: seven halves in the
place of four waves. ``docs/kernels.md`` counts it; whether that pays for copying the queries and for merging, a trial
measures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from echo_rt.attention.kinds import Attention, HeadsFirst, Kind
from echo_rt.ops.schema import Ops

# Of ``q, k, v [pieces, H, n or m, d]``: outputs ``[pieces, H, n, d]``, and natural log-sum-exps of as many rows.
WithSums = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

# What ops.merge_attention takes.
PIECES = (2, 3, 4)


@dataclass(frozen=True)
class InPieces:
    """A library's attention to ``pieces`` equal parts of the keys at once, as if they were a batch.

    Keys that cannot be cut evenly are attended to by ``whole``, the same library's attention to all of them.
    """

    name: str
    function: WithSums
    pieces: int
    whole: Attention
    ops: Ops

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if k.shape[0] % self.pieces:
            return self.whole(q, k, v)
        tokens, heads, _ = q.shape
        # Copies, as libraries differ in whether a batch may be the same memory over and over.
        queries = q.expand(self.pieces, -1, -1, -1).contiguous()
        keys, values = (t.unflatten(0, (self.pieces, -1)) for t in (k, v))
        outputs, sums = self.function(*(t.transpose(1, 2) for t in (queries, keys, values)))
        # cuDNN's sums have a last dimension of one.
        return self.ops.merge_attention(outputs.transpose(1, 2), sums.view(self.pieces, heads, tokens))


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    outputs, sums, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention.default(q, k, v, None, True)
    return outputs, sums


def _flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    outputs, sums, *_ = torch.ops.aten._scaled_dot_product_flash_attention.default(q, k, v)
    return outputs, sums


def in_pieces(ops: Ops) -> tuple[Kind, ...]:
    """The kinds whose pieces ``ops`` merges: two, three and four of cuDNN's, and of flash attention's."""
    return tuple(
        _kind(library, function, pieces, ops)
        for library, function in (("sdpa-cudnn", _cudnn), ("sdpa-flash", _flash))
        for pieces in PIECES
    )


def _kind(library: str, function: WithSums, pieces: int, ops: Ops) -> Kind:
    name = f"{library}-in-{pieces}"

    def outputs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return function(q, k, v)[0]

    return Kind(
        name,
        partial(InPieces, name, function, pieces, HeadsFirst(library, outputs), ops),
        pieces=pieces,
        merged_by=ops.name,
    )
