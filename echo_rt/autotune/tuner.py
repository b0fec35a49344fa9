"""The search for an implementation: by name, from the file of earlier measurements, or by measuring."""

from __future__ import annotations

import dataclasses
import logging
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch

from echo_rt.autotune.cache import Case, ChoicesFile, Entry, Shapes
from echo_rt.autotune.machine import Kind, machine_facts
from echo_rt.errors import BackendError
from echo_rt.utils.device import give_memory_back
from echo_rt.utils.process import free
from echo_rt.utils.wording import first_line, plain

# Largest relative error of an output against float64: a few roundings of the dtype, far from one term too few.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}

_ROUNDS = 15

AnyKind = TypeVar("AnyKind", bound=Kind)
Candidate = TypeVar("Candidate")
Judged = TypeVar("Judged", contravariant=True)


class Judge(Protocol[Judged]):
    """Tries candidates on the shapes of a search."""

    def error(self, candidate: Judged, /) -> float:
        """The largest relative error of its output; infinite for one of the wrong kind."""

    def stopwatch(self, candidate: Judged, /) -> Callable[[], float]:
        """What runs it and returns the milliseconds of a call; raises where it cannot be captured in a graph."""


@dataclass(frozen=True)
class Found(Generic[Candidate]):
    """What a search came to.

    ``timings``: milliseconds of a call of each kind that was timed; ``rejected``: what spoke against each other one.
    """

    candidate: Candidate
    reason: str
    timings: Mapping[str, float]
    rejected: Mapping[str, str]


class _WrongResultError(BackendError):
    """A library that computes something else."""


class _NoMemoryError(BackendError):
    """A library that found too little memory, which says more of what else was there than of the library."""


def _is_shortage(problem: Exception) -> bool:
    # What libraries beside torch's allocator say is of no type of its own.
    signs = ("out of memory", "ALLOC_FAILED")
    return isinstance(problem, torch.OutOfMemoryError) or any(sign in str(problem) for sign in signs)


@dataclass(frozen=True)
class Search(Generic[AnyKind, Candidate, Shapes]):
    """For one of ``kinds`` that computes ``shapes`` on ``device`` in ``dtype``.

    ``load`` makes of a kind what can be judged, or raises :class:`BackendError` with the reason and the remedy alone.
    ``reserve``: why a kind is for where nothing else works, or "".
    """

    file: ChoicesFile[Shapes]
    device: torch.device
    dtype: torch.dtype
    shapes: Shapes
    kinds: Sequence[AnyKind]
    load: Callable[[AnyKind], Candidate]
    reserve: Callable[[AnyKind], str]
    judge: Callable[[], Judge[Candidate]]
    rounds: int = _ROUNDS

    @property
    def subject(self) -> str:
        """What is searched for, in a word."""
        return self.file.subject

    def requested(self, name: str) -> Found[Candidate]:
        """The kind of this name, on a GPU checked. :class:`BackendError`, or torch's own for want of memory."""
        kind = self._named(name)
        try:
            return self._checked(kind)
        except BackendError as error:
            raise BackendError(f"{self.subject} {name!r} is not available: {error}") from error

    def requested_if_able(self, name: str) -> Found[Candidate] | str:
        """The same where it computes the shapes; elsewhere why it does not. The errors: an unknown name, no memory."""
        kind = self._named(name)
        try:
            return self._checked(kind)
        except BackendError as error:
            return str(error).partition("; ")[0]

    def prescribed(self, name: str) -> Found[Candidate]:
        """The kind of this name, by which the video of a snapshot was made. Raises :class:`BackendError`."""
        try:
            found = self.requested(name)
        except BackendError as error:
            raise BackendError(
                f"{error}. The snapshot's video was made with it; ask for another by name to go on, rounded otherwise"
            ) from error
        return dataclasses.replace(found, reason="as in the snapshot")

    def fastest(self, cache: Path | None) -> Found[Candidate]:
        """The one that ``cache`` remembers, or that a measurement finds. :class:`BackendError` if none works.

        ``torch.OutOfMemoryError`` where with more memory one might: then a smaller model may be loaded.
        """
        case = Case(machine_facts(self.device, self.kinds), plain(self.dtype), self.shapes)
        known = self.file.recall(cache, case) if cache is not None else None
        if known is not None and (candidate := self._load_again(known.winner)) is not None:
            reason = f"{summary(known)} (remembered in {cache})"
            return Found(candidate, reason, known.milliseconds, known.rejected)
        candidates, milliseconds, rejected, lasts = self._measure()
        winner = min(milliseconds, key=milliseconds.__getitem__)
        entry = Entry(case, winner, milliseconds, rejected)
        if cache is not None and lasts:
            self.file.remember(cache, entry)
        return Found(candidates[winner], summary(entry), milliseconds, rejected)

    def available(self) -> dict[str, str]:
        """Name of a kind -> ``"available"``, or ``"why it is not; what to do"``. Each one is run."""
        judge = self.judge()
        states = {}
        for kind in self.kinds:
            try:
                self.check(judge, self.load(kind))
                states[kind.name] = "available"
            except BackendError as error:
                states[kind.name] = str(error)
        return states

    def check(self, judge: Judge[Candidate], candidate: Candidate) -> None:
        """Raises :class:`BackendError` unless ``candidate`` computes the shapes, and rightly."""
        case = f"{self.shapes} in {plain(self.dtype)}"
        try:
            error = judge.error(candidate)
        except Exception as problem:  # whatever a library raises is the finding
            if _is_shortage(problem):
                raise self._no_memory(problem) from None
            raise BackendError(f"it does not compute {case}: {first_line(problem)}; choose another") from problem
        bound = TOLERANCES[self.dtype]
        if error > bound:
            raise _WrongResultError(
                f"its result is wrong for {case}, by {error:.2g} where {bound:.2g} is the most; choose another"
            )

    def _named(self, name: str) -> AnyKind:
        by_name = {kind.name: kind for kind in self.kinds}
        if not isinstance(name, str) or name not in by_name:
            raise BackendError(f"{self.subject} must be one of {', '.join(by_name)}; got {name!r}")
        return by_name[name]

    def _checked(self, kind: AnyKind) -> Found[Candidate]:
        """``kind``, asked for by name; :class:`BackendError` has no more than the reason and the remedy."""
        try:
            candidate = self.load(kind)
            if self.device.type == "cuda":
                self.check(self.judge(), candidate)
        except _NoMemoryError as error:
            raise torch.OutOfMemoryError(f"{self.subject} {kind.name!r}: {error}") from None
        return Found(candidate, "asked for by name", {}, {})

    def _load_again(self, name: str) -> Candidate | None:
        try:
            return self.load(next(kind for kind in self.kinds if kind.name == name))
        except (BackendError, StopIteration) as error:
            self._warn("%s was the fastest and is no longer there (%s): measured anew", name, error)
            return None

    def _no_memory(self, shortage: Exception) -> _NoMemoryError:
        """What is said of a candidate for which memory did not suffice; what it had taken is there for the next."""
        free(shortage)
        give_memory_back(self.device)
        return _NoMemoryError(
            f"it runs out of memory for {self.shapes} in {plain(self.dtype)}: {first_line(shortage)}; free some, or "
            "choose another"
        )

    def _measure(self) -> tuple[dict[str, Candidate], dict[str, float], dict[str, str], bool]:
        """What can be used, the median milliseconds of each, what spoke against the others, and whether that lasts.

        Taken in turns: a clock that changes, or another's load, then meets all of them.
        """
        judge = self.judge()
        candidates: dict[str, Candidate] = {}
        stopwatches: dict[str, Callable[[], float]] = {}
        rejected: dict[str, str] = {}
        lasts = True
        for kind in sorted(self.kinds, key=lambda kind: bool(self.reserve(kind))):
            if stopwatches and (why := self.reserve(kind)):
                rejected[kind.name] = why
                continue
            try:
                candidates[kind.name], stopwatches[kind.name] = self._tried(judge, kind)
            except BackendError as error:
                rejected[kind.name] = str(error)
                if isinstance(error, _WrongResultError):
                    self._warn("%s is not used: %s", kind.name, error)
                elif isinstance(error, _NoMemoryError):
                    lasts = False
                    self._warn("%s is not used: %s; %s is measured anew next time", kind.name, error, self.subject)
        if not stopwatches:
            reasons = ". ".join(f"{name}: {why}" for name, why in rejected.items())
            kind_of_error = BackendError if lasts else torch.OutOfMemoryError
            raise kind_of_error(f"no {self.subject} works on {self.device} for {self.shapes}. {reasons}")
        rounds = [{name: watch() for name, watch in stopwatches.items()} for _ in range(self.rounds)]
        milliseconds = {name: statistics.median(times[name] for times in rounds) for name in stopwatches}
        return candidates, milliseconds, rejected, lasts

    def _tried(self, judge: Judge[Candidate], kind: AnyKind) -> tuple[Candidate, Callable[[], float]]:
        """What is made of ``kind``, and its stopwatch; :class:`BackendError` says why there is none."""
        candidate = self.load(kind)
        self.check(judge, candidate)
        try:
            return candidate, judge.stopwatch(candidate)
        except Exception as problem:
            if _is_shortage(problem):
                raise self._no_memory(problem) from None
            raise BackendError(
                f"it cannot be captured in a CUDA graph: {first_line(problem)}; choose another"
            ) from problem

    def _warn(self, message: str, *values: object) -> None:
        logging.getLogger(f"echo_rt.{self.subject}").warning(message, *values)


def summary(entry: Entry[Shapes]) -> str:
    """Why it won."""
    times = sorted(entry.milliseconds.items(), key=lambda item: item[1])
    listed = ", ".join(f"{name} {time:.3f} ms" for name, time in times)
    what = "fastest" if len(times) > 1 else "the only one that works"
    return f"{what} on {entry.case.machine['gpu']}: {listed}"


def known_entries(
    file: ChoicesFile[Shapes], path: Path, device: torch.device, kinds: Sequence[Kind]
) -> Iterator[Entry[Shapes]]:
    """What ``path`` remembers of this machine as it is now."""
    machine = machine_facts(device, kinds)
    for entry in file.entries(path):
        if entry.case.machine == machine:
            yield entry
