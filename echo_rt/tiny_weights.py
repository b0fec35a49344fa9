"""The tensors of the small random model: drawn at random, but so that its videos are coloured clouds in motion.

Plain random weights make a different picture of noise of every frame. Three arrangements change that, all of them
ordinary values of ordinary weights:

- the VAE's convolutions blur: a random mixture of channels times a fixed [1 2 1] kernel in every direction;
- the transformer's residual stream has two halves, the latents *seen* and what is *made* of them. One attention
  head of each layer looks around its own place, because the biases of q and k outweigh the rest and rotary embedding
  turns equal vectors into a preference for one displacement, and writes a recoloured copy of what it sees there into
  the half that is made. The head's output is ``seen - made``, a flow that replaces noise by what the neighbours show;
- displacements differ from layer to layer, so what is seen drifts.

Everything else (text, memory, the second head, the feed-forward layers) is random and pulls the clouds about.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

from echo_rt.config import ModelConfig, TextEncoderConfig, TransformerConfig, VaeConfig
from echo_rt.weights.shapes import Shapes, memory_shapes, text_encoder_shapes, transformer_shapes, vae_shapes

Tensors = dict[str, Tensor]

_NORMS = ("norm", "gamma", "connector_proj.3")
_SMALL = 0.05  # of what should be near a constant: norm weights, biases
# The transformer's balance; found by looking at the frames.
_SEEN = 1.4
_MADE = 2.4  # strength of what the local heads made against what is seen
_FOCUS = 3.0  # how sharply the local heads look at one place
_HEAD_RANDOM = 0.3  # output of the other heads
_RECOLOUR = 0.3  # how far a layer turns the colours
_WITHIN_PATCH = 0.3  # how much of the detail inside a patch survives a layer
_TEXT, _TEXT_FOCUS = 0.6, 1.5
_FFN_GATE = 0.3
_SURROUND=1.1
_WIDE=.5
_DRIFTS = ((1.0, 0.0, 0.0), (1.0, 0.6, 0.4), (1.0, -0.4, 0.7))  # frames back, rows, columns; in turn
# The VAE's.
_BLUR = (0.25, 0.5, 0.25)
_GRAIN = 0.15  # of each convolution, random
_VAE_BRANCH = 0.5
_CONTRAST = 0.8
_GATE_BIAS = 2.0  # the memory's gate begins near "keep"


class Draw:
    """Normal random tensors (float64) that depend on a seed and a name alone, not on the order of drawing."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __call__(self, name: str, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed}/{name}".encode()))
        return torch.randn(shape, generator=generator, dtype=torch.float64)


def _plain(draw: Draw, name: str, shape: tuple[int, ...]) -> Tensor:
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


def _plain_all(draw: Draw, shapes: Shapes) -> Tensors:
    return {name: _plain(draw, name, shape) for name, shape in shapes.items()}


def _orthogonal(draw: Draw, name: str, size: int) -> Tensor:
    return torch.linalg.qr(draw(name, size, size)).Q


def text_encoder_tensors(config: TextEncoderConfig, draw: Draw) -> Tensors:
    """The umT5 encoder, plain random."""
    return _plain_all(draw, text_encoder_shapes(config))


def memory_tensors(config: ModelConfig, draw: Draw) -> Tensors:
    """The memory encoder, plain random but for its gate."""
    tensors = _plain_all(draw, memory_shapes(config))
    tensors["gate_linear.bias"] += _GATE_BIAS
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
    tensors["time_projection.1.weight"] *= 0.1

    uneven = _uneven_patches(config, seen, made)
    for layer in range(config.num_layers):
        block = f"blocks.{layer}"
        tensors[f"{block}.modulation"][:, 2] += 1  # the gate of self-attention
        tensors[f"{block}.modulation"][:, 5] += _FFN_GATE
        for norm in ("norm_q", "norm_k"):
            tensors[f"{block}.cross_attn.{norm}.weight"] *= _TEXT_FOCUS
        tensors[f"{block}.cross_attn.o.weight"] *= _TEXT
        tensors[f"{block}.self_attn.o.weight"] *= _HEAD_RANDOM
        # Whatever writes the same to many tokens must not write a pattern into the patch: it would show as a grid.
        for writer in ("self_attn.o", "cross_attn.o", "ffn.2"):
            for part in ("weight", "bias"):
                tensor = tensors[f"{block}.{writer}.{part}"]
                tensor -= uneven @ (uneven.T @ tensor)
        _look_around(config, tensors, f"{block}.self_attn", _DRIFTS[layer % len(_DRIFTS)])
        recoloured = scale * made @ _recolour(config, draw, f"{block}.colours") / config.num_layers
        local, wide = slice(0, config.head_dim), slice(config.head_dim, 2 * config.head_dim)
        for head in (local, wide):
            tensors[f"{block}.self_attn.v.weight"][head] = seen.T / scale
        tensors[f"{block}.self_attn.o.weight"][:, local] += recoloured
        tensors[f"{block}.self_attn.o.weight"][:, wide] -= _SURROUND * recoloured
        for part in "qk": tensors[f"{block}.self_attn.norm_{part}.weight"][wide] *= _WIDE
    return tensors


def _look_around(config: TransformerConfig, tensors: Tensors, name: str, drift: tuple[float, float, float]) -> None:
    """Make the first head attend by place: most to the token that lies ``drift`` (frames, rows, columns) behind."""
    head = slice(0, config.head_dim)
    angles = []
    for channels, distance in zip(config.rope_dims, drift, strict=True):
        exponents = torch.arange(0, channels, 2, dtype=torch.float64) / channels
        angles.append(distance * config.rope_theta**-exponents)
    turn = torch.cat(angles)
    for part, angle in (("q", torch.zeros_like(turn)), ("k", turn)):
        tensors[f"{name}.{part}.weight"][head] *= 0.2
        tensors[f"{name}.{part}.bias"][head] = torch.stack((angle.cos(), angle.sin()), dim=-1).flatten()
        tensors[f"{name}.norm_{part}.weight"][head] *= _FOCUS


def _recolour(config: TransformerConfig, draw: Draw, name: str) -> Tensor:
    """A rotation of the latent's channels times a blur inside the patch, ``[patch, patch]``."""
    noise = draw(name, config.in_channels, config.in_channels) / math.sqrt(config.in_channels)
    rotation = torch.linalg.matrix_exp(_RECOLOUR * (noise - noise.T))
    area = config.patch_area
    mean = torch.full((area, area), 1 / area, dtype=torch.float64)
    detail = _WITHIN_PATCH * torch.eye(area, dtype=torch.float64) + (1 - _WITHIN_PATCH) * mean
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
    gain = _VAE_BRANCH if "residual.6" in name else 1.0
    if name.startswith("decoder.head"):
        gain, mix = _CONTRAST, _colours(draw, name, out, channels)
    elif "resample" in name:
        mix = math.sqrt(2) * draw(f"mix/{name}", out, channels) / math.sqrt(channels)
    else:
        mix = draw(f"mix/{name}", out, channels) / math.sqrt(channels)
        if "residual" in name: mix = mix - mix.mean(1, keepdim=True)
    kernel = torch.ones((), dtype=torch.float64)
    for size in grain.shape[2:]:
        taps = torch.tensor(_BLUR if size == len(_BLUR) else [1.0], dtype=torch.float64)
        kernel = kernel[..., None] * taps
    return gain * (mix.view(out, channels, *(1,) * kernel.dim()) * kernel + _GRAIN * grain)


def _colours(draw: Draw, name: str, out: int, channels: int) -> Tensor:
    """Rows for red, green and blue: of unit length, sum zero (SiLU's outputs have a mean) and unlike one another."""
    mix = draw(f"mix/{name}", out, channels)
    return torch.linalg.qr((mix - mix.mean(1, keepdim=True)).T).Q.T
