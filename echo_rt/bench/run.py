"""What ``echo-rt bench`` measures: every variant made ready, held against the torch backend, then measured in turns.

What runs is the rollout, decoder and queues of :class:`echo_rt.Runtime`. The runners of several variants live side by
side; the networks that they compute with are shared.
"""

from __future__ import annotations

import gc
import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from echo_rt.attention import AttentionSelection
from echo_rt.bench.runner import BlockRunner, Sample
from echo_rt.bench.settings import MODELS, RELEASED, TINY, VARIANTS, Request, Variant, plan, turns_of
from echo_rt.bench.tables import ROOT, environment
from echo_rt.config import ModelConfig, VaeConfig
from echo_rt.engine.build import Networks
from echo_rt.errors import BackendError, CaptureError, ConfigError
from echo_rt.model.linear import kept_from_float8
from echo_rt.ops.backends import Backend, choose_backend, load_ops
from echo_rt.ops.schema import Ops
from echo_rt.options import MemoryMode, RuntimeOptions, lora_text
from echo_rt.soak.probes import gpu_health, host_memory
from echo_rt.utils.device import (
    give_memory_back,
    model_context,
    parse_device,
    parse_dtype,
    warn_of_faulty_convolutions,
    working_dtype,
)
from echo_rt.verify.bundles import bound_between, relative_error
from echo_rt.weights.choice import Taken
from echo_rt.weights.load_model import load_model
from echo_rt.weights.shapes import memory_shapes, transformer_shapes, vae_shapes
from echo_rt.weights.tensors import FingerprintedTensors, ModelTensors
from echo_rt.weights.tiny_model import RandomTensors

T = TypeVar("T")

_PROMPT_TOKENS = 77  # of random embeddings; how many there are changes no size
BASELINES = ("diffusers AutoencoderKLWan", "FlashDreams")
_TORCH = "torch"
DEVICE_CLOCK, HOST_CLOCK = "device events, cold L2", "host clock, warm caches"  # the latter only rehearses
_ROUNDS = {"cuda": 5, "cpu": 2}
_BLOCKS = {"cuda": 10, "cpu": 2}  # of a variant in each round
_MEMORY_BLOCKS = 5  # over which the device's memory has to stay as it is


class Model(NamedTuple):
    """Sizes and tensors of a model; ``source`` says what they are, ``taken`` by which recipe it runs, if any."""

    source: str
    config: ModelConfig
    vae: VaeConfig
    tensors: ModelTensors
    taken: Taken | None = None

    @property
    def released(self) -> bool:
        """Whether these are the sizes that the targets speak of."""
        config = replace(self.config, memory=self.config.memory or RELEASED.config.memory)
        return (config, self.vae) == (RELEASED.config, RELEASED.vae)

    def networks(
        self, ops: Ops, options: RuntimeOptions, attention: tuple[AttentionSelection, AttentionSelection] | None = None
    ) -> Networks:
        """Its networks on a backend. ``options``: device, dtype, and how attention and decoder compute."""
        backend = Backend(ops, "measured")
        return Networks(self.config, self.tensors, options, backend, vae=self.vae, selected=attention)


def open_model(request: Request, device: torch.device) -> Model:
    """The model of a folder, by the rules of :meth:`echo_rt.Runtime.from_pretrained`, or one of random weights.

    Raises :class:`ConfigError` for the released sizes on a CPU, and all errors of loading a folder.
    """
    if request.model is not None:
        found = load_model(request.model, request)
        loras = [lora_text(*lora) for lora in found.taken.loras]
        source = " with ".join(str(each) for each in (request.model, request.checkpoint, *loras) if each)
        config, vae, taken = found.config, found.vae, found.taken
        tensors = [found.tensors.transformer, found.tensors.memory, found.folder.vae.tensors()]
    else:
        sizes = MODELS[request.size or (RELEASED if device.type == "cuda" else TINY).name]
        if sizes is RELEASED and device.type != "cuda":
            raise ConfigError(
                f"--size: the {sizes.name} sizes need a GPU, a block would take minutes on {str(device)!r}; "
                f"use {TINY.name!r}"
            )
        config, vae, taken = sizes.config, sizes.vae, None
        source = f"random weights at the {sizes.name} sizes, seed {request.seed}"
        shapes = (transformer_shapes(config.transformer), memory_shapes(config), vae_shapes(vae))
        tensors = [RandomTensors(each, device, request.seed) for each in shapes]
    return Model(source, config, vae, ModelTensors(*(FingerprintedTensors(part, source) for part in tensors)), taken)


@dataclass
class Entry:
    """A variant and what was found out about it; ``problem`` is empty where it was measured.

    ``graphs``: whether it runs with them where there are any; ``graphs_failed``: the stage that cannot be captured and
    why, where that is the reason why it runs without. ``errors``: relative, of latents and frames, of one block against
    the torch backend's.
    """

    variant: Variant
    mode: MemoryMode
    backend: str
    graphs: bool
    graphs_failed: str = ""
    runner: BlockRunner | None = None
    errors: tuple[float, float] | None = None
    problem: str = ""
    samples: dict[int, Sample] = field(default_factory=dict)  # by lookahead

    def release(self) -> None:
        """Let go of the runner and of its memory."""
        if self.runner is not None:
            device = self.runner.engine.device
            self.runner.close()
            self.runner = None
            gc.collect()
            give_memory_back(device)


def from_checkout(script: str) -> Any | None:
    """The module ``bench/SCRIPT.py`` of the checkout that this package lies in; None where it was installed without."""
    path = ROOT / "bench" / f"{script}.py"
    if not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location(f"echo_rt_{script}", path)
    assert spec is not None and spec.loader is not None  # it is a Python file
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_baselines(networks: Networks, seed: int) -> tuple[list[Any], dict[str, str]]:
    """The baselines that ``bench/baselines.py`` of a checkout finds, and why each other one is missing."""
    module = from_checkout("baselines")
    if module is None:
        why = "only a checkout has bench/baselines.py, which runs it; this package was installed without"
        return [], dict.fromkeys(BASELINES, why)
    found: tuple[list[Any], dict[str, str]] = module.find_baselines(networks, seed)
    return found


class Run:
    """A benchmark and all that was found out by it: what a report is made of.

    ``say`` is told how far it has come. Raises :class:`ConfigError` and :class:`BackendError` for what cannot be had,
    among it a GPU with too little memory.
    """

    def __init__(self, request: Request, say: Callable[[str], None] = lambda text: None) -> None:
        self.request, self._say = request, say
        self.device = device = parse_device(request.device)
        self.on_gpu = device.type == "cuda"
        self.clock = DEVICE_CLOCK if self.on_gpu else HOST_CLOCK
        if self.on_gpu:
            torch.cuda.set_device(device)  # events are recorded on the current one
        self.dtype = parse_dtype(request.dtype, device)
        choose_backend(request.backend, device)  # one that was named is refused before the weights are there
        self.model = model = open_model(request, device)
        has_memory = model.config.memory is not None
        asked = (v for v in VARIANTS if request.variants is None or v.name in request.variants)
        evolves = any(not v.torch and v.mode in (None, MemoryMode.EVOLVE) for v in asked) and has_memory
        memory = (working_dtype(self.dtype), model.config.transformer.head_dim) if evolves else None
        self.backend = choose_backend(request.backend, device, memory=memory)
        no_graphs = "--no-graphs was given" if request.graphs is False else ""
        no_graphs = no_graphs if self.on_gpu else "there are no graphs on a CPU"
        name = self.backend.name
        chosen, self.absent = plan(request.variants, has_memory=has_memory, no_graphs=no_graphs, backend=name)
        self.entries = [
            Entry(
                variant=each,
                mode=each.mode or (MemoryMode.EVOLVE if has_memory else MemoryMode.OFF),
                backend=_TORCH if each.torch else name,
                graphs=request.graphs is not False and each.graphs,
            )
            for each in chosen
        ]
        layers, steps = model.config.transformer.num_layers, model.config.sampler.most_steps
        kept_from_float8(layers, steps, self.dtype, request.float8_except)  # before any trial
        self.rounds, self.blocks = request.rounds or _ROUNDS[device.type], request.blocks or _BLOCKS[device.type]
        self.lookaheads = sorted({0, request.lookahead})
        self.order: list[list[str]] = []
        self.baselines: list[Any] = []
        self.missing: dict[str, str] = {}
        self.complete = False

    @property
    def measured(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.samples and not entry.problem]

    @property
    def passed(self) -> bool:
        """Whether all was done, right, and had its graphs; a baseline that differs is not timed, and no fault here."""
        return self.complete and not any(entry.problem or entry.graphs_failed for entry in self.entries)

    def measure(self, save: Callable[[Run], object] = lambda run: None) -> Run:
        """Do what is asked for; ``save`` is given the run whenever more is known."""
        warn_of_faulty_convolutions(self.device, working_dtype(self.dtype))
        self._health = gpu_health(self.device)
        try:
            self._measure(save)
        except torch.OutOfMemoryError as error:
            free, total = (size / 2**30 for size in torch.cuda.mem_get_info(self.device))
            raise BackendError(
                f"{self.device} has too little memory for all variants at once: {free:.1f} of {total:.1f} GiB were "
                "free when one more was to be made ready; name fewer with --variants, and leave out --peers"
            ) from error
        finally:
            if self._health is not None:
                self._health.close()
        return self

    def _measure(self, save: Callable[[Run], object]) -> None:
        first = self.entries[0]
        self._say(f"{first.variant.name}: alone on the device")
        self.resources = self.or_without_graphs(first, self._alone)
        self.header = environment(str(self.device))  # now, while the clocks are those of a device at work
        own = self._networks[first.backend]
        of_decoder = own.vae_attention
        assert of_decoder is not None  # no tiny decoder is measured here
        in_float8 = () if own.attention_in_float8 is None else (own.attention_in_float8,)
        self.attention, self.convolutions = (*own.attention, of_decoder, *in_float8), own.convolutions
        # The first number there is: should the time run out while the others are made ready, it has been told.
        self.or_without_graphs(first, self._variant_turn)
        save(self)
        for entry in self.entries[1:]:
            self._say(f"{entry.variant.name}: made ready")
            self.or_without_graphs(entry, self.ready)
        self._compare()
        save(self)
        self.missing = dict.fromkeys(BASELINES, "left out by --no-peers")
        if self.request.peers:
            self.baselines, self.missing = find_baselines(self._networks[self.backend.name], self.request.seed)
        self._take_turns(save)
        for entry in self.entries:
            entry.release()
        self.complete = True

    # ---------------------------------------------------------------- making ready

    @cached_property
    def _prompt(self) -> Tensor:
        """Embeddings ``[length, text_dim]`` of no prompt."""
        config, generator = self.model.config.transformer, torch.Generator().manual_seed(self.request.seed)
        return torch.randn(min(_PROMPT_TOKENS, config.text_len), config.text_dim, generator=generator).to(self.device)

    @cached_property
    def _networks(self) -> dict[str, Networks]:
        """By backend. What is asked of the decoder is not asked of the backend that it is held against."""
        asked = replace(self.request, device=self.device, dtype=self.dtype)
        chosen = self.model.networks(self.backend.ops, asked)
        plain = replace(asked, linear="torch", convolution=None, vae_tiles=1)
        return {_TORCH: self.model.networks(load_ops(_TORCH), plain, chosen.attention)} | {self.backend.name: chosen}

    def or_without_graphs(self, entry: Entry, work: Callable[[Entry], T]) -> T:
        """``work(entry)``; again without graphs, which is noted, where a stage of it cannot be captured."""
        try:
            return work(entry)
        except CaptureError as error:
            entry.graphs, entry.graphs_failed = False, f"{error.stage}: {error.cause}"
        # The error is gone, and what its frames held with it.
        self._say(f"{entry.variant.name}: graphs failed in {entry.graphs_failed}; once more without")
        entry.release()
        entry.samples.clear()
        return work(entry)

    def runner(self, entry: Entry) -> BlockRunner:
        """The runner of ``entry``, made if there is none."""
        if entry.runner is None:
            graphs, depth = None if entry.graphs else False, 1 + self.request.lookahead
            entry.runner = BlockRunner(self._networks[entry.backend], entry.mode, graphs=graphs, depth=depth)
        return entry.runner

    def _first_frame(self, runner: BlockRunner) -> float:
        """Seconds from a new video, its prompt encoded, to its first frames on the host."""
        begun = time.perf_counter()
        runner.start(self._prompt, self.request.seed)
        runner.block(self.request.lookahead)
        seconds = time.perf_counter() - begun
        runner.drain()
        return seconds

    def ready(self, entry: Entry) -> BlockRunner:
        """The runner of ``entry`` in the steady state."""
        if entry.runner is None:
            self.runner(entry).start(self._prompt, self.request.seed)
            self.runner(entry).warm_up()
        return self.runner(entry)

    def _alone(self, entry: Entry) -> dict[str, Any]:
        """Make the first variant ready while nothing else is on the device; what it takes, in bytes and seconds.

        ``device`` in the steady state, its ``growth`` over some blocks, its ``peak`` since before the weights were
        made, what torch holds ``reserved``: None on a CPU. ``decoder``: what the decoder says it keeps for a stream.
        """
        device, networks = self.device, self._networks[entry.backend]
        with model_context(device, working_dtype(self.dtype)):
            _ = networks.decoder  # a trial of its convolutions takes memory that no stream does
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        runner = self.runner(entry)
        cold = self._first_frame(runner)
        runner.warm_up()
        allocated = []
        for _ in range(_MEMORY_BLOCKS if self.on_gpu else 0):
            runner.block(self.request.lookahead)
            allocated.append(torch.cuda.memory_allocated(device))
        runner.drain()
        peak = torch.cuda.max_memory_allocated(device) if self.on_gpu else None
        reserved = torch.cuda.memory_reserved(device) if self.on_gpu else None
        warm = self._first_frame(runner)
        runner.warm_up()
        return {
            "host": host_memory()["rss"],
            "device": allocated[-1] if allocated else None,
            "growth": max(allocated) - min(allocated) if allocated else None,
            "peak": peak,
            "reserved": reserved,
            "first_frame_cold": cold,
            "first_frame_warm": warm,
            "snapshot": sum(tensor.nbytes for tensor in runner.engine.saved_tensors().values()),
            "decoder": runner.pipeline.decoder_bytes,
        }

    def _compare(self) -> None:
        """Hold each variant's next block against that of the torch backend; what differs is not measured."""
        self.bound = bound_between(self.dtype)
        for mode in dict.fromkeys(entry.mode for entry in self.entries):
            reference = Entry(VARIANTS[-1], mode, _TORCH, graphs=False)
            for entry in (entry for entry in self.entries if entry.mode is mode):
                held_against = partial(self._held_against, self.runner(reference))
                latents, frames = entry.errors = self.or_without_graphs(entry, held_against)
                if not (latents <= self.bound and frames <= self.bound):  # NaN is not
                    off = f"latents by {latents:.1e}, frames by {frames:.1e}, allowed are {self.bound:.1e}"
                    entry.problem = f"differs from the torch backend: {off}"
                    entry.release()
                self._say(f"{entry.variant.name}: {entry.problem or 'as the torch backend'}")
            reference.release()

    def _held_against(self, reference: BlockRunner, entry: Entry) -> tuple[float, float]:
        """Errors of latents and frames of the same steady block by both, memory update included where there is one."""
        runner = self.ready(entry)
        reference.adopt(runner, self.request.seed)
        (ours, _), (theirs, _) = runner.block(0), reference.block(0)
        runner.drain()
        reference.drain()
        return relative_error(ours.latents, theirs.latents), relative_error(ours.frames, theirs.frames)

    # ---------------------------------------------------------------- measuring

    def _take_turns(self, save: Callable[[Run], object]) -> None:
        """Measure round after round."""
        first, runners = self.entries[0], {entry.variant.name: entry for entry in self.entries if not entry.problem}
        right = {baseline.name: baseline for baseline in self.baselines if baseline.ok}
        alone = [*runners, *right] == [first.variant.name]
        if not alone:
            first.samples = {}  # what was measured alone is not what takes turns with the others
        for number in range(self.rounds):
            self._say(f"round {number + 1} of {self.rounds}")
            self.order.append(turns_of(number, [*runners, *right]))
            for name in self.order[-1]:
                if name in right:
                    with model_context(self.device, working_dtype(self.dtype)):
                        right[name].measure(self.blocks)
                elif number or not alone:  # what was alone has had its first turn
                    self.or_without_graphs(runners[name], self._variant_turn)
            save(self)

    def _variant_turn(self, entry: Entry) -> None:
        runner = self.ready(entry)
        for lookahead in self.lookaheads:
            runner.turn(lookahead, self.blocks, entry.samples.setdefault(lookahead, Sample()), self._joules)

    def _joules(self) -> float | None:
        """The board's counter, which begins anywhere."""
        read = None if self._health is None else self._health.read()["energy_mj"]
        return None if read is None else read / 1e3
