"""The decoders that are measured beside one another: ours, the published structure in eager torch, and diffusers'.

All have the same weights and decode the same latents, again and again in mid-stream. Each can also do one stage alone,
for all frames of a block, with random activations.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from echo_rt.bench.peers import wan_autoencoder
from echo_rt.bench.vae_published import PublishedDecoder
from echo_rt.bench.vae_work import Frames, Stage
from echo_rt.config import VaeConfig
from echo_rt.convolution import ConvolutionCandidate
from echo_rt.engine.decoding import convolutions_in_words, fit_decoder
from echo_rt.model.vae_decoder import VaeDecoder
from echo_rt.model.vae_layers import CausalConv, EnlargingConv, Terms, VaeWeights
from echo_rt.ops.schema import Ops
from echo_rt.weights.shapes import vae_decoder_shapes

OURS, PUBLISHED, DIFFUSERS = "echo-rt", "published structure, eager torch", "diffusers AutoencoderKLWan"


@dataclass(frozen=True)
class Setting:
    """What is decoded: normalized ``latents [T, z, h, w]`` float32 on the device, and the ``stages`` of that.

    ``convolution``: how ours computes its convolutions; None for a trial.
    """

    config: VaeConfig
    tensors: Mapping[str, Tensor]
    ops: Ops
    device: torch.device
    dtype: torch.dtype
    latents: Tensor
    stages: list[Stage]
    convolution: str | None = None

    def activation(self, size: Frames) -> Tensor:
        """Random ``[frames, height, width, channels]``."""
        return torch.randn(size, device=self.device).to(self.dtype)

    def channels_first(self, size: Frames) -> list[Tensor]:
        """The same for each latent, ``[1, C, T, H, W]``."""
        parts = self.activation(size).chunk(len(self.latents))
        return [part.permute(3, 0, 1, 2).unsqueeze(0).contiguous() for part in parts]


@dataclass(frozen=True)
class Contestant:
    """``block``: the latents' video ``[F, H, W, 3]``; a first call begins a stream, any other is in its midst.

    ``stage``: of a stage's number, what does that stage alone; ``convolutions``: what does its convolutions alone,
    where that can be had. Their input is made when they are asked for, and held as long as they are.
    ``state_bytes``: what is remembered of a stream, counted. ``kinds``: how each convolution is computed, by its name.
    """

    name: str
    what: str
    block: Callable[[], Tensor]
    stage: Callable[[int], Callable[[], object]]
    state_bytes: Callable[[], int]
    convolutions: Callable[[int], Callable[[], object]] | None = None
    kinds: Mapping[str, str] = field(default_factory=dict)


def ours(setting: Setting) -> Contestant:
    """:class:`VaeDecoder`, with a state for the latents of a block."""
    decoder = VaeDecoder(setting.config, setting.tensors, setting.ops, device=setting.device, dtype=setting.dtype)
    latents, _, height, width = setting.latents.shape
    attention, ways = fit_decoder(decoder, (latents, height, width), setting.ops, setting.convolution)
    shapes = decoder.convolution_shapes(height, width, latents)
    kinds = {name: ways[shape].kind for name, shape in shapes.items()}
    state = decoder.new_state(height, width, latents)
    levels = len(decoder.levels)

    def slices(index: int) -> int:
        """How many frames a stage takes at once."""
        if index < levels:
            return state.frames_at_once[index]
        return state.frames_at_once[-1] * setting.stages[-1].given.frames // setting.stages[-2].given.frames

    def stage(index: int) -> Callable[[], object]:
        parts = setting.activation(setting.stages[index].given).split(slices(index))

        def call() -> None:
            for part in parts:
                if index == levels:
                    decoder.head(Terms(part), state.windows, keep=False).total()
                else:
                    terms = Terms(part) if index else decoder.enter(part, state.windows)
                    decoder.levels[index](terms, state.windows, False).total()

        return call

    def convolutions(index: int) -> Callable[[], object]:
        given = setting.stages[index].given.frames
        counts = [min(slices(index), given - at) for at in range(0, given, slices(index))]
        return convolutions_alone(setting, index, counts, kinds)

    return Contestant(
        OURS,
        f"the decoder of this package on the backend {setting.ops.name}, {latents} latents in one call; "
        f"its attention: {attention.attention.name}; its convolutions: {convolutions_in_words(ways)}",
        lambda: decoder.decode(setting.latents, state),
        stage,
        lambda: state.nbytes,
        convolutions,
        {name: kind.name for name, kind in kinds.items()},
    )


def convolutions_alone(
    setting: Setting, index: int, counts: list[int], kinds: Mapping[str, ConvolutionCandidate]
) -> Callable[[], object]:
    """The convolutions of a stage of ours, which takes so many frames after one another, and nothing between them."""
    stage = setting.stages[index]
    shapes = vae_decoder_shapes(setting.config)
    weights = VaeWeights(setting.tensors, shapes, "vae bench", device=setting.device, dtype=setting.dtype)
    calls: list[Callable[[], object]] = []
    inputs: dict[Frames, Tensor] = {}  # by size: what is in them changes no time

    def random(size: Frames) -> Tensor:
        return inputs.setdefault(size, setting.activation(size))

    for product in stage.convolutions:
        name = product.name.removesuffix(".weight")
        conv = CausalConv(name, weights) if product.is_causal else EnlargingConv(name, weights)
        conv.use(kinds[name])
        past, scale = (conv.past, 1) if isinstance(conv, CausalConv) else (0, 2)
        size = (product.height // scale, product.width // scale, product.shape[1])
        for count in counts:
            frames = count * product.frames // stage.given.frames
            calls.append(partial(conv, random(Frames(past + frames, *size))))
    return lambda: [call() for call in calls]


def published(setting: Setting) -> Contestant:
    """:class:`PublishedDecoder`."""
    decoder = PublishedDecoder(setting.config, setting.tensors, device=setting.device, dtype=setting.dtype)

    def stage(index: int) -> Callable[[], object]:
        parts = setting.channels_first(setting.stages[index].given)
        return lambda: [decoder.stages[index](part, decoder.cache, False) for part in parts]

    return Contestant(
        PUBLISHED,
        "one latent at a time, channels first, its own cache of features: cloned, put before the new frames and padded",
        lambda: decoder.decode(setting.latents, is_start=not decoder.cache)[0].permute(1, 2, 3, 0),
        stage,
        lambda: decoder.state_bytes,
    )


def diffusers(setting: Setting) -> Contestant:
    """``AutoencoderKLWan``; :class:`BackendError` where diffusers is not installed."""
    vae = wan_autoencoder(setting.config, setting.tensors, setting.device, setting.dtype)
    version = importlib.import_module("diffusers").__version__
    vae.encoder = None  # it takes no part, and would be counted among the bytes
    decoder, cache = vae.decoder, vae._feat_map
    mean, std = (
        torch.tensor(values, device=setting.device)[:, None, None]
        for values in (setting.config.latents_mean, setting.config.latents_std)
    )
    latents = (setting.latents * std + mean).transpose(0, 1)[None].to(setting.dtype)
    # Each convolution that looks back has its place in the cache, in the order in which they are met.
    causal = [[product.name for product in stage.products if product.is_causal] for stage in setting.stages]
    places = list(itertools.accumulate(map(len, causal), initial=0))

    def block() -> Tensor:
        is_start = cache[0] is None
        x = vae.post_quant_conv(latents)
        frames = []
        for place in range(x.shape[2]):
            starts = {"first_chunk": True} if is_start and place == 0 else {}
            frames.append(decoder(x[:, :, place : place + 1], feat_cache=cache, feat_idx=[0], **starts))
        return torch.cat(frames, 2)[0].permute(1, 2, 3, 0)

    def one(index: int, x: Tensor) -> Tensor:
        place = [places[index]]
        if index == len(setting.stages) - 1:
            video: Tensor = decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x)), cache[places[index]])
            return video
        if index == 0:
            place = [1]
            x = decoder.mid_block(decoder.conv_in(x, cache[0]), feat_cache=cache, feat_idx=place)
        else:
            x = decoder.up_blocks[index - 1].upsamplers[0](x, feat_cache=cache, feat_idx=place)
        for resnet in decoder.up_blocks[index].resnets:
            x = resnet(x, feat_cache=cache, feat_idx=place)
        return x

    def stage(index: int) -> Callable[[], object]:
        parts = setting.channels_first(setting.stages[index].given)
        return lambda: [one(index, part) for part in parts]

    return Contestant(
        DIFFUSERS,
        f"the decoder of diffusers {version}, one latent at a time, its own cache kept from call to call",
        block,
        stage,
        lambda: sum(tensor.nbytes for tensor in cache if isinstance(tensor, Tensor)),
    )
