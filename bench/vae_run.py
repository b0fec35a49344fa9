"""The decoders of :mod:`vae_decoders` made one after the other, held against float32, and timed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from baselines import ROUNDINGS
from torch import Tensor
from vae_decoders import (
    DIFFUSERS,
    OURS,
    PUBLISHED,
    Decoder,
    PublishedDecoder,
    Setting,
    Stage,
    decoder_stages,
    diffusers,
    ours,
    published,
)

from echo_rt.bench.environment import environment
from echo_rt.bench.measure import Missing, difference
from echo_rt.bench.model import RandomTensors
from echo_rt.bench.settings import MODELS, RELEASED, TINY
from echo_rt.bench.timing import DEVICE_CLOCK, Timer, Times, timer_for
from echo_rt.errors import BackendError, ConfigError
from echo_rt.ops.backends import Backend, choose_backend
from echo_rt.ops.noise import fill_normal, seed_words
from echo_rt.options import latent_size
from echo_rt.utils.device import model_context, parse_device, parse_dtype, warn_of_faulty_convolutions
from echo_rt.utils.wording import first_line
from echo_rt.verify.bundles import bound_between
from echo_rt.weights.shapes import vae_shapes

_MAKERS: dict[str, Callable[[Setting], Decoder]] = {OURS: ours, PUBLISHED: published, DIFFUSERS: diffusers}
# Timed blocks and those before them: quick or not, by device.
_COUNTS = {("cuda", False): (30, 3), ("cuda", True): (10, 2), ("cpu", False): (5, 1), ("cpu", True): (2, 0)}


@dataclass(frozen=True)
class VaeRequest:
    """None means: the released sizes on a GPU and tiny ones on a CPU, the video's size that goes with them, bfloat16,
    the backend that a runtime would have, for each convolution the fastest way, and as many blocks as ``quick`` allows.
    ``peers``: others' code too.
    """

    size: str | None = None
    width: int | None = None
    height: int | None = None
    device: str | None = None
    dtype: str | None = "bfloat16"
    backend: str | None = None
    convolution: str | None = None
    blocks: int | None = None
    quick: bool = False
    peers: bool = True


@dataclass(frozen=True)
class Memory:
    """Bytes: ``state`` as counted by the decoder itself; of the allocator, with weights and all that stays, and None on
    a CPU: ``steady`` between two blocks, ``peak`` while one is decoded, the video in it."""

    state: int
    steady: int | None
    peak: int | None


@dataclass
class Measured:
    """A decoder and what was found out; ``whole`` is None where it computes something else, or was not timed."""

    name: str
    what: str
    error: float
    bound: float
    memory: Memory
    whole: Times | None = None
    stages: list[Times] = field(default_factory=list)
    convolutions: list[Times] = field(default_factory=list)
    kinds: Mapping[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.error <= self.bound  # NaN is not


@dataclass(frozen=True)
class VaeRun:
    """All that a report is made of; ``frames`` is the video's size and ``latents`` are those of a block."""

    request: VaeRequest
    header: dict[str, Any]
    size: str
    frames: tuple[int, int]
    latents: int
    dtype: torch.dtype
    backend: Backend
    clock: str
    blocks: int
    stages: list[Stage]
    measured: list[Measured]
    missing: list[Missing]
    complete: bool

    @property
    def judged(self) -> bool:
        """Whether goals are: on a GPU, at the released sizes, in bfloat16."""
        released = self.size == RELEASED.name and self.request.width is None and self.request.height is None
        return released and self.clock == DEVICE_CLOCK and self.dtype is torch.bfloat16

    @property
    def passed(self) -> bool:
        """Whether all was tried, and ours was right and timed; another's result is no fault of this run."""
        return self.complete and any(each.name == OURS and each.whole is not None for each in self.measured)

    def find(self, name: str) -> Measured | None:
        """What was measured of that decoder; None where it is not in the run."""
        return next((each for each in self.measured if each.name == name and each.whole is not None), None)


def run(
    request: VaeRequest,
    say: Callable[[str], None] = lambda text: None,
    save: Callable[[VaeRun], object] = lambda run: None,
) -> VaeRun:
    """Do what is asked for. ``say`` is told how far it has come, ``save`` given what there is after each decoder.

    Raises :class:`ConfigError` and :class:`BackendError` for what cannot be had, among it a GPU with too little memory
    for ours, or for the float32 that all is held against.
    """
    device = parse_device(request.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events are recorded on the current one
    dtype = parse_dtype(request.dtype, device)
    backend = choose_backend(request.backend, device)
    size = request.size or (RELEASED.name if device.type == "cuda" else TINY.name)
    if size == RELEASED.name and device.type != "cuda":
        raise ConfigError(f"the {size} sizes need a GPU, as a block would take minutes on {str(device)!r}")
    blocks, warmup = _COUNTS[device.type, request.quick]
    blocks = blocks if request.blocks is None else request.blocks
    model = MODELS[size]
    config, stride = model.vae, model.vae.spatial_stride
    width, height = (
        own * stride if given is None else given
        for own, given in ((model.config.latent_width, request.width), (model.config.latent_height, request.height))
    )
    rows, columns = latent_size(width, height, config, model.config.transformer)
    latents = torch.empty(model.config.window.frames_per_block, config.z_dim, rows, columns, device="cpu")
    fill_normal(latents, 0, 0, seed_words(0))
    setting = Setting(
        config=config,
        tensors=RandomTensors(vae_shapes(config), device),
        ops=backend.ops,
        device=device,
        dtype=dtype,
        latents=latents.to(device),
        stages=decoder_stages(config, rows, columns, len(latents)),
        convolution=request.convolution,
    )
    warn_of_faulty_convolutions(device, dtype)
    timer = timer_for(device)
    found: list[Measured] = []
    missing: list[Missing] = []

    def so_far(complete: bool) -> VaeRun:
        return VaeRun(
            request=request,
            header=environment(str(device)),
            size=size,
            frames=(width, height),
            latents=len(latents),
            dtype=dtype,
            backend=backend,
            clock=timer.clock,
            blocks=blocks,
            stages=setting.stages,
            measured=found,
            missing=missing,
            complete=complete,
        )

    try:
        expected = _expected(setting)
        for name in list(_MAKERS) if request.peers else [OURS, PUBLISHED]:
            say(name)
            with model_context(device, dtype):
                try:
                    found.append(_measure(name, setting, expected, timer, blocks, warmup))
                except Exception as error:
                    if name != DIFFUSERS:
                        raise
                    missing.append(Missing.because(name, error))  # what another's code raises is the finding
            save(so_far(complete=False))
    except torch.OutOfMemoryError as error:
        raise BackendError(
            f"{device} has too little memory for a video of {width}x{height}: {first_line(error)}; "
            "name a smaller one with --width and --height"
        ) from error
    return so_far(complete=True)


def _expected(setting: Setting) -> Tensor:
    """The block in mid-stream by the published structure in float32, ``[F, H, W, 3]`` on the host."""
    with model_context(setting.device, torch.float32):
        decoder = PublishedDecoder(setting.config, setting.tensors, device=setting.device, dtype=torch.float32)
        decoder.decode(setting.latents, is_start=True)
        return decoder.decode(setting.latents, is_start=False)[0].permute(1, 2, 3, 0).cpu()


def _measure(name: str, setting: Setting, expected: Tensor, timer: Timer, blocks: int, warmup: int) -> Measured:
    """One decoder, alone on the device but for what the setting holds."""
    taken = DeviceBytes(setting.device)
    decoder = _MAKERS[name](setting)
    decoder.block()  # begins the stream
    steady = taken.steady()
    video = decoder.block()
    memory = Memory(decoder.state_bytes(), steady, taken.peak())
    error = difference(video.float().cpu(), expected)
    del video
    # Random weights are less kind than those that the golden bundles' bounds are for; others round more often.
    bound = bound_between(setting.dtype) * (1 if name == OURS else ROUNDINGS)
    measured = Measured(decoder.name, decoder.what, error, bound, memory, kinds=decoder.kinds)
    if not measured.ok:
        return measured
    measured.whole = timer.measure(decoder.block, blocks, warmup)
    for index in range(len(setting.stages)):
        measured.stages.append(timer.measure(decoder.stage(index), blocks, warmup))
        if decoder.convolutions is not None:
            measured.convolutions.append(timer.measure(decoder.convolutions(index), blocks, warmup))
    return measured


class DeviceBytes:
    """Bytes that one thing takes of a GPU's memory, by torch's allocator: beyond those held when this was made.

    None on a CPU, where nobody counts.

    ``cuda`` is ``torch.cuda``, or what a test puts in its place.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device, self._cuda = device, cuda
        gc.collect()
        self._before = self._held()

    def steady(self) -> int | None:
        """Held at this moment. From here on the most is looked for anew."""
        if self._device.type != "cuda":
            return None
        self._cuda.reset_peak_memory_stats(self._device)
        return self._held() - self._before

    def peak(self) -> int | None:
        """The most that was held since :meth:`steady` was asked."""
        if self._device.type != "cuda":
            return None
        self._cuda.synchronize(self._device)
        most: int = self._cuda.max_memory_allocated(self._device) - self._before
        return most

    def _held(self) -> int:
        if self._device.type != "cuda":
            return 0
        self._cuda.synchronize(self._device)
        held: int = self._cuda.memory_allocated(self._device)
        return held
