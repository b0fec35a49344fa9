"""Wan's diffusion transformer, one block of latent frames at a time.

The caller passes in the cache of self-attention: which keys are kept, attended to and how they are rotated is decided
by the rollout (:mod:`echo_rt.engine.rollout`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from echo_rt.attention import Attention
from echo_rt.config import TransformerConfig
from echo_rt.model.linear import Float8Linear, Linear, Product, feed_forward
from echo_rt.ops.schema import Ops
from echo_rt.utils.device import placed, working_dtype


@dataclass(frozen=True)
class LayerWeights:
    """One transformer block. Norm weights are float32, matrices have the model's dtype or float8."""

    qkv: Product
    norm_q: Tensor
    norm_k: Tensor
    self_out: Linear
    cross_norm_scale: Tensor
    cross_norm_shift: Tensor
    cross_q: Product
    cross_norm_q: Tensor
    cross_k: Linear
    cross_norm_k: Tensor
    cross_v: Linear
    cross_out: Linear
    ffn_in: Product
    ffn_out: Product


class KeyValueCache(Protocol):
    """The keys and values of a pass: where they are stored, and what is attended to."""

    def store(self, index: int, layer: LayerWeights, qkv: Tensor) -> Tensor:
        """Store keys and values of layer ``index`` from its ``qkv [n, 3·dim]``; return its queries ``[n, H, d]``."""

    def attend(self, index: int, q: Tensor) -> Tensor:
        """Return the attention ``[n, dim]`` of the queries of layer ``index``, which see their own new keys too."""


# Of the timestep's sinusoid; equal to rope_theta in Wan, but another constant.
_SINUSOID_BASE = 10000.0


class _Loader:
    """Tensors by their original names, on the model's device and in its dtype.

    ``kept`` names the layers of :meth:`product` that are not quantized.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype, kept: frozenset[str]
    ) -> None:
        self._tensors, self._device, self._dtype, self._kept = tensors, device, dtype, kept

    def matrix(self, name: str) -> Tensor:
        return self._tensors[name].to(self._device, self._dtype)

    def vector(self, name: str) -> Tensor:
        return placed(self._tensors[name], self._device, torch.float32)

    def linear(self, *names: str) -> Linear:
        """Return one linear layer for several projections of the same input, stacked along the output."""
        weights = [self.matrix(f"{name}.weight") for name in names]
        biases = [self.matrix(f"{name}.bias") for name in names]
        if len(names) == 1:
            return Linear(weights[0], biases[0])
        return Linear(torch.cat(weights), torch.cat(biases))

    def product(self, *names: str) -> Product:
        """Return :meth:`linear` in float8, unless kept from it; quantized from the stored, unrounded values."""
        if not self._kept.isdisjoint(names):
            return self.linear(*names)
        weights = [self.vector(f"{name}.weight") for name in names]
        biases = [self.matrix(f"{name}.bias") for name in names]
        return Float8Linear.quantize(torch.cat(weights), torch.cat(biases))

    def linear_float32(self, name: str) -> Linear:
        return Linear(self.vector(f"{name}.weight"), self.vector(f"{name}.bias"))

    def layer(self, index: int) -> LayerWeights:
        block = f"blocks.{index}"
        own, cross = f"{block}.self_attn", f"{block}.cross_attn"
        return LayerWeights(
            qkv=self.product(f"{own}.q", f"{own}.k", f"{own}.v"),
            norm_q=self.vector(f"{own}.norm_q.weight"),
            norm_k=self.vector(f"{own}.norm_k.weight"),
            self_out=self.linear(f"{own}.o"),
            cross_norm_scale=self.vector(f"{block}.norm3.weight"),
            cross_norm_shift=self.vector(f"{block}.norm3.bias"),
            cross_q=self.product(f"{cross}.q"),
            cross_norm_q=self.matrix(f"{cross}.norm_q.weight"),
            cross_k=self.linear(f"{cross}.k"),
            cross_norm_k=self.matrix(f"{cross}.norm_k.weight"),
            cross_v=self.linear(f"{cross}.v"),
            cross_out=self.linear(f"{cross}.o"),
            ffn_in=self.product(f"{block}.ffn.0"),
            ffn_out=self.product(f"{block}.ffn.2"),
        )


class Transformer:
    """The weights of the transformer and its forward pass; ``attention`` is that over the text.

    ``timesteps`` are all that will ever be used: the modulation of every layer is computed for each of them here,
    once (``modulations [timesteps, layers, 6, dim]`` and ``head_modulations [timesteps, 2, dim]``, float32, the
    ``1 +`` of the scales included).

    In dtype float8 the products that :data:`echo_rt.model.linear.FLOAT8_PRODUCTS` names are, but for those in ``kept``
    (:func:`echo_rt.model.linear.kept_from_float8`); everything else is in bfloat16, and so is :attr:`dtype`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        tensors: Mapping[str, Tensor],
        timesteps: list[float],
        ops: Ops,
        attention: Attention,
        *,
        device: torch.device,
        dtype: torch.dtype,
        kept: frozenset[str],
    ) -> None:
        self.config, self.device, self.dtype = config, device, working_dtype(dtype)
        self._ops, self._attention = ops, attention
        load = _Loader(tensors, device, self.dtype, kept)
        self.layers = [load.layer(index) for index in range(config.num_layers)]
        patch_weight = load.matrix("patch_embedding.weight").flatten(1)
        self._patch = Linear(patch_weight, load.matrix("patch_embedding.bias"))
        self._text_in, self._text_out = load.linear("text_embedding.0"), load.linear("text_embedding.2")
        self._head = load.linear("head.head")
        self._build_modulations(load, timesteps)

    def _build_modulations(self, load: _Loader, timesteps: list[float]) -> None:
        half = self.config.freq_dim // 2
        exponents = torch.arange(half, dtype=torch.float64, device=self.device) / half
        t = torch.tensor(timesteps, dtype=torch.float64, device=self.device)
        angles = t[:, None] * _SINUSOID_BASE**-exponents
        sinusoid = torch.cat((angles.cos(), angles.sin()), dim=-1).float()
        hidden = silu(load.linear_float32("time_embedding.0")(sinusoid))
        e = load.linear_float32("time_embedding.2")(hidden)
        e0 = load.linear_float32("time_projection.1")(silu(e)).unflatten(-1, (-1, self.config.dim))
        rows = [load.vector(f"blocks.{index}.modulation") for index in range(self.config.num_layers)]
        self.modulations = torch.cat(rows)[None] + e0[:, None]
        self.modulations[:, :, [1, 4]] += 1
        self.head_modulations = load.vector("head.modulation") + e[:, None]
        self.head_modulations[:, 1] += 1

    def encode_text(self, prompt_embeds: Tensor, text_kv: Tensor) -> None:
        """Write each layer's text keys and values into ``text_kv [layers, 2, text_len, heads, head_dim]``.

        ``prompt_embeds [length <= text_len, text_dim]``; the rest of the text is zeros, which are attended to.
        """
        text = torch.zeros(self.config.text_len, self.config.text_dim, device=self.device, dtype=self.dtype)
        text[: prompt_embeds.shape[0]] = prompt_embeds
        text = self._text_out(self._text_in.then_gelu(text))
        width = text_kv.shape[-2:]
        for layer, (keys, values) in zip(self.layers, text_kv, strict=True):
            normed = rms_norm(layer.cross_k(text), (self.config.dim,), layer.cross_norm_k, self.config.eps)
            keys.copy_(normed.unflatten(-1, width))
            values.copy_(layer.cross_v(text).unflatten(-1, width))

    def flow(self, latents: Tensor, timestep: int, text_kv: Tensor, cache: KeyValueCache) -> Tensor:
        """Return the flow of ``latents [F, C, h, w]`` at ``timesteps[timestep]``, alike and in the model's dtype."""
        x, y = self._enter(latents, timestep)
        for index in range(len(self.layers)):
            y = self._layer(index, x, y, timestep, text_kv[index], cache)
        return self._unpatchify(y, latents)

    def store_keys(self, latents: Tensor, timestep: int, text_kv: Tensor, cache: KeyValueCache) -> None:
        """Run a pass that only stores keys and values: the last layer ends there."""
        x, y = self._enter(latents, timestep)
        last = len(self.layers) - 1
        for index in range(last):
            y = self._layer(index, x, y, timestep, text_kv[index], cache)
        cache.store(last, self.layers[last], y)

    def _enter(self, latents: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
        """Return the residual ``[n, dim]`` and the first layer's queries, keys and values ``[n, 3·dim]``."""
        x = self._patch(self._patchify(latents.to(self.dtype)))
        shift, scale = self.modulations[timestep, 0, :2]
        return x, self.layers[0].qkv.after_norm(self._ops, x, shift, scale, self.config.eps)

    def _layer(
        self, index: int, x: Tensor, qkv: Tensor, timestep: int, text_kv: Tensor, cache: KeyValueCache
    ) -> Tensor:
        """Run a layer on the residual ``x`` (written) and its ``qkv``; return the next ``qkv``, or the output."""
        eps, ops, layer = self.config.eps, self._ops, self.layers[index]
        m = self.modulations[timestep, index]
        y = layer.self_out(cache.attend(index, cache.store(index, layer, qkv)))
        q = layer.cross_q.after_residual_norm(ops, x, y, m[2], layer.cross_norm_shift, layer.cross_norm_scale, eps)
        y = self._cross_attention(layer, q, text_kv)
        y = feed_forward(ops, layer.ffn_in, layer.ffn_out, x, y, m[3], m[4], eps)
        last = index + 1 == len(self.layers)
        shift, scale = self.head_modulations[timestep] if last else self.modulations[timestep, index + 1, :2]
        following: Product = self._head if last else self.layers[index + 1].qkv
        return following.after_residual_norm(ops, x, y, m[5], shift, scale, eps)

    def _cross_attention(self, layer: LayerWeights, q: Tensor, text_kv: Tensor) -> Tensor:
        q = rms_norm(q, (self.config.dim,), layer.cross_norm_q, self.config.eps)
        return layer.cross_out(self._attention(q.unflatten(-1, text_kv.shape[-2:]), text_kv[0], text_kv[1]))

    def _patchify(self, latents: Tensor) -> Tensor:
        """Turn ``[F, C, h, w]`` into tokens ``[F·S, C·patch]`` in the order frame, row, column."""
        _, rows, columns = self.config.patch_size
        patches = latents.unflatten(3, (-1, columns)).unflatten(2, (-1, rows))  # F C h/r r w/c c
        tokens: Tensor = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)
        return tokens

    def _unpatchify(self, tokens: Tensor, like: Tensor) -> Tensor:
        """Invert :meth:`_patchify`, from the head's order: patch row, patch column, channel."""
        frames, channels, height, width = like.shape
        _, rows, columns = self.config.patch_size
        patches: Tensor = tokens.view(frames, height // rows, width // columns, rows, columns, channels)
        # Of a video one token wide the reshape alone is a view, in an order that the kernels refuse.
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(like.shape).contiguous()
