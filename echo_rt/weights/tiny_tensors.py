"""The tensors of the small random model: drawn at random, but so that its videos are coloured clouds in motion.

Plain random weights make a new picture of noise of every frame. Three arrangements change that; all of them are
ordinary values of ordinary weights:

- The VAE's decoder blurs: its convolutions are random mixtures of channels times [1 2 1] in every direction.
- The transformer's residual stream has two halves, the latents that are *seen* and what is *made* of them. In each
  layer one head looks around its own place and one looks everywhere, and both write what they see there, a little
  recoloured, into the half that is made: the first adds, the second subtracts, so that patterns grow and one flat
  colour does not. The head's output is ``seen - made``: a flow from the noise that is seen to what was made.
- To look around its own place, a head needs biases of q and k that outweigh the rest: rotary embedding turns two
  constant vectors into a preference for one displacement. It differs from layer to layer, so the clouds drift.

Everything else (text, memory, feed-forward layers) is random and pulls the clouds about.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

from echo_rt.config import ModelConfig, TextEncoderConfig, TransformerConfig, VaeConfig
from echo_rt.weights.shapes import Shapes, memory_shapes, text_encoder_shapes, transformer_shapes, vae_shapes
from echo_rt.weights.tensors import LazyTensors
from echo_rt.weights.tiny_vae import TinyVaeConfig, tiny_decoder_shapes

Tensors = dict[str, Tensor]

_NORMS = ("norm", "gamma", "connector_proj.3")
_GATE_ROWS = (2, 5)  # of a block's modulation: self-attention's, the feed-forward layer's
_SMALL = 0.05  # spread of what is near a constant: norm weights, biases

# The transformer's balance, found by looking at frames.
_SEEN, _MADE = 1.4, 2.4  # of the flow
_FOCUS = 3.5  # how sharply the local heads look at one place
_SURROUND, _WIDE = 1.5, 0.5  # weight of the wide heads, and how little they prefer one place
_HEAD_NOISE = 0.3  # random part of what the heads write
_RECOLOUR = 0.3  # how far a layer turns the colours
_PATCH_DETAIL = 0.3  # how much of the detail inside a patch survives a layer
_TEXT, _TEXT_FOCUS = 0.4, 1.5
_FFN_GATE = 0.3
_LOCAL_CONTENT = 0.2  # how much the local heads look at what is there, beside where it is
_TIME = 0.1
_DRIFTS = ((1.0, 0.0, 0.0), (1.0, 0.6, 0.4), (1.0, -0.4, 0.7))  # frames back, rows, columns; layers take turns

# The VAE's.
_BLUR = (0.25, 0.5, 0.25)
_GRAIN = 0.15  # random part of each convolution
_BRANCH = 0.5  # of a residual block
_CONTRAST = 0.8
_TINY_CONTRAST = 1.4  # of what leads from level to level: a ReLU and a blur take a part of it

_GATE, _GATE_BIAS = "gate_linear.bias", 2.0  # the memory's gate begins near "keep"


class Draw:
    """Normal random tensors that depend on a seed, a name and the kind of device, not on the order of drawing."""

    def __init__(self, seed: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64) -> None:
        self._seed, self._device, self._dtype = seed, device, dtype

    def __call__(self, name: str, *shape: int) -> Tensor:
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(f"{self._seed}/{name}".encode()))
        return torch.randn(shape, generator=generator, device=self._device, dtype=self._dtype)


def plain_tensor(draw: Draw, name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor at the scale that keeps amplitudes: unit gain for matrices, near 1 for norms, near 0 for biases."""
    x = draw(name, *shape)
    if name.endswith(".bias"):
        return _SMALL * x
    if any(norm in name for norm in _NORMS):
        return 1 + _SMALL * x
    if name.endswith("modulation"):
        return x / math.sqrt(shape[-1])
    if name.endswith("query_init"):
        return x
    return x / math.sqrt(math.prod(shape[1:]))


class RandomTensors(LazyTensors):
    """Plain random weights of these ``shapes``: float32 on ``device``, drawn anew whenever they are asked for.

    A model of any size can be made of them without anyone holding them in between.
    """

    def __init__(self, shapes: Shapes, device: torch.device, seed: int = 0) -> None:
        super().__init__(shapes)
        self._shapes, self._draw = shapes, Draw(seed, device, torch.float32)

    def __getitem__(self, name: str) -> Tensor:
        tensor = plain_tensor(self._draw, name, self._shapes[name])
        return tensor.add_(_GATE_BIAS) if name == _GATE else tensor


def _plain_all(draw: Draw, shapes: Shapes) -> Tensors:
    return {name: plain_tensor(draw, name, shape) for name, shape in shapes.items()}


def _orthogonal(draw: Draw, name: str, size: int) -> Tensor:
    basis: Tensor = torch.linalg.qr(draw(name, size, size)).Q
    return basis


def text_encoder_tensors(config: TextEncoderConfig, draw: Draw) -> Tensors:
    """The umT5 encoder, plain random."""
    return _plain_all(draw, text_encoder_shapes(config))


def memory_tensors(config: ModelConfig, draw: Draw) -> Tensors:
    """The memory encoder, plain random but for its gate."""
    tensors = _plain_all(draw, memory_shapes(config))
    tensors[_GATE] += _GATE_BIAS
    return tensors


def nudged(tensors: Tensors, draw: Draw, amount: float) -> Tensors:
    """Every tensor a little changed, as if trained further: noise of ``amount`` times its own spread."""
    return {
        name: tensor + amount * tensor.std() * draw(f"nudge/{amount}/{name}", *tensor.shape)
        for name, tensor in tensors.items()
    }


def transformer_tensors(config: TransformerConfig, draw: Draw) -> Tensors:
    """The transformer; needs ``head_dim`` = patch channels and ``dim`` at least twice that."""
    patch = config.in_channels * config.patch_area
    assert config.head_dim == patch and config.dim >= 2 * patch, "the local heads hold one patch"
    tensors = _plain_all(draw, transformer_shapes(config))
    basis = _orthogonal(draw, "basis", config.dim)
    seen, made = basis[:, :patch], basis[:, patch : 2 * patch]
    scale = math.sqrt(config.dim / patch)  # a patch of unit variance makes a token of unit variance

    tensors["patch_embedding.weight"] = (scale * seen).reshape(tensors["patch_embedding.weight"].shape)
    tensors["patch_embedding.bias"].zero_()
    flow = (_SEEN * seen - _MADE * made).T / scale
    # The patch embedding's channels come first, the head's last.
    tensors["head.head.weight"] = flow.unflatten(0, (config.in_channels, -1)).transpose(0, 1).flatten(0, 1)
    tensors["head.head.bias"].zero_()
    tensors["time_projection.1.weight"] *= _TIME

    uneven = _uneven_patches(config, seen, made)
    for layer in range(config.num_layers):
        block = f"blocks.{layer}"
        tensors[f"{block}.modulation"][:, _GATE_ROWS[0]] += 1
        tensors[f"{block}.modulation"][:, _GATE_ROWS[1]] += _FFN_GATE
        for norm in ("norm_q", "norm_k"):
            tensors[f"{block}.cross_attn.{norm}.weight"] *= _TEXT_FOCUS
        tensors[f"{block}.cross_attn.o.weight"] *= _TEXT
        tensors[f"{block}.self_attn.o.weight"] *= _HEAD_NOISE
        # What is written to many tokens alike must not hold a pattern inside the patch: it would show as a grid.
        for writer in ("self_attn.o", "cross_attn.o", "ffn.2"):
            for part in ("weight", "bias"):
                tensor = tensors[f"{block}.{writer}.{part}"]
                tensor -= uneven @ (uneven.T @ tensor)
        recoloured = scale / config.num_layers * made @ _recolour(config, draw, f"{block}.colours")
        _arrange_heads(config, tensors, f"{block}.self_attn", seen.T / scale, recoloured, _DRIFTS[layer % len(_DRIFTS)])
    return tensors


def _arrange_heads(
    config: TransformerConfig, tensors: Tensors, name: str, read: Tensor, write: Tensor, drift: tuple[float, ...]
) -> None:
    """The first head looks at the token ``drift`` (frames, rows, columns) behind, the second everywhere."""
    local, wide = slice(0, config.head_dim), slice(config.head_dim, 2 * config.head_dim)
    angles = []
    for channels, distance in zip(config.rope_dims, drift, strict=True):
        exponents = torch.arange(0, channels, 2, dtype=torch.float64) / channels
        angles.append(distance * config.rope_theta**-exponents)
    turn = torch.cat(angles)
    for part, angle in (("q", torch.zeros_like(turn)), ("k", turn)):
        tensors[f"{name}.{part}.weight"][local] *= _LOCAL_CONTENT
        tensors[f"{name}.{part}.bias"][local] = torch.stack((angle.cos(), angle.sin()), dim=-1).flatten()
        tensors[f"{name}.norm_{part}.weight"][local] *= _FOCUS
        tensors[f"{name}.norm_{part}.weight"][wide] *= _WIDE
    for head, sign in ((local, 1.0), (wide, -_SURROUND)):
        tensors[f"{name}.v.weight"][head] = read
        tensors[f"{name}.o.weight"][:, head] += sign * write


def _recolour(config: TransformerConfig, draw: Draw, name: str) -> Tensor:
    """A rotation of the latent's channels times a blur inside the patch, ``[patch, patch]``."""
    noise = draw(name, config.in_channels, config.in_channels) / math.sqrt(config.in_channels)
    rotation = torch.linalg.matrix_exp(_RECOLOUR * (noise - noise.T))
    area = config.patch_area
    mean = torch.full((area, area), 1 / area, dtype=torch.float64)
    detail = _PATCH_DETAIL * torch.eye(area, dtype=torch.float64) + (1 - _PATCH_DETAIL) * mean
    return torch.kron(rotation, detail)


def _uneven_patches(config: TransformerConfig, *halves: Tensor) -> Tensor:
    """Orthonormal columns that span, in each half of the stream, the patches whose mean is zero."""
    area = config.patch_area
    ones = torch.ones(area, 1, dtype=torch.float64)
    contrasts = torch.linalg.qr(ones, mode="complete").Q[:, 1:].contiguous()
    spread = torch.kron(torch.eye(config.in_channels, dtype=torch.float64), contrasts)
    return torch.cat([half @ spread for half in halves], dim=1)


def vae_tensors(config: VaeConfig, draw: Draw) -> Tensors:
    """The VAE: a blurring decoder, a plain random encoder (which does not invert it)."""
    tensors = _plain_all(draw, vae_shapes(config))
    for name, tensor in tensors.items():
        if name.startswith("decoder.") and name.endswith(".weight"):
            tensors[name] = _smoothed(draw, name, tensor)
    # The decoder is given latents * std + mean; its first layer takes that back, so that channels weigh the same.
    mix = _orthogonal(draw, "latents", config.z_dim)
    mean = torch.tensor(config.latents_mean, dtype=torch.float64)
    unit = mix / torch.tensor(config.latents_std, dtype=torch.float64)
    tensors["conv2.weight"], tensors["conv2.bias"] = unit[..., None, None, None], -unit @ mean
    return tensors


def _smoothed(draw: Draw, name: str, grain: Tensor) -> Tensor:
    """A decoder's weight: what the layer is for, plus a little of the plain random ``grain``."""
    out, channels = grain.shape[:2]
    if name.endswith("time_conv.weight"):
        # The earlier frame of a pair lies half-way between the past and the present, the later one is the present.
        keep = torch.eye(channels, dtype=torch.float64)[..., None]
        halfway, present = torch.tensor([0, 0.5, 0.5]), torch.tensor([0, 0, 1.0])
        return torch.cat((keep * halfway, keep * present))[..., None, None] + _GRAIN * grain
    mix: Tensor = draw(f"mix/{name}", out, channels) / math.sqrt(channels)
    if name.startswith("decoder.head"):
        mix = _CONTRAST * torch.linalg.qr(_sum_zero(mix).T).Q.T  # red, green and blue unlike one another
    elif "residual" in name:
        mix = _sum_zero(mix) * (_BRANCH if ".residual.6." in name else 1.0)
    elif "resample" in name:
        mix *= math.sqrt(2)  # half as many channels come out, and blurred
    kernel = torch.ones((), dtype=torch.float64)
    for size in grain.shape[2:]:
        taps = torch.tensor(_BLUR if size == len(_BLUR) else [1.0], dtype=torch.float64)
        kernel = kernel[..., None] * taps
    smooth: Tensor = mix.view(out, channels, *(1,) * kernel.dim()) * kernel
    smooth += _GRAIN * mix.norm() / math.sqrt(out) * grain
    return smooth


def tiny_decoder_tensors(config: TinyVaeConfig, draw: Draw) -> Tensors:
    """A tiny decoder, blurring like the VAE's, though it makes other clouds of the same latents."""
    tensors = _plain_all(draw, tiny_decoder_shapes(config))
    for name, tensor in tensors.items():
        out, channels = tensor.shape[:2] if tensor.dim() > 1 else (len(tensor), 1)
        if name == f"{config.head}.bias":
            tensor.fill_(0.5)  # colours are in [0, 1]
        elif tensor.dim() == 1:
            continue
        elif tensor.shape[-1] == 1:  # the frames that one grows to are that one, nearly
            keep = torch.eye(channels, dtype=torch.float64).repeat(out // channels, 1)
            tensors[name] = keep[..., None, None] + _GRAIN * tensor
        else:
            mix = _sum_zero(draw(f"mix/tiny/{name}", out, channels) / math.sqrt(channels))
            if ".conv." in name:
                mix *= _BRANCH if ".conv.4." in name else 1.0
            else:
                mix = _TINY_CONTRAST * torch.linalg.qr(mix.T).Q.T
            taps = torch.tensor(_BLUR, dtype=torch.float64)
            tensors[name] = mix[..., None, None] * (taps[:, None] * taps) + _GRAIN * tensor
    return tensors


def _sum_zero(mix: Tensor) -> Tensor:
    """Rows that sum to zero: what comes out of a SiLU has a mean, which would tint everything."""
    return mix - mix.mean(1, keepdim=True)
