"""Autotuning: an implementation by name, from the cache, or the fastest that is right by measuring."""

from __future__ import annotations

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
from echo_rt.errors import BackendError
from echo_rt.utils.device import capture, give_memory_back, model_context
from echo_rt.utils.process import free
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
Found = TypeVar("Found", bound=Named)
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


class Check(ABC, Generic[Loaded]):
    """Random inputs of some shapes, on which implementations are run: whether they are right, and how fast.

    ``calls`` are captured together, as the time between two events includes the launch of the graph. Graphs run in
    turns, so they share one stream and one memory pool.
    """

    calls: int

    def __init__(self, device: torch.device, dtype: torch.dtype, out_size: tuple[int, ...]) -> None:
        self.device, self.dtype, self.out_size = device, dtype, out_size
        self._generator = torch.Generator(device).manual_seed(0)

    @abstractmethod
    def call(self, implementation: Loaded, /) -> Callable[[], Tensor]:
        """A function that runs it on the inputs."""

    @abstractmethod
    def errors(self, out: Tensor) -> Tensor:
        """Relative errors of parts of an output."""

    def error(self, implementation: Loaded, /) -> float:
        """The largest relative error of its output; infinite for an output of another size or dtype."""
        with current(self.device):
            out = self.call(implementation)()
            if out.shape != self.out_size or out.dtype != self.dtype:
                return math.inf
            # A comparison with NaN is false whatever one asks; an infinite error is not.
            return float(self.errors(out).nan_to_num(nan=math.inf).max())

    def normal(self, *size: int) -> Tensor:
        """Normal numbers of its own generator."""
        return torch.randn(size, generator=self._generator, device=self.device, dtype=self.dtype)

    def stopwatch(self, implementation: Loaded, /) -> Callable[[], float]:
        """A function that replays it from a CUDA graph, as the steady state does, and returns the ms per call.

        What a library spends in Python does not count. Raises where it cannot be captured.
        """
        call, graph, stream = self.call(implementation), torch.cuda.CUDAGraph(), self._stream

        def calls_together() -> None:
            for _ in range(self.calls):
                call()

        with current(self.device):
            stream.wait_stream(torch.cuda.current_stream(self.device))
            # Around the capture too: where that fails, torch leaves its stream the current one.
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    call()
                try:
                    capture(graph, calls_together, stream=stream, pool=self._pool)
                except BaseException:
                    del self._pool  # see capture
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

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    @cached_property
    def _pool(self) -> Any:
        return torch.cuda.graph_pool_handle()


@dataclass(frozen=True)
class Selection(Generic[Loaded]):
    """An implementation and why it is this one.

    ``timings``: milliseconds per call of each candidate that was timed; ``rejected``: what spoke against each other
    one; ``by_name``: whether it was asked for. ``attention`` and ``kind``: what its users call ``implementation``.
    """

    implementation: Loaded
    reason: str
    timings: Mapping[str, float] = field(default_factory=dict)
    rejected: Mapping[str, str] = field(default_factory=dict)
    by_name: bool = False

    @property
    def name(self) -> str:
        return self.implementation.name

    @property
    def attention(self) -> Loaded:
        return self.implementation

    kind = attention


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
        requested: str | None = None,
        prescribed: str | None = None,
        *,
        cache: Path | None,
        forgive: tuple[type[BackendError], ...] = (),
    ) -> Selection[Loaded]:
        """The candidate named ``requested``, else ``prescribed`` by a snapshot, else the fastest; on a CPU torch's own.

        One that is named is checked on a GPU, but not timed. ``forgive``: errors of a requested one after which it is
        as if nothing had been requested, and the reason says why. The fastest is measured once and remembered in the
        file ``cache`` (None: nowhere) until the GPU, a library or the shapes change. One that computes something else
        is never selected; one that runs out of memory is left out, and the outcome is not remembered. Waits for the
        device. Raises :class:`BackendError` for a name that is unknown or cannot be had here, and where nothing works;
        where that is for want of memory, ``torch.OutOfMemoryError``.
        """
        selection, unable = None, ""
        with model_context(self.device, self.dtype):
            if requested is not None:
                candidate = self._named(requested)
                try:
                    selection = Selection(self._checked(candidate, forgive), "asked for by name", by_name=True)
                except forgive as error:
                    unable = f"; not {requested}: {str(error).partition('; ')[0]}"
            if selection is None:
                selection = self._unrequested(prescribed, cache)
        selection = replace(selection, reason=selection.reason + unable)
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

    def known(self, cache: Path | None) -> Iterator[tuple[str, str]]:
        """Name and reason of what is selected as things are now, for any shapes, as far as is known unmeasured."""
        if self.device.type != "cuda":
            selection = self.default()
            yield selection.name, selection.reason
        elif cache is not None:
            machine = self._machine()
            for entry in self.cache.entries(cache):
                if entry.case.machine == machine:
                    yield entry.winner, f"for {entry.case.shapes} in {entry.case.dtype}, {entry}"

    def default(self) -> Selection[Loaded]:
        """Torch's own where nothing is measured: the one known to be quick in the dtype, else the first that works."""
        case = self.device, self.dtype, self.shapes
        able = [one for one in self.candidates if not one.obstacle(*case) and not one.reserve(self.shapes)]
        candidate = next((one for one in able if self.dtype in one.quick_on_cpu), able[0])
        return Selection(candidate.load(), f"torch's own on a {self.device.type.upper()}")

    @property
    def _logger(self) -> logging.Logger:
        return logging.getLogger(f"echo_rt.{self.cache.subject}")

    def _machine(self) -> dict[str, Any]:
        return machine_facts(self.device, {candidate.name: candidate.version() for candidate in self.candidates})

    def _unrequested(self, prescribed: str | None, cache: Path | None) -> Selection[Loaded]:
        if prescribed is None:
            return self._fastest(cache) if self.device.type == "cuda" else self.default()
        try:
            return Selection(self._checked(self._named(prescribed)), "as in the snapshot")
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
        """The fastest, all that was measured, and whether that lasts: not if memory was short.

        Taken in turns: a clock that changes, or another's load, then meets all of them.
        """
        check, subject, lasts = self.check(), self.cache.subject, True
        loaded: dict[str, Loaded] = {}
        stopwatches: dict[str, Callable[[], float]] = {}
        rejected: dict[str, str] = {}
        for candidate in sorted(self.candidates, key=lambda candidate: bool(candidate.reserve(self.shapes))):
            name = candidate.name
            if stopwatches and (why := candidate.reserve(self.shapes)):
                rejected[name] = why
                continue
            try:
                loaded[name] = self._load(candidate)
                self._require_right(check, loaded[name])
                stopwatches[name] = self._attempt(
                    check.stopwatch, loaded[name], "it cannot be captured in a CUDA graph"
                )
            except BackendError as error:
                rejected[name] = str(error)
                lasts = lasts and not isinstance(error, _NoMemoryError)
                if isinstance(error, _WrongResultError | _NoMemoryError):
                    anew = "" if isinstance(error, _WrongResultError) else f"; {subject} is measured anew next time"
                    self._logger.warning("%s is not used: %s%s", name, error, anew)
        if not stopwatches:
            reasons = ". ".join(f"{name}: {why}" for name, why in rejected.items())
            kind_of_error = BackendError if lasts else torch.OutOfMemoryError
            raise kind_of_error(f"no {subject} works on {self.device} for {self.shapes}. {reasons}")
        rounds = [{name: watch() for name, watch in stopwatches.items()} for _ in range(self.rounds)]
        milliseconds = {name: statistics.median(times[name] for times in rounds) for name in stopwatches}
        winner = min(milliseconds, key=milliseconds.__getitem__)
        return loaded[winner], Entry(case, winner, milliseconds, rejected), lasts

    def _named(self, name: str) -> Candidate[Loaded, Shapes]:
        return find(self.cache.subject, name, self.candidates, self.removed)

    def _load(self, candidate: Candidate[Loaded, Shapes]) -> Loaded:
        if why := candidate.obstacle(self.device, self.dtype, self.shapes):
            raise ObstacleError(why)
        return candidate.load()

    def _checked(self, candidate: Candidate[Loaded, Shapes], forgive: tuple[type[BackendError], ...] = ()) -> Loaded:
        """``candidate``, which was named; an error that is in ``forgive`` says no more than the reason."""
        named = f"{self.cache.subject} {candidate.name!r}"
        try:
            loaded = self._load(candidate)
            if self.device.type == "cuda":
                self._require_right(self.check(), loaded)
            return loaded
        except _NoMemoryError as error:
            raise torch.OutOfMemoryError(f"{named}: {error}") from None
        except forgive:
            raise
        except BackendError as error:
            raise BackendError(f"{named} is not available: {error}") from error

    def _require_right(self, check: Check[Loaded], loaded: Loaded) -> None:
        """Raises :class:`BackendError` unless ``loaded`` computes the shapes, and rightly."""
        case, bound = f"{self.shapes} in {plain(self.dtype)}", TOLERANCES[self.dtype]
        error = self._attempt(check.error, loaded, f"it does not compute {case}")
        if error > bound:
            raise _WrongResultError(
                f"its result is wrong for {case}, by {error:.2g} where {bound:.2g} is the most; choose another"
            )

    def _attempt(self, work: Callable[[Loaded], Result], loaded: Loaded, complaint: str) -> Result:
        """What ``work`` returns; whatever a library raises is the finding. Its memory is there for the next."""
        try:
            return work(loaded)
        except Exception as problem:
            # What libraries beside torch's allocator say of a shortage has no type of its own.
            signs = ("out of memory", "ALLOC_FAILED")
            if not isinstance(problem, torch.OutOfMemoryError) and not any(sign in str(problem) for sign in signs):
                raise BackendError(f"{complaint}: {first_line(problem)}; choose another") from problem
            free(problem)
            give_memory_back(self.device)
            case = f"{self.shapes} in {plain(self.dtype)}"
            remedy = "free some, or choose another"
            raise _NoMemoryError(f"it runs out of memory for {case}: {first_line(problem)}; {remedy}") from None


def find(subject: str, name: object, candidates: Sequence[Found], removed: Mapping[str, str]) -> Found:
    """The first of ``candidates`` that has this name; raises :class:`BackendError` where there is none."""
    by_name = {candidate.name: candidate for candidate in reversed(candidates)}
    if isinstance(name, str) and name in by_name:
        return by_name[name]
    if isinstance(name, str) and name in removed:
        raise BackendError(f"{subject} {name!r} is gone: {removed[name]}")
    names = dict.fromkeys(candidate.name for candidate in candidates)
    raise BackendError(f"{subject} must be one of {', '.join(names)}; got {name!r}")


def current(device: torch.device) -> torch.cuda.device:
    """Libraries ask for the properties of the current GPU; on a CPU this changes nothing."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
