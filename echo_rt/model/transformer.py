"""Wan's diffusion transformer, one block of latent frames at a time.

The caller passes in the cache of self-attention: which keys are kept, attended to and how they are rotated is decided
by the rollout (:mod:`echo_rt.engine.rollout`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from echo_rt.attention import Attention
from echo_rt.config import TransformerConfig
from echo_rt.model.linear import Linear, Product, Weights, feed_forward
from echo_rt.model.linear_products import Products
from echo_rt.ops.schema import Ops
from echo_rt.utils.device import working_dtype


class LayerWeights:
    """One transformer block. Norm weights are float32, matrices have the model's dtype or float8."""

    def __init__(self, load: Weights, block: str) -> None:
        own, cross = f"{block}.self_attn", f"{block}.cross_attn"
        self.qkv = load.product(f"{own}.q", f"{own}.k", f"{own}.v")
        self.norm_q = load.vector(f"{own}.norm_q.weight")
        self.norm_k = load.vector(f"{own}.norm_k.weight")
        self.self_out = load.linear(f"{own}.o")
        self.cross_norm_scale = load.vector(f"{block}.norm3.weight")
        self.cross_norm_shift = load.vector(f"{block}.norm3.bias")
        self.cross_q = load.product(f"{cross}.q")
        self.cross_norm_q = load.matrix(f"{cross}.norm_q.weight")
        self.cross_k = load.linear(f"{cross}.k")
        self.cross_norm_k = load.matrix(f"{cross}.norm_k.weight")
        self.cross_v = load.linear(f"{cross}.v")
        self.cross_out = load.linear(f"{cross}.o")
        self.ffn_in = load.product(f"{block}.ffn.0")
        self.ffn_out = load.product(f"{block}.ffn.2")


class KeyValueCache(Protocol):
    """The keys and values of a pass: where they are stored, and what is attended to."""

    def store(self, index: int, layer: LayerWeights, qkv: Tensor) -> Tensor:
        """Store keys and values of layer ``index`` from its ``qkv [n, 3·dim]``; return its queries ``[n, H, d]``."""

    def attend(self, index: int, q: Tensor) -> Tensor:
        """Return the attention ``[n, dim]`` of the queries of layer ``index``, which see their own new keys too."""


# Of the timestep's sinusoid; equal to rope_theta in Wan, but another constant.
_SINUSOID_BASE = 10000.0


class Transformer:
    """The weights of the transformer and its forward pass; ``attention`` is that over the text.

    ``timesteps`` are all that will ever be used: the modulation of every layer is computed for each of them here,
    once (``modulations [timesteps, layers, 6, dim]`` and ``head_modulations [timesteps, 2, dim]``, float32, the
    ``1 +`` of the scales included).

    In dtype float8 the products that :data:`echo_rt.model.linear.FLOAT8_PRODUCTS` names are, but for those in ``kept``
    (:func:`echo_rt.model.linear.kept_from_float8`); everything else is in bfloat16, and so is :attr:`dtype`. Linear
    layers of the shapes of ``products`` are computed by those.
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
        products: Products,
    ) -> None:
        self.config, self.device, self.dtype = config, device, working_dtype(dtype)
        self._ops, self._attention = ops, attention
        load = Weights(tensors, device, self.dtype, kept, products)
        self.layers = [LayerWeights(load, f"blocks.{index}") for index in range(config.num_layers)]
        patch_weight = load.matrix("patch_embedding.weight").flatten(1)
        self._patch = Linear(patch_weight, load.matrix("patch_embedding.bias"))
        self._text_in, self._text_out = load.linear("text_embedding.0"), load.linear("text_embedding.2")
        self._head = load.linear("head.head")
        self._build_modulations(Weights(tensors, device, torch.float32), timesteps)

    def _build_modulations(self, load: Weights, timesteps: list[float]) -> None:
        half = self.config.freq_dim // 2
        exponents = torch.arange(half, dtype=torch.float64, device=self.device) / half
        t = torch.tensor(timesteps, dtype=torch.float64, device=self.device)
        angles = t[:, None] * _SINUSOID_BASE**-exponents
        sinusoid = torch.cat((angles.cos(), angles.sin()), dim=-1).float()
        hidden = silu(load.linear("time_embedding.0")(sinusoid))
        e = load.linear("time_embedding.2")(hidden)
        e0 = load.linear("time_projection.1")(silu(e)).unflatten(-1, (-1, self.config.dim))
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
