"""Which attention a model is given, and why."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from echo_rt.attention.kinds import KINDS, Attention, Kind
from echo_rt.attention.pieces import in_pieces
from echo_rt.attention.products import Products
from echo_rt.attention.remembered import FILE
from echo_rt.attention.trials import AttentionShapes, Trials
from echo_rt.autotune.tuner import Found, Judge, Search, known_entries, summary
from echo_rt.config import ModelConfig
from echo_rt.errors import BackendError
from echo_rt.ops.schema import Ops
from echo_rt.utils.device import give_memory_back, model_context

# What a kind is tried on while there is no model; the head size is that of all of Wan's.
_PROBE = AttentionShapes(queries=64, keys=200, heads=2, head_dim=128)

_logger = logging.getLogger("echo_rt.attention")


@dataclass(frozen=True)
class Choice:
    """The attention and why it is this one.

    ``timings``: milliseconds of a call of each kind that was timed; ``rejected``: what spoke against each other one;
    ``by_name``: whether it was asked for.
    """

    attention: Attention
    reason: str
    timings: Mapping[str, float] = field(default_factory=dict)
    rejected: Mapping[str, str] = field(default_factory=dict)
    by_name: bool = False


def kinds(ops: Ops) -> tuple[Kind, ...]:
    """All that a model with these operations may be given."""
    return (*KINDS, *in_pieces(ops))


MakeJudge = Callable[[AttentionShapes, torch.device, torch.dtype], Judge[Attention]]


def choose_attention(
    requested: str | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    shapes: AttentionShapes,
    cache: Path | None,
    prescribed: str | None = None,
    if_able: bool = False,
    kinds: Sequence[Kind] = KINDS,
    judge: MakeJudge = Trials,
) -> Choice:
    """The attention named ``requested``, else that of the snapshot to go on with, ``prescribed``.

    None of both: on a GPU the fastest for ``shapes``, on a CPU torch's own. With ``if_able`` a kind that was asked for
    and does not compute these shapes is no error: it is as if nothing had been asked for, and the reason says why.

    What is fastest is measured once and remembered in the file ``cache`` (None: nowhere) until the GPU, a library or
    the shapes change. A kind that computes something else than attention is never chosen; one that runs out of memory
    is left out, and what is found without it is not remembered. Waits for the device.
    Raises :class:`BackendError` for a name that is unknown or cannot be had here, and where nothing works; where that
    is for want of memory, ``torch.OutOfMemoryError``.
    """
    search = _search(device, dtype, shapes, kinds, judge)
    with model_context(device, dtype):
        asked = _asked_for(search, requested, if_able=if_able)
        if isinstance(asked, Found):
            found = asked
        elif prescribed is not None:
            found = search.prescribed(prescribed)
        elif device.type == "cuda":
            found = search.fastest(cache)
        else:
            found = _torchs_own(device, kinds)
    give_memory_back(device)  # graphs have kept memory of the trial's own
    by_name = isinstance(asked, Found)
    reason = f"{found.reason}; not {requested}: {asked}" if isinstance(asked, str) else found.reason
    choice = Choice(found.candidate, reason, found.timings, found.rejected, by_name=by_name)
    _logger.info("%s for %s: %s", choice.attention.name, shapes, choice.reason)
    return choice


def attentions(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    ops: Ops,
    requested: str | None = None,
    *,
    cache: Path | None,
    prescribed: tuple[str | None, str | None] = (None, None),
) -> tuple[Choice, Choice]:
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
        choose_attention(
            requested,
            device=device,
            dtype=dtype,
            shapes=shapes,
            cache=cache,
            prescribed=name,
            kinds=kinds(ops),
        )
        for shapes, name in zip((over_cache, over_text), prescribed, strict=True)
    )
    return first, second


def untried_attention(device: torch.device) -> Attention:
    """What computes heads of any size on ``device``, right and without a trial: torch's own on a CPU."""
    return _torchs_own(device, KINDS).candidate if device.type == "cpu" else Products()


def _asked_for(
    search: Search[Kind, Attention, AttentionShapes], requested: str | None, *, if_able: bool
) -> Found[Attention] | str | None:
    """What was asked for, why it is not to be had where it need not be, or None."""
    if requested is None:
        return None
    return search.requested_if_able(requested) if if_able else search.requested(requested)


def _torchs_own(device: torch.device, kinds: Sequence[Kind]) -> Found[Attention]:
    kind = next(kind for kind in kinds if kind.fused and device.type in kind.devices)
    return Found(kind.load(), f"torch's own on a {device.type.upper()}", {}, {})


def _search(
    device: torch.device, dtype: torch.dtype, shapes: AttentionShapes, kinds: Sequence[Kind], judge: MakeJudge
) -> Search[Kind, Attention, AttentionShapes]:
    def load(kind: Kind) -> Attention:
        if obstacle := kind.obstacle(device, dtype):
            raise BackendError(obstacle)
        return kind.load()

    reserve = partial(_reserve, shapes)
    return Search(FILE, device, dtype, shapes, kinds, load, reserve, partial(judge, shapes, device, dtype))


def _reserve(shapes: AttentionShapes, kind: Kind) -> str:
    if shapes.keys % kind.pieces:
        return f"{shapes.keys} keys cannot be cut into {kind.pieces} equal pieces"
    # Scores take gigabytes, and it is slow wherever another works: for heads of any size there are the products.
    return "" if kind.fused else "it holds all scores in memory: for where nothing else works"


def known_choices(device: torch.device, cache: Path | None, kinds: Sequence[Kind] = KINDS) -> Iterator[tuple[str, str]]:
    """What models on ``device`` are given as things are now, as far as is known without measuring: name and reason."""
    if device.type != "cuda":
        found = _torchs_own(device, kinds)
        yield found.candidate.name, found.reason
    elif cache is not None:
        for entry in known_entries(FILE, cache, device, kinds):
            yield entry.winner, f"for {entry.case.shapes} in {entry.case.dtype}, {summary(entry)}"


def available_attention(
    device: torch.device, kinds: Sequence[Kind] = KINDS, judge: MakeJudge = Trials
) -> dict[str, str]:
    """Name of a kind -> ``"available"``, or ``"why it is not; what to do"``. Each one is run on ``device``."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with model_context(device, dtype):
        return _search(device, dtype, _PROBE, kinds, judge).available()
