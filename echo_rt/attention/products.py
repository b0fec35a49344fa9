"""Attention by plain matrix products, for heads of any size: scores, softmax, weighted values.

Fused kernels end at heads of 256 numbers or become slow there, and the VAE's one head has 384. The larger a head, the
less it costs beside the products to write its scores and read them again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Of the scores that are there at once. By count, half a frame of 832x480, which fits, fills the multiprocessors of a
# large GPU as well as the whole frame does; a much smaller slice would leave many of them idle.
_SCORES_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Products:
    """An :class:`echo_rt.attention.Attention` of library products, a head and a slice of its queries at a time.

    Scores and softmax are float32, as in a fused kernel; the weights are rounded once, to the dtype of the values.
    Beside its result it takes memory for the scores of one slice, their softmax and its rounding, however many slices
    there are. Finite scores never become NaN: softmax takes the largest of a row away from all of them.
    """

    name: str = "products"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``q [n, H, d]`` and ``k, v [m, H, d]``, which may be parts of a larger buffer -> ``[n, H·d]``."""
        queries, heads, size = q.shape
        scale = 1 / math.sqrt(size)
        out = q.new_empty(queries, heads, size)
        rows = _rows_at_once(queries, len(k))
        room = q.new_empty(rows, len(k), dtype=torch.float32)
        # A CPU has no product of 16-bit numbers with a float32 result.
        scores = _scores_of_half if q.is_cuda and q.dtype is not torch.float32 else _scores
        for head in range(heads):
            for some, to in zip(q[:, head].split(rows), out[:, head].split(rows), strict=True):
                made = room[: len(some)]
                scores(some, k[:, head], scale, made)
                torch.mm(torch.softmax(made, dim=-1).to(v.dtype), v[:, head], out=to)
        return out.flatten(-2)


def _rows_at_once(queries: int, keys: int) -> int:
    """The queries of a slice: as many in each, so that the last one does not leave a GPU nearly idle."""
    slices = math.ceil(queries * keys * torch.float32.itemsize / _SCORES_BYTES)
    return math.ceil(queries / slices)


def _scores(q: Tensor, k: Tensor, scale: float, out: Tensor) -> None:
    """``scale`` times the products of ``q [n, d]`` with ``k [m, d]``, in float32, into ``out [n, m]``."""
    torch.addmm(out, q.float(), k.float().T, beta=0, alpha=scale, out=out)


def _scores_of_half(q: Tensor, k: Tensor, scale: float, out: Tensor) -> None:
    """The same of 16-bit numbers on a GPU, whose sums are float32 anyway: stored as they are, scaled on the way."""
    # For addmm an addend of another dtype than q's, though it is not read, is an error in some versions of torch.
    into = out.unsqueeze(0)
    torch.ops.aten.baddbmm.dtype_out(
        into, q.unsqueeze(0), k.T.unsqueeze(0), torch.float32, beta=0, alpha=scale, out=into
    )
