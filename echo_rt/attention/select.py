"""Which attention a model is given, and why: tried on a GPU on the model's own shapes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from echo_rt.attention.backends import (
    IMPLEMENTATIONS,
    Attention,
    AttentionCandidate,
    AttentionShapes,
    HeadsFirst,
    Matmul,
    implementations,
)
from echo_rt.autotune.cache import Cache
from echo_rt.autotune.tuner import Check, Selection, Stopwatch, Tuner, current
from echo_rt.config import ModelConfig
from echo_rt.errors import BackendError
from echo_rt.ops.schema import Ops

CACHE = Cache("attention", lambda fields: AttentionShapes(**fields))
cache_file = CACHE.path

AttentionSelection = Selection[Attention]
MakeCheck = Callable[[AttentionShapes, torch.device, torch.dtype], Check[Attention]]

# What candidates are tried on while there is no model; the head size is that of all of Wan's.
_PROBE = AttentionShapes(queries=64, keys=200, heads=2, head_dim=128)
_CHECKED_QUERIES = 32
_CALLS_TIMED_TOGETHER = 4


def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula in float64, ``[n, H·d]``; a head at a time, as it is many times the size of its input."""
    scale = 1 / math.sqrt(q.shape[-1])
    heads = [
        torch.softmax(q[:, head].double() @ k[:, head].double().T * scale, dim=-1) @ v[:, head].double()
        for head in range(q.shape[1])
    ]
    return torch.stack(heads, dim=1).flatten(1)


class AttentionCheck:
    """Random ``q``, ``k`` and ``v`` of ``shapes``, with k and v laid out as in the KV buffer."""

    def __init__(self, shapes: AttentionShapes, device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, shapes.heads, shapes.head_dim, generator=generator, device=device, dtype=dtype)

        self._device = device
        self.q = normal(shapes.queries)
        self.k, self.v = normal(2, shapes.keys)

    @cached_property
    def _stopwatch(self) -> Stopwatch:
        return Stopwatch(self._device, _CALLS_TIMED_TOGETHER)

    def error(self, attention: Attention) -> float:
        """The largest relative error among queries from first to last; infinite for another shape or dtype."""
        q, k, v = self.q, self.k, self.v
        with current(self._device):
            out = attention(q, k, v)
            if out.shape != (q.shape[0], q.shape[1] * q.shape[2]) or out.dtype != q.dtype:
                return math.inf
            checked = min(_CHECKED_QUERIES, q.shape[0])
            rows = torch.linspace(0, q.shape[0] - 1, checked, device=q.device).round().long()
            exact = exact_attention(q[rows], k, v)
            errors = (out[rows].double() - exact).norm(dim=1) / exact.norm(dim=1)
        # A comparison with NaN is false whatever one asks; an infinite error is not.
        return float(errors.nan_to_num(nan=math.inf).max())

    def stopwatch(self, attention: Attention) -> Callable[[], float]:
        """A function that runs ``attention`` as in the steady state and returns the milliseconds per call."""
        return self._stopwatch.capture(partial(attention, self.q, self.k, self.v))


def select_attention(
    requested: str | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    shapes: AttentionShapes,
    cache: Path | None,
    prescribed: str | None = None,
    if_able: bool = False,
    candidates: Sequence[AttentionCandidate] = IMPLEMENTATIONS,
    check: MakeCheck = AttentionCheck,
) -> AttentionSelection:
    """The attention named ``requested``, else that of the snapshot to go on with, ``prescribed``.

    None of both: on a GPU the fastest for ``shapes``, on a CPU torch's own. With ``if_able`` one that was asked for and
    does not compute these shapes is no error: it is as if nothing had been asked for, and the reason says why.

    The fastest is measured once and remembered in the file ``cache`` (None: nowhere) until the GPU, a library or the
    shapes change. One that computes something else than attention is never selected; one that runs out of memory is
    left out, and what is found without it is not remembered. Waits for the device.
    Raises :class:`BackendError` for a name that is unknown or cannot be had here, and where nothing works; where that
    is for want of memory, ``torch.OutOfMemoryError``.
    """
    tuner = _tuner(device, dtype, shapes, candidates, check)
    return tuner.select(requested, prescribed, cache, BackendError if if_able else ())


def attentions(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    ops: Ops,
    requested: str | None = None,
    *,
    cache: Path | None,
    prescribed: tuple[str | None, str | None] = (None, None),
) -> tuple[AttentionSelection, AttentionSelection]:
    """The attention of a model over its KV buffer, as full as it gets, and over the text."""
    transformer = config.transformer
    over_cache = AttentionShapes(
        queries=config.tokens_per_block,
        keys=config.cached_tokens,
        heads=transformer.num_heads,
        head_dim=transformer.head_dim,
    )
    over_text = dataclasses.replace(over_cache, keys=transformer.text_len)
    first, second = (
        _tuner(device, dtype, shapes, implementations(ops)).select(requested, name, cache)
        for shapes, name in zip((over_cache, over_text), prescribed, strict=True)
    )
    return first, second


def untried_attention(device: torch.device) -> Attention:
    """What computes heads of any size on ``device``, right and untried: torch's own on a CPU."""
    return HeadsFirst("sdpa", scaled_dot_product_attention) if device.type == "cpu" else Matmul()


def known_selections(
    device: torch.device, cache: Path | None, candidates: Sequence[AttentionCandidate] = IMPLEMENTATIONS
) -> Iterator[tuple[str, str]]:
    """What models on ``device`` are given as things are now, as far as is known without measuring: name and reason."""
    return _tuner(device, torch.float32, _PROBE, candidates).known(cache)


def available_attention(
    device: torch.device,
    candidates: Sequence[AttentionCandidate] = IMPLEMENTATIONS,
    check: MakeCheck = AttentionCheck,
) -> dict[str, str]:
    """Name -> ``"available"``, or ``"why it is not; what to do"``. Each one is run on ``device``."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return _tuner(device, dtype, _PROBE, candidates, check).available()


def _tuner(
    device: torch.device,
    dtype: torch.dtype,
    shapes: AttentionShapes,
    candidates: Sequence[AttentionCandidate],
    check: MakeCheck = AttentionCheck,
) -> Tuner[Attention, AttentionShapes]:
    return Tuner(CACHE, device, dtype, shapes, candidates, partial(check, shapes, device, dtype))
