"""The decoders of :mod:`echo_rt.bench.vae_contestants` made one after the other, held against float32, and timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from echo_rt.bench.agreement import difference
from echo_rt.bench.device_bytes import DeviceBytes
from echo_rt.bench.environment import environment
from echo_rt.bench.model_sizes import MODELS, RELEASED, TINY
from echo_rt.bench.peers import ROUNDINGS, Missing
from echo_rt.bench.random_tensors import RandomTensors
from echo_rt.bench.timing import DEVICE_CLOCK, Timer, Times, timer_for
from echo_rt.bench.vae_contestants import DIFFUSERS, OURS, PUBLISHED, Contestant, Setting, diffusers, ours, published
from echo_rt.bench.vae_published import PublishedDecoder
from echo_rt.bench.vae_work import Stage, decoder_stages
from echo_rt.errors import BackendError, ConfigError
from echo_rt.ops.backends import Backend, choose_backend
from echo_rt.ops.noise import fill_normal, seed_words
from echo_rt.options import latent_size
from echo_rt.utils.device import model_context, parse_device, parse_dtype, warn_of_faulty_convolutions
from echo_rt.utils.wording import first_line
from echo_rt.verify.bundles import bound_between
from echo_rt.weights.shapes import vae_shapes

_MAKERS: dict[str, Callable[[Setting], Contestant]] = {OURS: ours, PUBLISHED: published, DIFFUSERS: diffusers}
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
    contestant = _MAKERS[name](setting)
    contestant.block()  # begins the stream
    steady = taken.steady()
    video = contestant.block()
    memory = Memory(contestant.state_bytes(), steady, taken.peak())
    error = difference(video.float().cpu(), expected)
    del video
    # Random weights are less kind than those that the golden bundles' bounds are for; others round more often.
    bound = bound_between(setting.dtype) * (1 if name == OURS else ROUNDINGS)
    measured = Measured(contestant.name, contestant.what, error, bound, memory, kinds=contestant.kinds)
    if not measured.ok:
        return measured
    measured.whole = timer.measure(contestant.block, blocks, warmup)
    for index in range(len(setting.stages)):
        measured.stages.append(timer.measure(contestant.stage(index), blocks, warmup))
        if contestant.convolutions is not None:
            measured.convolutions.append(timer.measure(contestant.convolutions(index), blocks, warmup))
    return measured
