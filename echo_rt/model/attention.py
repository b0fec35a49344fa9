"""Attention over the cache and the text: a library's, through one function."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Unmasked softmax attention: ``q [n, H, d]``, ``k, v [m, H, d]`` -> ``[n, H·d]``."""
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    return scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).flatten(-2)
