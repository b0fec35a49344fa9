"""Which way each of the decoder's convolutions is computed, and why."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from echo_rt.autotune.tuner import Found, Judge, Search, known_entries, summary
from echo_rt.convolution.kinds import Kind
from echo_rt.convolution.remembered import FILE
from echo_rt.convolution.shapes import ConvolutionShape
from echo_rt.convolution.trials import Trials
from echo_rt.errors import BackendError
from echo_rt.utils.device import give_memory_back, model_context

_ROUNDS = 7

# What kinds are tried on while there is no model.
_PROBES = (
    ConvolutionShape(frames=4, height=12, width=20, channels=32, out_channels=32, kernel=(3, 3, 3)),
    ConvolutionShape(frames=2, height=6, width=10, channels=32, out_channels=16, kernel=(1, 3, 3), enlarge=True),
)

_logger = logging.getLogger("echo_rt.convolution")


@dataclass(frozen=True)
class Choice:
    """The kind and why it is this one.

    ``timings``: milliseconds of a call of each kind that was timed; ``rejected``: what spoke against each other one;
    ``by_name``: whether it was asked for.
    """

    kind: Kind
    reason: str
    timings: Mapping[str, float] = field(default_factory=dict)
    rejected: Mapping[str, str] = field(default_factory=dict)
    by_name: bool = False


MakeJudge = Callable[[ConvolutionShape, torch.device, torch.dtype], Judge[Kind]]


def choose_convolutions(
    requested: str | None,
    shapes: Iterable[ConvolutionShape],
    *,
    device: torch.device,
    dtype: torch.dtype,
    cache: Path | None,
    kinds: Sequence[Kind],
    prescribed: Mapping[ConvolutionShape, str] | None = None,
    judge: MakeJudge = Trials,
) -> dict[ConvolutionShape, Choice]:
    """A way to compute each of ``shapes``: on a GPU the fastest of ``kinds``, on a CPU torch's own.

    ``requested``: the name of the one to take wherever it works, or several with commas between, no two of them for
    the same convolutions. ``prescribed``: the names, where none is asked for, of the snapshot to go on with, as far as
    it has these shapes. What is fastest is measured once and remembered in the file ``cache`` (None: nowhere) until the
    GPU, a library or the backend change. What computes something else is never chosen; what runs out of memory is left
    out, and the outcome not remembered. Waits for the device.
    Raises :class:`BackendError` for a name that is unknown or cannot be had here, and where nothing works; where that
    is for want of memory, ``torch.OutOfMemoryError``.
    """
    shapes = list(dict.fromkeys(shapes))
    wanted = _wanted(requested, kinds)
    for name in wanted:
        _require_use(name, shapes, kinds, device, dtype)
    choices: dict[ConvolutionShape, Choice] = {}
    with model_context(device, dtype):
        for shape in shapes:
            family = _family(kinds, enlarges=shape.enlarge)
            search = _search(device, dtype, shape, family, judge)
            named = next((kind for kind in family if kind.name in wanted), None)
            choices[shape] = _choice(search, named, (prescribed or {}).get(shape), cache)
            _logger.info("%s for %s: %s", choices[shape].kind.name, shape, choices[shape].reason)
            give_memory_back(device)  # graphs have kept memory of the shape's own
    return choices


def _require_use(
    name: str, shapes: Sequence[ConvolutionShape], kinds: Sequence[Kind], device: torch.device, dtype: torch.dtype
) -> None:
    """Raises :class:`BackendError` where what was asked for works for none of ``shapes`` that it could be for."""
    obstacles = [
        kind.obstacle(device, dtype, shape)
        for shape in shapes
        for kind in _family(kinds, enlarges=shape.enlarge)
        if kind.name == name
    ]
    if obstacles and all(obstacles):
        raise BackendError(f"convolution {name!r} is not available: {obstacles[0]}")


def _choice(
    search: Search[Kind, Kind, ConvolutionShape], wanted: Kind | None, prescribed: str | None, cache: Path | None
) -> Choice:
    obstacle = None if wanted is None else wanted.obstacle(search.device, search.dtype, search.shapes)
    by_name = wanted is not None and obstacle is None
    if wanted is not None and obstacle is None:
        found = search.requested(wanted.name)
    elif prescribed is not None:
        found = search.prescribed(prescribed)
    elif search.device.type == "cuda":
        found = search.fastest(cache)
    else:
        found = Found(*_torchs_own(search.kinds, search.device, search.dtype, search.shapes), {}, {})
    not_that = f"; not {wanted.name}: {obstacle.partition('; ')[0]}" if wanted and obstacle else ""
    return Choice(found.candidate, found.reason + not_that, found.timings, found.rejected, by_name=by_name)


def _wanted(requested: str | None, kinds: Sequence[Kind]) -> list[str]:
    names = [] if requested is None else [name.strip() for name in requested.split(",")]
    known = list(dict.fromkeys(kind.name for kind in kinds))
    for name in names:
        if name not in known:
            raise BackendError(f"convolution must be one of {', '.join(known)}; got {name!r}")
    for enlarges in (False, True):
        rivals = [kind.name for kind in _family(kinds, enlarges=enlarges) if kind.name in names]
        if len(rivals) > 1:
            raise BackendError(f"convolution {requested!r}: expected one of {' and '.join(rivals)}, got both")
    return names


def _family(kinds: Sequence[Kind], *, enlarges: bool) -> list[Kind]:
    return [kind for kind in kinds if kind.enlarges == enlarges]


def _search(
    device: torch.device, dtype: torch.dtype, shape: ConvolutionShape, family: Sequence[Kind], judge: MakeJudge
) -> Search[Kind, Kind, ConvolutionShape]:
    def load(kind: Kind) -> Kind:
        if obstacle := kind.obstacle(device, dtype, shape):
            raise BackendError(obstacle)
        return kind

    def reserve(kind: Kind) -> str:
        return kind.reserve

    return Search(FILE, device, dtype, shape, family, load, reserve, partial(judge, shape, device, dtype), _ROUNDS)


def _torchs_own(
    family: Sequence[Kind], device: torch.device, dtype: torch.dtype, shape: ConvolutionShape
) -> tuple[Kind, str]:
    """The one that is known to be quick, else the first that works; and why it is taken."""
    possible = [kind for kind in family if kind.obstacle(device, dtype, shape) is None]
    kind = next((kind for kind in possible if dtype in kind.quick_on_cpu), possible[0])
    return kind, f"torch's own on a {device.type.upper()}"


def known_choices(device: torch.device, cache: Path | None, kinds: Sequence[Kind]) -> Iterator[tuple[str, str]]:
    """What decoders on ``device`` are given as things are now, as far as is known unmeasured: name and reason."""
    for probe in _PROBES:
        family = _family(kinds, enlarges=probe.enlarge)
        if device.type != "cuda":
            kind, reason = _torchs_own(family, device, torch.float32, probe)
            yield kind.name, reason
        elif cache is not None:
            for entry in known_entries(FILE, cache, device, family):
                yield entry.winner, f"for {entry.case.shapes} in {entry.case.dtype}, {summary(entry)}"


def available_convolutions(device: torch.device, kinds: Sequence[Kind], judge: MakeJudge = Trials) -> dict[str, str]:
    """Name of a kind -> ``"available"``, or ``"why it is not; what to do"``. Each one is run on ``device``."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    states: dict[str, str] = {}
    with model_context(device, dtype):
        for probe in _PROBES:
            search = _search(device, dtype, probe, _family(kinds, enlarges=probe.enlarge), judge)
            for name, state in search.available().items():
                # One name of two families, said once where the same holds for both.
                states[name if states.get(name, state) == state else f"{name} (enlarging)"] = state
    return states
