"""Autotuning: an implementation by name, from the cache, or the fastest that is right by measuring."""

from __future__ import annotations

import logging
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch

from echo_rt.autotune.cache import Cache, Case, Entry, Shapes, machine_facts
from echo_rt.errors import BackendError
from echo_rt.utils.device import capture, give_memory_back, model_context
from echo_rt.utils.failed_frames import free
from echo_rt.utils.wording import first_line, plain

# Largest relative error of an output against float64: a few roundings of the dtype, far from one term too few.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
HALF = (torch.bfloat16, torch.float16)
ANY_DTYPE = (*HALF, torch.float32)

_WARM_UPS = 3


class Named(Protocol):
    @property
    def name(self) -> str: ...


Loaded = TypeVar("Loaded", bound=Named)
Loaded_contra = TypeVar("Loaded_contra", contravariant=True)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Candidate(ABC, Generic[Loaded, Shapes]):
    """An implementation and what is known of it before it is tried.

    ``devices`` and ``dtypes`` it computes on and in; ``quick_on_cpu``: dtypes in which it is the quickest on a CPU,
    where nothing is measured; ``build``: what it depends on beside torch and echo-rt.
    """

    name: str
    _: KW_ONLY
    devices: tuple[str, ...] = ("cuda", "cpu")
    dtypes: tuple[torch.dtype, ...] = ANY_DTYPE
    quick_on_cpu: tuple[torch.dtype, ...] = ()
    build: str | None = None

    @abstractmethod
    def load(self) -> Loaded:
        """The implementation; raises :class:`BackendError` that says why it is not there and how to get it."""

    @abstractmethod
    def obstacle(self, device: torch.device, dtype: torch.dtype, shapes: Shapes) -> str:
        """``"why it cannot compute them; what to choose"`` as far as is known untried, or ""."""

    def reserve(self, shapes: Shapes) -> str:
        """Why it is tried only where nothing else works, or ""."""
        return ""

    def version(self) -> str | None:
        """What of it may change while torch and echo-rt stay the same."""
        return self.build

    def mismatch(self, device: torch.device, dtype: torch.dtype) -> str:
        """Why it does not compute on ``device`` in ``dtype``, or ""."""
        if device.type not in self.devices:
            return f"it runs on {' and '.join(self.devices)}, the device is {device}"
        if dtype not in self.dtypes:
            return f"it computes in {' or '.join(map(plain, self.dtypes))}, the model's dtype is {plain(dtype)}"
        return ""


class Check(Protocol[Loaded_contra]):
    """Runs implementations on random inputs of some shapes."""

    def error(self, implementation: Loaded_contra, /) -> float:
        """The largest relative error of its output; infinite for an output of another shape or dtype."""

    def stopwatch(self, implementation: Loaded_contra, /) -> Callable[[], float]:
        """A function that runs it and returns the milliseconds per call; raises where it cannot be captured."""


@dataclass(frozen=True)
class Selection(Generic[Loaded]):
    """An implementation and why it is this one.

    ``timings``: milliseconds per call of each candidate that was timed; ``rejected``: what spoke against each other
    one; ``by_name``: whether it was asked for.
    """

    implementation: Loaded
    reason: str
    timings: Mapping[str, float] = field(default_factory=dict)
    rejected: Mapping[str, str] = field(default_factory=dict)
    by_name: bool = False

    @property
    def name(self) -> str:
        return self.implementation.name

    # What users of runtime.attention and runtime.convolutions call it.
    @property
    def attention(self) -> Loaded:
        return self.implementation

    @property
    def kind(self) -> Loaded:
        return self.implementation


class ObstacleError(BackendError):
    """An implementation that is known not to compute the shapes here."""


class _WrongResultError(BackendError):
    """An implementation that computes something else."""


class _NoMemoryError(BackendError):
    """Too little memory, which says more of what else was there than of the implementation."""


@dataclass(frozen=True)
class Tuner(Generic[Loaded, Shapes]):
    """Selects one of ``candidates`` that computes ``shapes`` on ``device`` in ``dtype``.

    ``check`` makes what tries them; ``removed``: why candidates of earlier versions are gone and what to choose.
    """

    cache: Cache[Shapes]
    device: torch.device
    dtype: torch.dtype
    shapes: Shapes
    candidates: Sequence[Candidate[Loaded, Shapes]]
    check: Callable[[], Check[Loaded]]
    rounds: int = 15
    removed: Mapping[str, str] = field(default_factory=dict)

    def select(
        self,
        requested: str | None,
        prescribed: str | None,
        path: Path | None,
        forgive: type[BackendError] | tuple[()] = (),
    ) -> Selection[Loaded]:
        """The candidate named ``requested``, else ``prescribed`` by a snapshot, else the fastest; on a CPU torch's own.

        One that is named is checked on a GPU, but not timed. ``path``: the file that remembers the fastest, or None.
        ``forgive``: the errors of a requested one after which it goes on as if nothing had been requested, and the
        reason says why. Waits for the device. Raises :class:`BackendError` for a name that is unknown or cannot be
        had, and where nothing works; where that is for want of memory, ``torch.OutOfMemoryError``.
        """
        with model_context(self.device, self.dtype):
            selection = self._select(requested, prescribed, path, forgive)
        give_memory_back(self.device)  # graphs have kept memory of their own
        self._logger.info("%s for %s: %s", selection.name, self.shapes, selection.reason)
        return selection

    def available(self) -> dict[str, str]:
        """Name of a candidate -> ``"available"``, or ``"why it is not; what to do"``. Each one is run."""
        states = {}
        with model_context(self.device, self.dtype):
            check = self.check()
            for candidate in self.candidates:
                try:
                    self._require_right(check, self._load(candidate))
                    states[candidate.name] = "available"
                except BackendError as error:
                    states[candidate.name] = str(error)
        return states

    def known(self, path: Path | None) -> Iterator[tuple[str, str]]:
        """Name and reason of what is selected as things are now, for any shapes, as far as is known unmeasured."""
        if self.device.type != "cuda":
            selection = self.default()
            yield selection.name, selection.reason
        elif path is not None:
            machine = machine_facts(self.device, self.candidates)
            for entry in self.cache.entries(path):
                if entry.case.machine == machine:
                    yield entry.winner, f"for {entry.case.shapes} in {entry.case.dtype}, {entry}"

    def default(self) -> Selection[Loaded]:
        """Torch's own where nothing is measured: the one known to be quick in the dtype, else the first that works."""
        able = [
            candidate
            for candidate in self.candidates
            if not (candidate.obstacle(self.device, self.dtype, self.shapes) or candidate.reserve(self.shapes))
        ]
        candidate = next((candidate for candidate in able if self.dtype in candidate.quick_on_cpu), able[0])
        return Selection(candidate.load(), f"torch's own on a {self.device.type.upper()}")

    @property
    def _logger(self) -> logging.Logger:
        return logging.getLogger(f"echo_rt.{self.cache.subject}")

    def _select(
        self,
        requested: str | None,
        prescribed: str | None,
        path: Path | None,
        forgive: type[BackendError] | tuple[()],
    ) -> Selection[Loaded]:
        unable = ""
        if requested is not None:
            candidate = self._named(requested)
            try:
                return Selection(self._checked(candidate, forgive), "asked for by name", by_name=True)
            except forgive as error:
                unable = f"; not {requested}: {str(error).partition('; ')[0]}"
        if prescribed is not None:
            selection = self._prescribed(prescribed)
        elif self.device.type == "cuda":
            selection = self._fastest(path)
        else:
            selection = self.default()
        return replace(selection, reason=selection.reason + unable)

    def _prescribed(self, name: str) -> Selection[Loaded]:
        try:
            return Selection(self._checked(self._named(name)), "as in the snapshot")
        except BackendError as error:
            raise BackendError(
                f"{error}. The snapshot's video was made with it; ask for another by name to go on, rounded otherwise"
            ) from error

    def _fastest(self, path: Path | None) -> Selection[Loaded]:
        case = Case(machine_facts(self.device, self.candidates), plain(self.dtype), self.shapes)
        if path is not None and (known := self.cache.recall(path, case)) is not None:
            try:
                loaded = self._load(self._named(known.winner))
                return Selection(loaded, f"{known} (remembered in {path})", known.milliseconds, known.rejected)
            except BackendError as error:
                self._logger.warning(
                    "%s was the fastest and is no longer there (%s): measured anew", known.winner, error
                )
        loaded, entry, lasts = self._measure(case)
        if path is not None and lasts:
            self.cache.remember(path, entry)
        return Selection(loaded, str(entry), entry.milliseconds, entry.rejected)

    def _measure(self, case: Case[Shapes]) -> tuple[Loaded, Entry[Shapes], bool]:
        """The fastest, all that was measured, and whether that lasts: not if memory was short.

        Taken in turns: a clock that changes, or another's load, then meets all of them.
        """
        check = self.check()
        loaded: dict[str, Loaded] = {}
        stopwatches: dict[str, Callable[[], float]] = {}
        rejected: dict[str, str] = {}
        lasts = True
        for candidate in sorted(self.candidates, key=lambda candidate: bool(candidate.reserve(self.shapes))):
            name = candidate.name
            if stopwatches and (why := candidate.reserve(self.shapes)):
                rejected[name] = why
                continue
            try:
                loaded[name], stopwatches[name] = self._tried(check, candidate)
            except BackendError as error:
                rejected[name] = str(error)
                if isinstance(error, _WrongResultError):
                    self._logger.warning("%s is not used: %s", name, error)
                elif isinstance(error, _NoMemoryError):
                    lasts = False
                    self._logger.warning(
                        "%s is not used: %s; %s is measured anew next time", name, error, self.cache.subject
                    )
        if not stopwatches:
            reasons = ". ".join(f"{name}: {why}" for name, why in rejected.items())
            kind_of_error = BackendError if lasts else torch.OutOfMemoryError
            raise kind_of_error(f"no {self.cache.subject} works on {self.device} for {self.shapes}. {reasons}")
        rounds = [{name: watch() for name, watch in stopwatches.items()} for _ in range(self.rounds)]
        milliseconds = {name: statistics.median(times[name] for times in rounds) for name in stopwatches}
        winner = min(milliseconds, key=milliseconds.__getitem__)
        return loaded[winner], Entry(case, winner, milliseconds, rejected), lasts

    def _tried(self, check: Check[Loaded], candidate: Candidate[Loaded, Shapes]) -> tuple[Loaded, Callable[[], float]]:
        """``candidate`` loaded, and its stopwatch; :class:`BackendError` says why there is none."""
        loaded = self._load(candidate)
        self._require_right(check, loaded)
        return loaded, self._attempt(lambda: check.stopwatch(loaded), "it cannot be captured in a CUDA graph")

    def _named(self, name: str) -> Candidate[Loaded, Shapes]:
        require_known(self.cache.subject, name, self.candidates, self.removed)
        return next(candidate for candidate in self.candidates if candidate.name == name)

    def _load(self, candidate: Candidate[Loaded, Shapes]) -> Loaded:
        if why := candidate.obstacle(self.device, self.dtype, self.shapes):
            raise ObstacleError(why)
        return candidate.load()

    def _checked(self, candidate: Candidate[Loaded, Shapes], forgive: type[BackendError] | tuple[()] = ()) -> Loaded:
        """``candidate``, asked for by name; an error that is in ``forgive`` says no more than the reason."""
        asked = f"{self.cache.subject} {candidate.name!r}"
        try:
            loaded = self._load(candidate)
            if self.device.type == "cuda":
                self._require_right(self.check(), loaded)
            return loaded
        except _NoMemoryError as error:
            raise torch.OutOfMemoryError(f"{asked}: {error}") from None
        except forgive:
            raise
        except BackendError as error:
            raise BackendError(f"{asked} is not available: {error}") from error

    def _require_right(self, check: Check[Loaded], loaded: Loaded) -> None:
        """Raises :class:`BackendError` unless ``loaded`` computes the shapes, and rightly."""
        case, bound = f"{self.shapes} in {plain(self.dtype)}", TOLERANCES[self.dtype]
        error = self._attempt(lambda: check.error(loaded), f"it does not compute {case}")
        if error > bound:
            raise _WrongResultError(
                f"its result is wrong for {case}, by {error:.2g} where {bound:.2g} is the most; choose another"
            )

    def _attempt(self, work: Callable[[], Result], complaint: str) -> Result:
        """What ``work`` returns; whatever a library raises is the finding. Its memory is there for the next."""
        try:
            return work()
        except Exception as problem:
            # What libraries beside torch's allocator say of a shortage has no type of its own.
            signs = ("out of memory", "ALLOC_FAILED")
            if not (isinstance(problem, torch.OutOfMemoryError) or any(sign in str(problem) for sign in signs)):
                raise BackendError(f"{complaint}: {first_line(problem)}; choose another") from problem
            free(problem)
            give_memory_back(self.device)
            raise _NoMemoryError(
                f"it runs out of memory for {self.shapes} in {plain(self.dtype)}: {first_line(problem)}; free some, "
                "or choose another"
            ) from None


def require_known(subject: str, name: object, candidates: Sequence[Named], removed: Mapping[str, str]) -> None:
    """Raises :class:`BackendError` unless one of ``candidates`` has this name."""
    known = list(dict.fromkeys(candidate.name for candidate in candidates))
    if name not in known:
        if isinstance(name, str) and name in removed:
            raise BackendError(f"{subject} {name!r} is gone: {removed[name]}")
        raise BackendError(f"{subject} must be one of {', '.join(known)}; got {name!r}")


class Stopwatch:
    """Times computations on a GPU as the steady state runs them, replayed from a CUDA graph.

    Those timed by one stopwatch run in turns: their graphs share one stream and one memory pool. ``calls`` are
    captured together, as the time between two events includes the launch of the graph.
    """

    def __init__(self, device: torch.device, calls: int) -> None:
        self.device, self.calls = device, calls
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, call: Callable[[], object]) -> Callable[[], float]:
        """A function that returns the milliseconds per call on the device; raises what cannot be captured."""

        def calls_together() -> None:
            for _ in range(self.calls):
                call()

        graph = torch.cuda.CUDAGraph()
        with current(self.device):
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            # Around the capture too: where that fails, torch leaves its stream the current one.
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UPS):
                    call()
                try:
                    capture(graph, calls_together, stream=self._stream, pool=self._pool)
                except BaseException:
                    self._pool = torch.cuda.graph_pool_handle()  # see capture
                    raise

        def milliseconds() -> float:
            with current(self.device):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                graph.replay()
                end.record()
                end.synchronize()
                return float(start.elapsed_time(end)) / self.calls

        return milliseconds


def current(device: torch.device) -> torch.cuda.device:
    """Libraries ask for the properties of the current GPU; on a CPU this changes nothing."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
