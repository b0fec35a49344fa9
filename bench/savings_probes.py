"""The calls that are timed to judge the exact savings of docs/savings.md, at a model's own shapes.

A call does what a whole pass does of its kind, layer after layer with that layer's weights, so that weights are as
cold as they are in a stream. Activations are random.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from savings_counts import PRODUCTS, Count, Counts
from torch import Tensor
from torch.nn.functional import rms_norm

from echo_rt.bench.measure import difference
from echo_rt.bench.rig import Parts, Rig
from echo_rt.engine.kv_cache import BlockCache, Span
from echo_rt.verify.bundles import bound_between

MERGED, COLLAPSED, CUT_SHORT = "merged context and first pass", "collapsed padding", "context pass cut short"
# Real keys of a text, as parts of its length.
_REAL_PARTS = (16, 4, 2)


@dataclass(frozen=True)
class Comparison:
    """A saving's bound: ``now`` is what a block does without it, ``then`` what it would do at best.

    Both are calls of which a block has ``times``. ``problem``: what is wrong with the result, where it is not right.
    """

    saving: str
    what: str
    now: Callable[[], object]
    then: Callable[[], object]
    times: float
    count: Count
    problem: str = ""


def merge_padding(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, padding: int) -> Tensor:
    """Attention to some keys made attention to those and to ``padding`` more that are all ``k`` with the value ``v``.

    ``out [n, H·d]`` and ``lse [n, H]`` (the logarithm of the sum of exponentials of the scaled scores, float32) are
    those of the former for ``q [n, H, d]``; ``k, v [H, d]``. Returns ``[n, H·d]``.
    """
    score = (q * k).sum(-1, dtype=torch.float32) / math.sqrt(q.shape[-1]) + math.log(padding)
    weight = torch.sigmoid(score - lse).unsqueeze(-1).to(out.dtype)
    return torch.lerp(out.view(q.shape), v.expand_as(q), weight).flatten(-2)


def log_sum_exp(q: Tensor, k: Tensor) -> Tensor:
    """``[n, H]`` float32 of the scaled scores of ``q [n, H, d]`` over ``k [m, H, d]``."""
    scores = torch.einsum("nhd,mhd->nhm", q.float(), k.float()) / math.sqrt(q.shape[-1])
    return scores.logsumexp(-1)


class Probes:
    """Over the weights of ``parts``; the context pass is that of ``rig``, which has to be in its steady state."""

    def __init__(self, parts: Parts, rig: Rig, counts: Counts, seed: int) -> None:
        site = parts.site
        self._parts, self._rig, self._counts = parts, rig, counts
        self._config, self._layers = site.model.config, parts.transformer.layers
        self._attention, self._dtype = site.over_text.attention, site.dtype
        transformer = self._config.transformer
        self._tokens, self._text = self._config.tokens_per_block, transformer.text_len
        generator = torch.Generator(site.device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=site.device, dtype=torch.float32).to(site.dtype)

        heads = (transformer.num_heads, transformer.head_dim)
        self._inputs = {width: normal(2 * self._tokens, width) for width in (transformer.dim, transformer.ffn_dim)}
        self._residual = normal(2 * self._tokens, transformer.dim)
        self._q = normal(2 * self._tokens, *heads)
        self._text_kv = normal(len(self._layers), 2, self._text, *heads)

    def comparisons(self) -> list[Comparison]:
        """All of them. The largest tensors of each are made when it is called."""
        merged = [self._merged_product(name) for name in PRODUCTS]
        merged += [self._merged_cross_attention(), self._merged_rest()]
        lengths = sorted({max(1, self._text // part) for part in _REAL_PARTS})
        collapsed = [each for real in lengths for each in self._collapsed(real)]
        return [*merged, *collapsed, self._cut_short()]

    def _halves(self, work: Callable[[slice], object]) -> tuple[Callable[[], object], Callable[[], object]]:
        """``work`` on the first block's tokens and then on the second's, and on both at once."""
        n = self._tokens
        return lambda: (work(slice(0, n)), work(slice(n, 2 * n))), lambda: work(slice(0, 2 * n))

    def _merged_product(self, name: str) -> Comparison:
        products = [getattr(layer, name) for layer in self._layers[: self._counts.merged_layers(name)]]
        x = self._inputs[products[0].weight.shape[1]]

        def work(rows: slice) -> None:
            for product in products:
                product(x[rows])

        return Comparison(MERGED, f"product {name}", *self._halves(work), 1, self._counts.merged_product(name))

    def _merged_cross_attention(self) -> Comparison:
        def work(rows: slice) -> None:
            for k, v in self._text_kv[:-1]:
                self._attention(self._q[rows], k, v)

        return Comparison(
            MERGED, "attention to the text", *self._halves(work), 1, self._counts.merged_cross_attention()
        )

    def _merged_rest(self) -> Comparison:
        """One set of modulations for both halves: two would take kernels that look up which half a row is of."""
        ops, eps = self._parts.ops, self._config.transformer.eps
        x, y = self._residual, self._inputs[self._config.transformer.dim]
        modulations = self._parts.transformer.modulations[0]

        def work(rows: slice) -> None:
            for layer, m in zip(self._layers[:-1], modulations, strict=False):
                ops.gated_residual_norm(x[rows], y[rows], m[2], layer.cross_norm_shift, layer.cross_norm_scale, eps)
                rms_norm(y[rows], y.shape[1:], layer.cross_norm_q, eps)
                ops.gated_residual_norm(x[rows], y[rows], None, m[3], m[4], eps)
                ops.gated_residual_norm(x[rows], y[rows], m[5], m[0], m[1], eps)

        return Comparison(MERGED, "norms", *self._halves(work), 1, self._counts.merged_rest())

    def _collapsed(self, real: int) -> Sequence[Comparison]:
        q, n = self._q[: self._tokens], self._text
        times = self._counts.attentions / len(self._layers)
        padding = n - real
        # The sums cost a kernel nothing to hand out, and their values do not change a time: one layer's serve all.
        lse = log_sum_exp(q, self._text_kv[0, 0, :real])

        def attend(keys: int) -> None:
            for k, v in self._text_kv:
                self._attention(q, k[:keys], v[:keys])

        def merged(k: Tensor, v: Tensor) -> Tensor:
            out = self._attention(q, k[:real], v[:real])
            return merge_padding(out, lse, q, k[-1], v[-1], padding)

        def outside() -> None:
            for k, v in self._text_kv:
                merged(k, v)

        k, v = self._text_kv[0].clone()
        k[real:], v[real:] = k[-1].clone(), v[-1].clone()
        error, bound = difference(merged(k, v), self._attention(q, k, v)), bound_between(self._dtype)
        problem = "" if error <= bound else f"off by {error:.1e}, {bound:.1e} is the most"
        return [
            Comparison(
                COLLAPSED,
                f"{n} keys to {real} + 1, in a kernel that takes a bias a key",
                lambda: attend(n),
                lambda: attend(real + 1),
                times,
                self._counts.collapsed(real, merged_outside=False),
            ),
            Comparison(
                COLLAPSED,
                f"{n} keys to {real}, the padding merged in by torch",
                lambda: attend(n),
                outside,
                times,
                self._counts.collapsed(real, merged_outside=True),
                problem,
            ),
        ]

    def _cut_short(self) -> Comparison:
        """The context pass over what it has stored already: the same keys and values once more."""
        rollout, site, transformer = self._rig.rollout, self._parts.site, self._parts.transformer
        state, context = rollout.state, self._parts.schedule.context
        span = Span(begin=0, end=self._counts.keys, in_sink=False)
        cache = BlockCache(rollout.config, state, self._parts.ops, site.over_cache.attention, span)
        return Comparison(
            CUT_SHORT,
            "last layer behind its keys, and the head",
            lambda: transformer.flow(state.x, context, state.text_kv, cache),
            lambda: transformer.store_keys(state.x, context, state.text_kv, cache),
            1,
            self._counts.cut_short(),
        )
