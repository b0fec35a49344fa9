"""Which attention a model is given, and why."""

from __future__ import annotations

import dataclasses
import logging
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from echo_rt.attention.kinds import KINDS, Attention, Kind, first_line, plain
from echo_rt.attention.machine import machine_facts
from echo_rt.attention.remembered import Case, Entry, entries, recall, remember
from echo_rt.attention.trials import TOLERANCES, AttentionShapes, Trials
from echo_rt.config import ModelConfig
from echo_rt.device import model_context
from echo_rt.errors import BackendError

_ROUNDS = 15

# What a kind is tried on while there is no model; the head size is that of all of Wan's.
_PROBE = AttentionShapes(queries=64, keys=200, heads=2, head_dim=128)

_logger = logging.getLogger("echo_rt.attention")


@dataclass(frozen=True)
class Choice:
    """The attention and why it is this one.

    ``timings``: milliseconds of a call of each kind that was timed; ``rejected``: what spoke against each other one.
    """

    attention: Attention
    reason: str
    timings: Mapping[str, float] = field(default_factory=dict)
    rejected: Mapping[str, str] = field(default_factory=dict)


class Judge(Protocol):
    """What :class:`Trials` is to this module."""

    def error(self, attention: Attention) -> float: ...

    def stopwatch(self, attention: Attention) -> Callable[[], float]: ...


MakeJudge = Callable[[AttentionShapes, torch.device, torch.dtype], Judge]


def choose_attention(
    requested: str | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    shapes: AttentionShapes,
    cache: Path | None,
    kinds: Sequence[Kind] = KINDS,
    judge: MakeJudge = Trials,
) -> Choice:
    """The attention named ``requested``; None: on a GPU the fastest for ``shapes``, on a CPU torch's own.

    What is fastest is measured once and remembered in the file ``cache`` (None: nowhere) until the GPU, a library or
    the shapes change. A kind that computes something else than attention is never chosen. Waits for the device.
    Raises :class:`BackendError` for a name that is unknown or cannot be had here, and where nothing works.
    """
    search = _Search(device, dtype, shapes, kinds, judge)
    with model_context(device, dtype):
        if requested is not None:
            choice = search.requested(requested)
        elif device.type == "cuda":
            choice = search.fastest(cache)
        else:
            choice = _torchs_own(device, kinds)
    _logger.info("%s for %s: %s", choice.attention.name, shapes, choice.reason)
    return choice


def attentions(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    requested: str | None = None,
    *,
    cache: Path | None,
) -> tuple[Choice, Choice]:
    """The attention of a model over its KV buffer, as full as it gets, and over the text."""
    transformer = config.transformer
    over_cache = AttentionShapes(
        queries=config.tokens_per_block,
        keys=config.ring_begin + config.window.local_frames * config.tokens_per_frame,
        heads=transformer.num_heads,
        head_dim=transformer.head_dim,
    )
    over_text = dataclasses.replace(over_cache, keys=transformer.text_len)
    first, second = (
        choose_attention(requested, device=device, dtype=dtype, shapes=shapes, cache=cache)
        for shapes in (over_cache, over_text)
    )
    return first, second


def _torchs_own(device: torch.device, kinds: Sequence[Kind]) -> Choice:
    kind = next(kind for kind in kinds if kind.fused and device.type in kind.devices)
    return Choice(kind.load(), f"torch's own on a {device.type.upper()}")


class _WrongResultError(BackendError):
    """A library that computes something else than attention."""


@dataclass(frozen=True)
class _Search:
    """For an attention that computes ``shapes`` on ``device`` in ``dtype``."""

    device: torch.device
    dtype: torch.dtype
    shapes: AttentionShapes
    kinds: Sequence[Kind]
    make_judge: MakeJudge

    def judge(self) -> Judge:
        return self.make_judge(self.shapes, self.device, self.dtype)

    def requested(self, name: str) -> Choice:
        by_name = {kind.name: kind for kind in self.kinds}
        if name not in by_name:
            raise BackendError(f"attention must be one of {', '.join(by_name)}; got {name!r}")
        try:
            attention = self.load(by_name[name])
            if self.device.type == "cuda":
                self.check(self.judge(), attention)
        except BackendError as error:
            raise BackendError(f"attention {name!r} is not available: {error}") from error
        return Choice(attention, "asked for by name")

    def fastest(self, cache: Path | None) -> Choice:
        case = Case(machine_facts(self.device, self.kinds), plain(self.dtype), self.shapes)
        known = recall(cache, case) if cache is not None else None
        if known is not None and (attention := self.load_again(known.attention)) is not None:
            reason = f"{_summary(known)} (remembered in {cache})"
            return Choice(attention, reason, known.milliseconds, known.rejected)
        attentions, milliseconds, rejected = self.measure()
        winner = min(milliseconds, key=milliseconds.__getitem__)
        entry = Entry(case, winner, milliseconds, rejected)
        if cache is not None:
            remember(cache, entry)
        return Choice(attentions[winner], _summary(entry), milliseconds, rejected)

    def load(self, kind: Kind) -> Attention:
        """Raises :class:`BackendError`, whose message is the reason and the remedy alone."""
        if obstacle := kind.obstacle(self.device, self.dtype):
            raise BackendError(obstacle)
        return kind.load()

    def load_again(self, name: str) -> Attention | None:
        try:
            return self.load(next(kind for kind in self.kinds if kind.name == name))
        except (BackendError, StopIteration) as error:
            _logger.warning("%s was the fastest and is no longer there (%s): measured anew", name, error)
            return None

    def check(self, judge: Judge, attention: Attention) -> None:
        """Raises :class:`BackendError` unless ``attention`` computes the shapes, and rightly."""
        case = f"{self.shapes} in {plain(self.dtype)}"
        try:
            error = judge.error(attention)
        except torch.OutOfMemoryError:
            raise  # says nothing of the library
        except Exception as problem:  # whatever a library raises is the finding
            raise BackendError(f"it does not compute {case}: {first_line(problem)}; choose another") from problem
        bound = TOLERANCES[self.dtype]
        if error > bound:
            raise _WrongResultError(
                f"its result is wrong for {case}, by {error:.2g} where {bound:.2g} is the most; choose another"
            )

    def measure(self) -> tuple[dict[str, Attention], dict[str, float], dict[str, str]]:
        """What can be used, the median milliseconds of each, and what spoke against the others.

        Taken in turns: a clock that changes, or another's load, then meets all of them.
        """
        judge = self.judge()
        attentions: dict[str, Attention] = {}
        stopwatches: dict[str, Callable[[], float]] = {}
        rejected: dict[str, str] = {}
        # The one whose scores take gigabytes comes last: it is slow wherever another works.
        for kind in sorted(self.kinds, key=lambda kind: not kind.fused):
            if stopwatches and not kind.fused:
                rejected[kind.name] = "it holds all scores in memory: for where nothing else works"
                continue
            try:
                attention = self.load(kind)
                self.check(judge, attention)
                stopwatches[kind.name] = judge.stopwatch(attention)
                attentions[kind.name] = attention
            except torch.OutOfMemoryError:
                raise
            except BackendError as error:
                rejected[kind.name] = str(error)
                if isinstance(error, _WrongResultError):
                    _logger.warning("%s is not used: %s", kind.name, error)
            except Exception as problem:  # only the stopwatch is left
                rejected[kind.name] = f"it cannot be captured in a CUDA graph: {first_line(problem)}; choose another"
        if not stopwatches:
            reasons = ". ".join(f"{name}: {why}" for name, why in rejected.items())
            raise BackendError(f"no attention works on {self.device} for {self.shapes}. {reasons}")
        rounds = [{name: watch() for name, watch in stopwatches.items()} for _ in range(_ROUNDS)]
        milliseconds = {name: statistics.median(times[name] for times in rounds) for name in stopwatches}
        return attentions, milliseconds, rejected


def _summary(entry: Entry) -> str:
    times = sorted(entry.milliseconds.items(), key=lambda item: item[1])
    listed = ", ".join(f"{name} {time:.3f} ms" for name, time in times)
    what = "fastest" if len(times) > 1 else "the only one that works"
    return f"{what} on {entry.case.machine['gpu']}: {listed}"


def known_choices(device: torch.device, cache: Path | None, kinds: Sequence[Kind] = KINDS) -> Iterator[tuple[str, str]]:
    """What models on ``device`` are given as things are now, as far as is known without measuring: name and reason."""
    if device.type != "cuda":
        choice = _torchs_own(device, kinds)
        yield choice.attention.name, choice.reason
    elif cache is not None:
        machine = machine_facts(device, kinds)
        for entry in entries(cache):
            if entry.case.machine == machine:
                yield entry.attention, f"for {entry.case.shapes} in {entry.case.dtype}, {_summary(entry)}"


def available_attention(
    device: torch.device, kinds: Sequence[Kind] = KINDS, judge: MakeJudge = Trials
) -> dict[str, str]:
    """Name of a kind -> ``"available"``, or ``"why it is not; what to do"``. Each one is run on ``device``."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    search = _Search(device, dtype, _PROBE, kinds, judge)
    states = {}
    with model_context(device, dtype):
        judged = search.judge()
        for kind in kinds:
            try:
                search.check(judged, search.load(kind))
                states[kind.name] = "available"
            except BackendError as error:
                states[kind.name] = str(error)
    return states
