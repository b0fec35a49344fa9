"""The decoders that are measured beside one another: ours, the published structure in eager torch, and diffusers'.

All have the same weights and decode the same latents, again and again in mid-stream. Each can also do one stage alone,
for all frames of a block, with random activations.

A stage is a resolution: the upsampling to it, and the blocks that follow. The lowest one also has the first convolution
and the middle; the last convolution, which makes colours, is a stage of its own. Its arithmetic is counted from the
shapes of the weights, the same for all decoders.
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from baselines import wan_autoencoder, wan_decode, wan_latents
from torch import Tensor
from torch.nn import functional

from echo_rt.config import VaeConfig
from echo_rt.convolution import ConvolutionCandidate
from echo_rt.engine.decoding import convolutions_in_words, fit_decoder
from echo_rt.model.vae_decoder import VaeDecoder
from echo_rt.model.vae_layers import CausalConv, EnlargingConv, Terms, VaeWeights
from echo_rt.ops.schema import Ops
from echo_rt.weights.shapes import vae_decoder_shapes

OURS, PUBLISHED, DIFFUSERS = "echo-rt", "published structure, eager torch", "diffusers AutoencoderKLWan"
HEAD = "head"
_TIME, _SPACE, _QKV = ".time_conv.weight", ".resample.1.weight", ".to_qkv.weight"
Cache = dict[str, Tensor]
# Takes the activation and the cache, and whether this is a stream's first latent.
StageCall = Callable[[Tensor, Cache, bool], Tensor]
_PAST = 2


class Frames(NamedTuple):
    """Size of an activation: so many frames of so many pixels and channels."""

    frames: int
    height: int
    width: int
    channels: int


@dataclass(frozen=True)
class Product:
    """One convolution or matrix product: its weight, and how many frames of which size it makes."""

    name: str
    shape: tuple[int, ...]
    frames: int
    height: int
    width: int

    @property
    def flops(self) -> int:
        """Twice the multiply-adds."""
        return 2 * math.prod(self.shape) * self.frames * self.height * self.width

    @property
    def is_causal(self) -> bool:
        """Whether it looks back in time."""
        return len(self.shape) == 5 and self.shape[2] > 1

    @property
    def is_convolution(self) -> bool:
        """Whether it looks at more than one point."""
        return math.prod(self.shape[2:]) > 1


@dataclass
class Stage:
    """One resolution: what it is given, and what is done there; ``attention`` is FLOPs that no weight has part in."""

    name: str
    given: Frames
    products: list[Product] = field(default_factory=list)
    attention: int = 0

    @property
    def flops(self) -> int:
        return self.attention + sum(product.flops for product in self.products)

    @property
    def convolutions(self) -> list[Product]:
        return [product for product in self.products if product.is_convolution]


def decoder_stages(config: VaeConfig, latent_height: int, latent_width: int, latents: int) -> list[Stage]:
    """The stages of ``latents`` latents in mid-stream, from the lowest resolution to the head."""
    frames, height, width, channels = latents, latent_height, latent_width, config.z_dim
    stages: list[Stage] = []

    def begin(name: str) -> None:
        stages.append(Stage(name, Frames(frames, height, width, channels)))

    begin(f"{width}x{height}")
    weights = {name: shape for name, shape in vae_decoder_shapes(config).items() if name.endswith(".weight")}
    for name, shape in weights.items():
        enlarges = name.endswith(_SPACE)
        if name.endswith(_TIME) or (enlarges and name.replace(_SPACE, _TIME) not in weights):
            begin(f"{2 * width}x{2 * height}")
        elif name.startswith("decoder.head."):
            begin(HEAD)
        if enlarges:
            height, width = 2 * height, 2 * width
        stages[-1].products.append(Product(name, shape, frames, height, width))
        if name.endswith(_QKV):
            # Scores, and sums weighted by them, of each frame's pixels among themselves.
            stages[-1].attention += 2 * 2 * frames * (height * width) ** 2 * shape[1]
        elif name.endswith(_TIME):
            frames *= 2
        else:
            channels = shape[0]
    return stages


class PublishedDecoder:
    """The decoder as it is published, in eager torch: what most people run, and what ours is measured beside.

    One latent at a time, activations ``[1, C, T, H, W]`` contiguous. Each convolution that looks back keeps clones of
    its last two input frames in ``cache``, puts them before the new ones and pads all of it with zeros; the picture is
    upsampled in float32. Written anew from what it does, so that every pass over memory that it makes is there, and
    none more. ``stages``: one function for each resolution, from the lowest, and one for the head.
    """

    def __init__(
        self, config: VaeConfig, tensors: Mapping[str, Tensor], *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._weights = {name: tensors[name].to(device, dtype).contiguous() for name in vae_decoder_shapes(config)}
        self._mean, self._std = (
            torch.tensor(values, device=device).view(-1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        self._dtype = dtype
        self.cache: Cache = {}
        self.stages: list[StageCall] = [self._lowest(config)]
        index = config.num_res_blocks + 1
        for _ in config.dim_mult[1:]:
            names = [f"decoder.upsamples.{index + 1 + n}" for n in range(config.num_res_blocks + 1)]
            self.stages.append(self._higher(f"decoder.upsamples.{index}", names))
            index += 1 + len(names)
        self.stages.append(self._head)

    def decode(self, latents: Tensor, *, is_start: bool) -> Tensor:
        """The next normalized ``latents [T, z, h, w]`` of the stream as ``[1, 3, F, H, W]``."""
        z = (latents.transpose(0, 1) * self._std + self._mean)[None].to(self._dtype)
        z = functional.conv3d(z, self._weights["conv2.weight"], self._weights["conv2.bias"])
        video: Tensor | None = None
        for place in range(z.shape[2]):
            x = z[:, :, place : place + 1]
            for stage in self.stages:
                x = stage(x, self.cache, is_start and place == 0)
            video = x if video is None else torch.cat([video, x], 2)
        assert video is not None
        return video

    @property
    def state_bytes(self) -> int:
        """Of the frames that are remembered."""
        return sum(tensor.nbytes for tensor in self.cache.values())

    def _lowest(self, config: VaeConfig) -> StageCall:
        def stage(x: Tensor, cache: Cache, is_start: bool) -> Tensor:
            x = self._residual(self._causal(x, "decoder.conv1", cache), "decoder.middle.0", cache)
            x = self._residual(self._attention(x, "decoder.middle.1"), "decoder.middle.2", cache)
            for n in range(config.num_res_blocks + 1):
                x = self._residual(x, f"decoder.upsamples.{n}", cache)
            return x

        return stage

    def _higher(self, upsample: str, blocks: list[str]) -> StageCall:
        def stage(x: Tensor, cache: Cache, is_start: bool) -> Tensor:
            x = self._upsample(x, upsample, cache, is_start)
            for name in blocks:
                x = self._residual(x, name, cache)
            return x

        return stage

    def _head(self, x: Tensor, cache: Cache, is_start: bool) -> Tensor:
        return self._causal(functional.silu(self._norm(x, "decoder.head.0")), "decoder.head.2", cache)

    def _causal(self, x: Tensor, name: str, cache: Cache) -> Tensor:
        weight = self._weights[f"{name}.weight"]
        remembered = x[:, :, -_PAST:].clone()
        before = cache.get(name)
        if remembered.shape[2] < _PAST:
            older = torch.zeros_like(remembered) if before is None else before[:, :, -1:]
            remembered = torch.cat([older, remembered], 2)
        rows, columns = (size // 2 for size in weight.shape[3:])
        if before is not None:
            x = torch.cat([before, x], 2)
        x = functional.pad(x, (columns, columns, rows, rows, 0 if before is not None else _PAST, 0))
        cache[name] = remembered
        return functional.conv3d(x, weight, self._weights[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        gamma = self._weights[f"{name}.gamma"].flatten()
        return functional.normalize(x, dim=1) * math.sqrt(len(gamma)) * gamma.view(-1, *[1] * (x.dim() - 2))

    def _residual(self, x: Tensor, name: str, cache: Cache) -> Tensor:
        shortcut = self._weights.get(f"{name}.shortcut.weight")
        kept = x if shortcut is None else functional.conv3d(x, shortcut, self._weights[f"{name}.shortcut.bias"])
        x = functional.silu(self._norm(x, f"{name}.residual.0"))
        x = self._causal(x, f"{name}.residual.2", cache)
        x = functional.silu(self._norm(x, f"{name}.residual.3"))
        return self._causal(x, f"{name}.residual.6", cache) + kept

    def _attention(self, x: Tensor, name: str) -> Tensor:
        _, channels, frames, height, width = x.shape
        pictures = self._pictures(x)
        qkv = functional.conv2d(
            self._norm(pictures, f"{name}.norm"), self._weights[f"{name}.to_qkv.weight"], self._bias(f"{name}.to_qkv")
        )
        q, k, v = qkv.reshape(frames, 1, 3 * channels, -1).permute(0, 1, 3, 2).contiguous().chunk(3, dim=-1)
        attended = functional.scaled_dot_product_attention(q, k, v)
        attended = attended.squeeze(1).permute(0, 2, 1).reshape(frames, channels, height, width)
        attended = functional.conv2d(attended, self._weights[f"{name}.proj.weight"], self._bias(f"{name}.proj"))
        return attended.view(1, frames, channels, height, width).permute(0, 2, 1, 3, 4) + x

    def _upsample(self, x: Tensor, name: str, cache: Cache, is_start: bool) -> Tensor:
        _, channels, frames, height, width = x.shape
        if f"{name}.time_conv.weight" in self._weights and not is_start:
            pairs = self._causal(x, f"{name}.time_conv", cache).reshape(1, 2, channels, frames, height, width)
            x = torch.stack((pairs[:, 0], pairs[:, 1]), 3).reshape(1, channels, 2 * frames, height, width)
        pictures = functional.interpolate(self._pictures(x).float(), scale_factor=2.0, mode="nearest-exact").type_as(x)
        convolved = functional.conv2d(
            pictures, self._weights[f"{name}.resample.1.weight"], self._bias(f"{name}.resample.1"), padding=1
        )
        frames, channels, height, width = convolved.shape
        return convolved.view(1, frames, channels, height, width).permute(0, 2, 1, 3, 4)

    def _bias(self, name: str) -> Tensor:
        return self._weights[f"{name}.bias"]

    def _pictures(self, x: Tensor) -> Tensor:
        """``[1, C, T, H, W]`` as ``[T, C, H, W]``, as contiguous as it comes to be that way."""
        _, channels, frames, height, width = x.shape
        return x.permute(0, 2, 1, 3, 4).reshape(frames, channels, height, width)


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
class Decoder:
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


def ours(setting: Setting) -> Decoder:
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

    return Decoder(
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


def published(setting: Setting) -> Decoder:
    """:class:`PublishedDecoder`."""
    decoder = PublishedDecoder(setting.config, setting.tensors, device=setting.device, dtype=setting.dtype)

    def stage(index: int) -> Callable[[], object]:
        parts = setting.channels_first(setting.stages[index].given)
        return lambda: [decoder.stages[index](part, decoder.cache, False) for part in parts]

    return Decoder(
        PUBLISHED,
        "one latent at a time, channels first, its own cache of features: cloned, put before the new frames and padded",
        lambda: decoder.decode(setting.latents, is_start=not decoder.cache)[0].permute(1, 2, 3, 0),
        stage,
        lambda: decoder.state_bytes,
    )


def diffusers(setting: Setting) -> Decoder:
    """``AutoencoderKLWan``; :class:`BackendError` where diffusers is not installed."""
    vae = wan_autoencoder(setting.config, setting.tensors, setting.device, setting.dtype)
    version = importlib.import_module("diffusers").__version__
    vae.encoder = None  # it takes no part, and would be counted among the bytes
    decoder, cache = vae.decoder, vae._feat_map
    latents = wan_latents(setting.config, setting.latents, setting.dtype)
    # Each convolution that looks back has its place in the cache, in the order in which they are met.
    causal = [[product.name for product in stage.products if product.is_causal] for stage in setting.stages]
    places = list(itertools.accumulate(map(len, causal), initial=0))

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

    return Decoder(
        DIFFUSERS,
        f"the decoder of diffusers {version}, one latent at a time, its own cache kept from call to call",
        lambda: wan_decode(vae, latents, is_start=cache[0] is None)[0].permute(1, 2, 3, 0),
        stage,
        lambda: sum(tensor.nbytes for tensor in cache if isinstance(tensor, Tensor)),
    )
