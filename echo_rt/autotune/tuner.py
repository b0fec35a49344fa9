"""Selection of an implementation by name, from the cache, or by measuring."""

from __future__ import annotations

import importlib.metadata
import logging
import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from echo_rt.autotune.cache import Cache, Case, Entry, Shapes, machine_facts
from echo_rt.errors import BackendError, not_one_of
from echo_rt.utils.device import FLOAT8, capture, give_memory_back, model_context
from echo_rt.utils.process import free
from echo_rt.utils.wording import first_line, plain

# Largest relative error against float64: a few roundings of the dtype, far below the error of a missing term.
# In float8 that of the softmax's weights: at most 2^-4 of each, on either side, and keys share it.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2, FLOAT8: 6e-2}
HALF = (torch.bfloat16, torch.float16)
ANY_DTYPE = (*HALF, torch.float32)

_WARM_UPS = 3


class Named(Protocol):
    @property
    def name(self) -> str: ...


Loaded = TypeVar("Loaded", bound=Named)
Found = TypeVar("Found", bound=Named)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Candidate(ABC, Generic[Loaded, Shapes]):
    """An implementation and what is known of it without trying.

    ``devices`` and ``dtypes`` that it supports; ``quick_on_cpu``: dtypes in which it is the fastest on a CPU, where
    nothing is measured; ``distribution``: the package that it comes in, if not torch; ``build``: another dependency.
    """

    name: str
    _: KW_ONLY
    devices: tuple[str, ...] = ("cuda", "cpu")
    dtypes: tuple[torch.dtype, ...] = ANY_DTYPE
    quick_on_cpu: tuple[torch.dtype, ...] = ()
    distribution: str | None = None
    build: str | None = None

    @abstractmethod
    def load(self) -> Loaded:
        """Return the implementation; raise :class:`BackendError` that says why it is missing and how to get it."""

    @abstractmethod
    def obstacle(self, device: torch.device, dtype: torch.dtype, shapes: Shapes) -> str:
        """Return ``"why it cannot compute them; what to choose"`` as far as known without trying, or ""."""

    def reserve(self, shapes: Shapes) -> str:
        """Return why it is a last resort, or ""."""
        return ""

    def version(self) -> str | None:
        """Return the version of what may change while torch and echo-rt stay the same."""
        try:
            return importlib.metadata.version(self.distribution) if self.distribution else self.build
        except importlib.metadata.PackageNotFoundError:
            return None

    def mismatch(self, device: torch.device, dtype: torch.dtype) -> str:
        """Return why it does not compute on ``device`` in ``dtype``, or ""."""
        if device.type not in self.devices:
            return f"it runs on {' and '.join(self.devices)}, the device is {device}"
        if dtype not in self.dtypes:
            return f"it computes in {' or '.join(map(plain, self.dtypes))}, the model's dtype is {plain(dtype)}"
        return ""


class Check(ABC, Generic[Loaded]):
    """Random inputs on which implementations are checked and timed.

    ``inputs``: the tensors that a call reads. ``calls`` are captured in one graph, as the time between two events
    includes the launch of the graph. Graphs run one after the other, so they share one stream and one memory pool.
    """

    inputs: tuple[Tensor, ...]
    calls: int

    def __init__(self, device: torch.device, dtype: torch.dtype, out_size: tuple[int, ...]) -> None:
        self.device, self.dtype, self.out_size = device, dtype, out_size
        self._generator = torch.Generator(device).manual_seed(0)

    @abstractmethod
    def call(self, implementation: Loaded, /) -> Callable[[], Tensor]:
        """Return a function that runs it on the inputs."""

    @abstractmethod
    def errors(self, out: Tensor) -> Tensor:
        """Return the relative errors of parts of an output."""

    def error(self, implementation: Loaded, /) -> float:
        """Return the largest relative error of its output; infinite for an output of another size or dtype.

        On a GPU also that of a replay, over other inputs than its graph was captured from. A library that launches on
        another stream than the current one leaves kernels out of the graph, without an error: a replay then returns
        what memory held, or what the capture computed. Raises where it cannot be captured.
        """
        with current(self.device):
            call = self.call(implementation)
            error = self._error(call())
            return max(error, self._error(self.replayed(call))) if self.device.type == "cuda" else error

    def _error(self, out: Tensor) -> float:
        if out.shape != self.out_size or out.dtype != self.dtype:
            return math.inf
        # Every comparison with NaN is false, so NaN becomes infinity.
        return float(self.errors(out).nan_to_num(nan=math.inf).max())

    def replayed(self, call: Callable[[], Tensor]) -> Tensor:
        """Return the output of a replay over the inputs, captured over zeros, where memory held NaN."""
        values = [tensor.clone() for tensor in self.inputs]
        for tensor in self.inputs:
            tensor.zero_()
        try:
            graph, outs = self._captured(call)
        finally:
            for tensor, own in zip(self.inputs, values, strict=True):
                tensor.copy_(own)
        out = outs[-1].fill_(math.nan)
        graph.replay()
        return out

    def normal(self, *size: int) -> Tensor:
        """Draw normal numbers."""
        return torch.randn(size, generator=self._generator, device=self.device, dtype=self.dtype)

    def stopwatch(self, implementation: Loaded, /) -> Callable[[], float]:
        """Return a function that replays it from a CUDA graph, as the steady state does, and returns ms per call.

        Overhead in Python does not count. Raises where it cannot be captured.
        """
        with current(self.device):
            graph, _ = self._captured(self.call(implementation))

        def milliseconds() -> float:
            with current(self.device):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                graph.replay()
                end.record()
                end.synchronize()
                return float(start.elapsed_time(end)) / self.calls

        return milliseconds

    def _captured(self, call: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
        """Return a graph of warmed-up calls, and their outputs."""
        graph, stream, outs = torch.cuda.CUDAGraph(), self._stream, list[Tensor]()
        stream.wait_stream(torch.cuda.current_stream(self.device))
        # Around the capture too: after a failed one torch leaves the capture stream current.
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                call()
            try:
                capture(graph, lambda: outs.extend(call() for _ in range(self.calls)), stream=stream, pool=self._pool)
            except BaseException:
                del self._pool  # see capture
                raise
        return graph, outs

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    @cached_property
    def _pool(self) -> Any:
        return torch.cuda.graph_pool_handle()


@dataclass(frozen=True)
class Selection(Generic[Loaded]):
    """A selected implementation and the reason.

    ``timings``: milliseconds per call of each candidate that was timed; ``rejected``: why each other one was not;
    ``by_name``: whether the user named it.
    """

    implementation: Loaded
    reason: str
    timings: Mapping[str, float] = field(default_factory=dict)
    rejected: Mapping[str, str] = field(default_factory=dict)
    by_name: bool = False

    @property
    def name(self) -> str:
        return self.implementation.name


class ObstacleError(BackendError):
    """An implementation that is known not to support the shapes here."""


class _WrongResultError(BackendError):
    """An implementation with a wrong result."""


class _NoMemoryError(BackendError):
    """Too little memory, which may be due to other programs, not to the implementation."""


@dataclass(frozen=True)
class Tuner(Generic[Loaded, Shapes]):
    """Selects one of ``candidates`` for ``shapes`` on ``device`` in ``dtype``.

    ``check`` makes the inputs to try them on.
    """

    cache: Cache[Shapes]
    device: torch.device
    dtype: torch.dtype
    shapes: Shapes
    candidates: Sequence[Candidate[Loaded, Shapes]]
    check: Callable[[], Check[Loaded]]
    rounds: int = 15

    def select(
        self,
        requested: str | None = None,
        prescribed: str | None = None,
        *,
        cache: Path | None,
        forgive: tuple[type[BackendError], ...] = (),
    ) -> Selection[Loaded]:
        """Select the candidate ``requested``, else the one ``prescribed`` by a snapshot, else the fastest.

        On a CPU the fastest is torch's own. A named candidate is checked on a GPU, but not timed. ``forgive``: errors
        of a requested one after which the selection goes on without it; the reason tells. The fastest is measured once
        and cached in the file ``cache`` (None: not cached) until the GPU, a library or the shapes change. A candidate
        with a wrong result is never selected; one that runs out of memory is skipped, and then the result is not
        cached. Synchronizes. Raises :class:`BackendError` for a name that is unknown or not available here, and where
        nothing works; ``torch.OutOfMemoryError`` where that is for lack of memory.
        """
        selection, unable = None, ""
        with model_context(self.device, self.dtype):
            if requested is not None:
                candidate = self._named(requested)
                try:
                    selection = Selection(self._checked(candidate, forgive), "asked for by name", by_name=True)
                except forgive as error:
                    unable = f"; not {requested}: {str(error).partition('; ')[0]}"
            if selection is None and prescribed is not None:
                selection = Selection(self._prescribed(prescribed), "as in the snapshot")
            elif selection is None:
                selection = self._fastest(cache) if self.device.type == "cuda" else self.default()
        selection = replace(selection, reason=selection.reason + unable)
        give_memory_back(self.device)  # the pool of the graphs
        self._logger.debug("%s for %s: %s", selection.name, self.shapes, selection.reason)
        return selection

    def available(self) -> dict[str, str]:
        """Run each candidate; return name -> ``"available"``, or ``"why it is not; what to do"``."""
        states = {}
        with model_context(self.device, self.dtype):
            check = self.check()
            for candidate in self.candidates:
                try:
                    self._require_right(self._load(candidate), check)
                    states[candidate.name] = "available"
                except BackendError as error:
                    states[candidate.name] = str(error)
        return states

    def known(self, cache: Path | None) -> Iterator[tuple[str, str]]:
        """Yield name and reason of what would be selected now, for any shapes, as far as known without measuring."""
        if self.device.type != "cuda":
            selection = self.default()
            yield selection.name, selection.reason
        elif cache is not None:
            machine = self._machine()
            for entry in self.cache.entries(cache):
                if entry.case.machine == machine:
                    yield entry.winner, f"for {entry.case.shapes} in {entry.case.dtype}, {entry}"

    def default(self) -> Selection[Loaded]:
        """Select without measuring: the candidate known to be fast in the dtype, else the first that works."""
        case = self.device, self.dtype, self.shapes
        able = [one for one in self.candidates if not one.obstacle(*case) and not one.reserve(self.shapes)]
        candidate = next((one for one in able if self.dtype in one.quick_on_cpu), able[0])
        return Selection(candidate.load(), f"torch's own on a {self.device.type.upper()}")

    @property
    def _logger(self) -> logging.Logger:
        return logging.getLogger(f"echo_rt.{self.cache.subject}")

    @property
    def _case(self) -> str:
        return f"{self.shapes} in {plain(self.dtype)}"

    def _machine(self) -> dict[str, Any]:
        return machine_facts(self.device, {candidate.name: candidate.version() for candidate in self.candidates})

    def _prescribed(self, name: str) -> Loaded:
        try:
            return self._checked(self._named(name))
        except BackendError as error:
            remedy = "ask for another by name to go on, rounded otherwise"
            raise BackendError(f"{error}. The snapshot's video was made with it; {remedy}") from error

    def _fastest(self, path: Path | None) -> Selection[Loaded]:
        case = Case(self._machine(), plain(self.dtype), self.shapes)
        if path is not None and (known := self.cache.recall(path, case)) is not None:
            try:
                loaded = self._load(self._named(known.winner))
                return Selection(loaded, f"{known} (remembered in {path})", known.milliseconds, known.rejected)
            except BackendError as error:
                gone = "%s was the fastest and is no longer there (%s): measured anew"
                self._logger.warning(gone, known.winner, error)
        loaded, entry, lasts = self._measure(case)
        if path is not None and lasts:
            self.cache.remember(path, entry)
        return Selection(loaded, str(entry), entry.milliseconds, entry.rejected)

    def _measure(self, case: Case[Shapes]) -> tuple[Loaded, Entry[Shapes], bool]:
        """Return the fastest, all measurements, and whether to cache them: not if memory was short.

        Candidates are timed in turns, so that a changing clock or load affects all of them.
        """
        check, subject, lasts = self.check(), self.cache.subject, True
        loaded: dict[str, Loaded] = {}
        watches: dict[str, Callable[[], float]] = {}
        rejected: dict[str, str] = {}
        for candidate in sorted(self.candidates, key=lambda candidate: bool(candidate.reserve(self.shapes))):
            name = candidate.name
            if watches and (why := candidate.reserve(self.shapes)):
                rejected[name] = why
                continue
            try:
                loaded[name] = self._load(candidate)
                self._require_right(loaded[name], check)
                watches[name] = self._attempt(check.stopwatch, loaded[name], "it cannot be captured in a CUDA graph")
            except BackendError as error:
                rejected[name], short = str(error), isinstance(error, _NoMemoryError)
                lasts &= not short
                if short or isinstance(error, _WrongResultError):
                    anew = f"; {subject} is measured anew next time" if short else ""
                    self._logger.warning("%s is not used: %s%s", name, error, anew)
        if not watches:
            reasons = ". ".join(f"{name}: {why}" for name, why in rejected.items())
            kind_of_error = BackendError if lasts else torch.OutOfMemoryError
            raise kind_of_error(f"no {subject} works on {self.device} for {self.shapes}. {reasons}")
        rounds = [[watch() for watch in watches.values()] for _ in range(self.rounds)]
        milliseconds = dict(zip(watches, map(statistics.median, zip(*rounds, strict=True)), strict=True))
        winner = min(milliseconds, key=milliseconds.__getitem__)
        return loaded[winner], Entry(case, winner, milliseconds, rejected), lasts

    def _named(self, name: str) -> Candidate[Loaded, Shapes]:
        return find(self.cache.subject, name, self.candidates)

    def _load(self, candidate: Candidate[Loaded, Shapes]) -> Loaded:
        if why := candidate.obstacle(self.device, self.dtype, self.shapes):
            raise ObstacleError(why)
        return candidate.load()

    def _checked(self, candidate: Candidate[Loaded, Shapes], forgive: tuple[type[BackendError], ...] = ()) -> Loaded:
        """Load and check a named candidate; an error in ``forgive`` is raised as it is."""
        named = f"{self.cache.subject} {candidate.name!r}"
        try:
            loaded = self._load(candidate)
            if self.device.type == "cuda":
                self._require_right(loaded, self.check())
            return loaded
        except _NoMemoryError as error:
            raise torch.OutOfMemoryError(f"{named}: {error}") from None
        except BackendError as error:
            if isinstance(error, forgive):
                raise
            raise BackendError(f"{named} is not available: {error}") from error

    def _require_right(self, loaded: Loaded, check: Check[Loaded]) -> None:
        """Raise :class:`BackendError` unless a candidate computes the shapes correctly."""
        bound = TOLERANCES[self.dtype]
        error = self._attempt(check.error, loaded, f"it does not compute {self._case}")
        if error > bound:
            raise _WrongResultError(
                f"its result is wrong for {self._case}, by {error:.2g} where {bound:.2g} is the most; choose another"
            )

    def _attempt(self, work: Callable[[Loaded], Result], loaded: Loaded, complaint: str) -> Result:
        """Return what ``work`` returns, or raise :class:`BackendError` for what a library raises; free its memory."""
        try:
            return work(loaded)
        except Exception as problem:
            # Libraries beside torch's allocator have no exception type for a shortage.
            signs = ("out of memory", "ALLOC_FAILED")
            if not isinstance(problem, torch.OutOfMemoryError) and not any(sign in str(problem) for sign in signs):
                raise BackendError(f"{complaint}: {first_line(problem)}; choose another") from problem
            free(problem)
            give_memory_back(self.device)
            short = f"it runs out of memory for {self._case}: {first_line(problem)}"
            raise _NoMemoryError(f"{short}; free some, or choose another") from None


def find(subject: str, name: object, candidates: Sequence[Found]) -> Found:
    """Return the first of ``candidates`` with this name; raise :class:`BackendError` where there is none."""
    found = next((candidate for candidate in candidates if candidate.name == name), None)
    if found is None:
        raise BackendError(not_one_of(subject, dict.fromkeys(candidate.name for candidate in candidates), name))
    return found


def current(device: torch.device) -> torch.cuda.device:
    """Make ``device`` the current GPU, whose properties libraries ask for; on a CPU this changes nothing."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
