"""The run: every variant is made ready, held against the torch backend, and measured in turns with the others."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch

from echo_rt.attention import AttentionSelection
from echo_rt.bench.environment import environment
from echo_rt.bench.measure import LEFT_OUT, Baseline, Exactness, Missing, compare_block, find_baselines, take_turn
from echo_rt.bench.model import Model, random_prompt
from echo_rt.bench.request import Request
from echo_rt.bench.rig import Parts, Rig, Site
from echo_rt.bench.settings import Variant, memory_evolves, plan, turns_of
from echo_rt.bench.timing import Sample, Timer, timer_for
from echo_rt.engine.decoding import Convolutions
from echo_rt.errors import BackendError, CaptureError
from echo_rt.model.linear import kept_from_float8
from echo_rt.ops.backends import Backend, choose_backend, load_ops
from echo_rt.options import MemoryMode
from echo_rt.soak.probes import GpuHealth, gpu_health, host_memory
from echo_rt.utils.device import (
    give_memory_back,
    model_context,
    parse_device,
    parse_dtype,
    warn_of_faulty_convolutions,
    working_dtype,
)

T = TypeVar("T")

_TORCH = "torch"
_MEMORY_BLOCKS = 5  # over which the device's memory has to stay as it is


@dataclass
class Entry:
    """A variant and what was found out about it; ``problem`` is empty where it was measured.

    ``graphs``: whether it runs with them where there are any; ``graphs_failed``: the stage that cannot be captured and
    why, where that is the reason why it runs without.
    """

    variant: Variant
    mode: MemoryMode
    backend: str
    graphs: bool
    graphs_failed: str = ""
    rig: Rig | None = None
    exactness: Exactness | None = None
    problem: str = ""
    samples: dict[int, Sample] = field(default_factory=dict)  # by lookahead


@dataclass(frozen=True)
class Resources:
    """Of the first variant, alone on the device. Bytes: ``device`` in the steady state, how much that grew over some
    blocks, the ``peak`` since before the weights were made, what torch holds ``reserved``; None on a CPU. ``decoder``:
    what the decoder says that it keeps for a stream."""

    host: int | None
    device: int | None
    growth: int | None
    peak: int | None
    reserved: int | None
    first_frame_cold: float
    first_frame_warm: float
    snapshot: int
    decoder: int


@dataclass(frozen=True)
class Run:
    """Everything that a report is made of."""

    request: Request
    header: dict[str, Any]
    device: torch.device
    dtype: torch.dtype
    model: Model
    backend: Backend
    attention: tuple[AttentionSelection, AttentionSelection, AttentionSelection]
    convolutions: Convolutions
    clock: str
    rounds: int
    blocks: int
    order: list[list[str]]
    entries: list[Entry]
    absent: dict[str, str]
    peers: list[Baseline]
    peer_seconds: dict[str, list[float]]
    missing: list[Missing]
    resources: Resources
    complete: bool

    @property
    def measured(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.samples and not entry.problem]

    @property
    def passed(self) -> bool:
        """Whether all was done, right, and had its graphs; a peer that differs is not timed, and is no fault here."""
        return self.complete and not any(entry.problem or entry.graphs_failed for entry in self.entries)


def run(
    request: Request,
    say: Callable[[str], None] = lambda text: None,
    save: Callable[[Run], object] = lambda run: None,
) -> Run:
    """Do what is asked for. ``say`` is told how far it has come, ``save`` given what there is whenever more is known.

    Raises :class:`ConfigError` and :class:`BackendError` for what cannot be had, among it a GPU with too little memory.
    """
    device = parse_device(request.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # the timer's events are recorded on the current one
    dtype = parse_dtype(request.dtype, device)
    choose_backend(request.backend, device)  # one that was named is refused before the weights are there
    model = request.load(device)
    no_graphs = "--no-graphs was given" if request.graphs is False else ""
    if device.type != "cuda":
        no_graphs = "there are no graphs on a CPU"
    evolves = model.memory is not None and memory_evolves(request.variants)
    memory = (working_dtype(dtype), model.config.transformer.head_dim) if evolves else None
    backend = choose_backend(request.backend, device, memory=memory)
    ops = backend.ops
    variants, absent = plan(
        request.variants, has_memory=model.memory is not None, no_graphs=no_graphs, backend=ops.name
    )
    kept_from_float8(model.config.transformer.num_layers, dtype, request.float8_except)  # before anything is tried
    warn_of_faulty_convolutions(device, working_dtype(dtype))
    health = gpu_health(device)
    try:
        with _enough_memory(device):
            site = Site.choose(model, device, dtype, ops, request.attention, request.float8_except)
            # What was asked of the decoder is not asked of the backend that it is held against, where that is another.
            parts = {_TORCH: Parts(site, load_ops(_TORCH))}
            parts[ops.name] = Parts(site, ops, request.convolution, request.vae_tiles)
            return _Runner(request, site, parts, backend, health, say, save).run(variants, absent)
    finally:
        if health is not None:
            health.close()


def _mode(variant: Variant, model: Model) -> MemoryMode:
    return variant.mode or (MemoryMode.OFF if model.memory is None else MemoryMode.EVOLVE)


@contextlib.contextmanager
def _enough_memory(device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info(device))
        raise BackendError(
            f"{device} has too little memory for all variants at once: {free:.1f} of {total:.1f} GiB were free when "
            "one more was to be made ready; name fewer with --variants, and leave out --peers"
        ) from error


class _Runner:
    def __init__(
        self,
        request: Request,
        site: Site,
        parts: dict[str, Parts],
        backend: Backend,
        health: GpuHealth | None,
        say: Callable[[str], None],
        save: Callable[[Run], object],
    ) -> None:
        self._request, self._site, self._parts, self._backend = request, site, parts, backend
        self._health, self._say, self._save = health, say, save
        self._on_gpu = site.device.type == "cuda"
        self._rounds, self._blocks = request.counts(site.device)
        self._lookaheads = sorted({0, request.lookahead})
        self._prompt = random_prompt(site.model.config.transformer, site.device, request.seed)

    def run(self, variants: list[Variant], absent: dict[str, str]) -> Run:
        model = self._site.model
        wanted = self._request.graphs is not False
        entries = [
            Entry(v, _mode(v, model), _TORCH if v.torch else self._backend.name, wanted and v.graphs) for v in variants
        ]
        first, timer = entries[0], timer_for(self._site.device)
        self._say(f"{first.variant.name}: alone on the device")
        resources = self._or_without_graphs(first, self._alone)
        parts = self._parts[first.backend]
        found = Run(
            request=self._request,
            header=environment(str(self._site.device)),  # now, while the clocks are those of a device at work
            device=self._site.device,
            dtype=self._site.model_dtype,
            model=model,
            backend=self._backend,
            attention=(self._site.over_cache, self._site.over_text, parts.vae_attention),
            convolutions=parts.convolutions,
            clock=timer.clock,
            rounds=self._rounds,
            blocks=self._blocks,
            order=[],
            entries=entries,
            absent=absent,
            peers=[],
            peer_seconds={},
            missing=[],
            resources=resources,
            complete=False,
        )
        # The first number there is: should the time run out while the others are made ready, it has been told.
        self._or_without_graphs(first, self._variant_turn)
        self._save(found)
        for entry in entries[1:]:
            self._say(f"{entry.variant.name}: made ready")
            self._or_without_graphs(entry, self._ready)
        self._compare(entries)
        self._save(found)
        peers, missing = self._find_peers()
        found = dataclasses.replace(found, peers=peers, missing=missing)
        for order, seconds in self._measure(entries, peers, timer):
            found = dataclasses.replace(found, order=order, peer_seconds=seconds)
            self._save(found)
        for entry in entries:
            self._release(entry)
        return dataclasses.replace(found, complete=True)

    # ---------------------------------------------------------------- making ready

    def _or_without_graphs(self, entry: Entry, work: Callable[[Entry], T]) -> T:
        """``work(entry)``; again without graphs, which is noted, where a stage of it cannot be captured."""
        try:
            return work(entry)
        except CaptureError as error:
            entry.graphs, entry.graphs_failed = False, f"{error.stage}: {error.cause}"
        # The error is gone, and what its frames held with it.
        self._say(f"{entry.variant.name}: graphs failed in {entry.graphs_failed}; once more without")
        self._release(entry)
        entry.samples.clear()
        return work(entry)

    def _rig(self, mode: MemoryMode, backend: str, graphs: bool) -> Rig:
        return Rig(self._parts[backend], mode, graphs=None if graphs else False, depth=1 + self._request.lookahead)

    def _first_frame(self, rig: Rig) -> float:
        """Seconds from a new video, its prompt encoded, to its first frames on the host."""
        begun = time.perf_counter()
        rig.start(self._prompt, self._request.seed)
        rig.block(self._request.lookahead)
        seconds = time.perf_counter() - begun
        rig.drain()
        return seconds

    def _ready(self, entry: Entry) -> Rig:
        """The rig of ``entry`` in the steady state, made if there is none."""
        if entry.rig is None:
            entry.rig = self._rig(entry.mode, entry.backend, entry.graphs)
            entry.rig.start(self._prompt, self._request.seed)
            entry.rig.warm_up()
        return entry.rig

    def _alone(self, entry: Entry) -> Resources:
        """The first variant made ready while nothing else is on the device, so that its memory can be told."""
        device = self._site.device
        with model_context(device, self._site.dtype):
            _ = self._parts[entry.backend].decoder  # a trial of its convolutions takes memory that no stream does
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        rig = entry.rig = self._rig(entry.mode, entry.backend, entry.graphs)
        cold = self._first_frame(rig)
        rig.warm_up()
        allocated = []
        for _ in range(_MEMORY_BLOCKS if self._on_gpu else 0):
            rig.block(self._request.lookahead)
            allocated.append(torch.cuda.memory_allocated(device))
        rig.drain()
        peak = torch.cuda.max_memory_allocated(device) if self._on_gpu else None
        reserved = torch.cuda.memory_reserved(device) if self._on_gpu else None
        warm = self._first_frame(rig)
        rig.warm_up()
        return Resources(
            host=host_memory()["rss"],
            device=allocated[-1] if allocated else None,
            growth=max(allocated) - min(allocated) if allocated else None,
            peak=peak,
            reserved=reserved,
            first_frame_cold=cold,
            first_frame_warm=warm,
            snapshot=rig.state_bytes,
            decoder=rig.pipeline.decoder_bytes,
        )

    def _compare(self, entries: list[Entry]) -> None:
        """Each variant's next block against that of the torch backend without graphs; what differs is not measured."""
        for mode in dict.fromkeys(entry.mode for entry in entries):
            reference = self._rig(mode, _TORCH, graphs=False)
            for entry in entries:
                if entry.mode is mode:
                    entry.exactness = found = self._or_without_graphs(entry, partial(self._held_against, reference))
                    if not found.ok:
                        entry.problem = f"differs from the torch backend: {found}"
                        self._release(entry)
                    self._say(f"{entry.variant.name}: {entry.problem or 'as the torch backend'}")
            reference.close()
            del reference
            self._collect()

    def _held_against(self, reference: Rig, entry: Entry) -> Exactness:
        return compare_block(self._ready(entry), reference, self._request.seed, self._site.model_dtype)

    def _find_peers(self) -> tuple[list[Baseline], list[Missing]]:
        if not self._request.peers:
            return [], list(LEFT_OUT)
        return find_baselines(self._parts[self._backend.name], self._prompt, self._request.seed)

    def _release(self, entry: Entry) -> None:
        if entry.rig is not None:
            entry.rig.close()
            entry.rig = None
        self._collect()

    def _collect(self) -> None:
        gc.collect()
        give_memory_back(self._site.device)

    # ---------------------------------------------------------------- measuring

    def _measure(
        self, entries: list[Entry], peers: list[Baseline], timer: Timer
    ) -> Iterator[tuple[list[list[str]], dict[str, list[float]]]]:
        """The order of the turns and the seconds of the peers, after each round."""
        rigs = {entry.variant.name: entry for entry in entries if not entry.problem}
        right = {peer.name: peer for peer in peers if peer.ok}
        seconds: dict[str, list[float]] = {name: [] for name in right}
        order: list[list[str]] = []
        if [*rigs, *right] == [entries[0].variant.name]:
            order.append([*rigs])  # its first turn was as any other
            yield order, seconds
        else:
            entries[0].samples = {}  # what was measured alone is not what takes turns with the others
        for number in range(len(order), self._rounds):
            self._say(f"round {number + 1} of {self._rounds}")
            order.append(turns_of(number, [*rigs, *right]))
            for name in order[-1]:
                if name in rigs:
                    self._or_without_graphs(rigs[name], self._variant_turn)
                else:
                    seconds[name] += self._peer_turn(right[name], timer)
            yield order, seconds

    def _variant_turn(self, entry: Entry) -> None:
        rig = self._ready(entry)
        for lookahead in self._lookaheads:
            sample = entry.samples.setdefault(lookahead, Sample())
            take_turn(rig, lookahead, self._blocks, sample, self._joules)

    def _peer_turn(self, peer: Baseline, timer: Timer) -> list[float]:
        with model_context(self._site.device, self._site.dtype):
            times = timer.measure(peer.call, self._blocks, warmup=1)
        return [each / 1e6 for each in times.microseconds]

    def _joules(self) -> float | None:
        """The board's counter, which begins anywhere."""
        read = None if self._health is None else self._health.read()["energy_mj"]
        return None if read is None else read / 1e3
