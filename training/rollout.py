"""The runtime's rollout as a function that torch can differentiate: a batch of videos, one block after the other.

It computes what ``echo_rt.engine.rollout`` computes (a test compares the two), with gradients through the clean keys
and values of earlier blocks and through the memory. Models are small, so no buffer is reused.

Letters: ``N`` videos, ``F`` latent frames of a pass, ``S`` tokens in a frame, ``H`` heads, ``d`` head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention

from echo_rt.config import ModelConfig
from echo_rt.weights.shapes import MEMORY_PREFIX

_SINUSOID_BASE = 10000.0


class Rotary:
    """3-D rotary angles: cosine and sine of a head's pairs for frames at given temporal positions."""

    def __init__(self, config: ModelConfig) -> None:
        transformer = config.transformer
        self._rows, self._columns = config.grid
        self._rates = [
            transformer.rope_theta ** -(torch.arange(0, channels, 2, dtype=torch.float64) / channels)
            for channels in transformer.rope_dims
        ]
        self._tables: dict[tuple[tuple[int, ...], torch.dtype], tuple[Tensor, Tensor]] = {}

    def __call__(self, x: Tensor, positions: list[int]) -> Tensor:
        """Rotate ``x [N, H, F·S, d]``, whose frames stand at ``positions``."""
        key = (tuple(positions), x.dtype)
        if key not in self._tables:
            angles = self._angles(positions)
            self._tables[key] = (angles.cos().to(x.dtype), angles.sin().to(x.dtype))
        cosine, sine = self._tables[key]
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), -1).flatten(-2)

    def _angles(self, positions: list[int]) -> Tensor:
        """Float64 ``[F·S, d/2]``."""
        ranges = (torch.tensor(positions), torch.arange(self._rows), torch.arange(self._columns))
        places = torch.meshgrid(*ranges, indexing="ij")
        return torch.cat([p.reshape(-1, 1).double() * r for p, r in zip(places, self._rates, strict=True)], 1)


@dataclass
class Block:
    """Clean keys (not rotated) and values of a block, ``[N, H, B·S, d]`` for each layer, and its first frame."""

    first: int
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


@dataclass
class _Context:
    """What a pass attends to beside itself: rotated keys and values, one pair for each layer; None for nothing."""

    keys: list[Tensor | None]
    values: list[Tensor | None]


class Rollout:
    """A batch of videos. ``weights``: by Wan's names, prefixed in the memory encoder; ``memory``: whether to use it."""

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Tensor], *, memory: bool = True, rotary: Rotary | None = None
    ) -> None:
        self.config, self.weights = config, weights
        self.remembers = memory and config.memory is not None
        self.memory: Tensor | None = None
        self.latents: list[Tensor] = []  # a block each, [N, B, C, h, w]
        self._staged: Tensor | None = None
        self._sink: list[Block] = []
        self._local: list[Block] = []
        self._rotary = rotary or Rotary(config)
        self._heads = (config.transformer.num_heads, config.transformer.head_dim)
        self._text: list[tuple[Tensor, Tensor]] = []

    # ---------------------------------------------------------------- prompts

    def set_prompt(self, embeds: Tensor) -> None:
        """Take prompts ``[N, text_len, text_dim]``, zero where a prompt has ended; between blocks this is a switch."""
        text = self._linear("text_embedding.2", gelu(self._linear("text_embedding.0", embeds)))
        self._text = []
        for layer in range(self.config.transformer.num_layers):
            name = f"blocks.{layer}.cross_attn"
            keys = self._norm(f"{name}.norm_k", self._linear(f"{name}.k", text))
            self._text.append((self._split(keys), self._split(self._linear(f"{name}.v", text))))
        if self.latents:
            self._recache()

    # ---------------------------------------------------------------- blocks

    def begin(self) -> None:
        """Begin the next block: evict the oldest one, and let the memory see what leaves."""
        window, first = self.config.window, self._next_frame
        self._staged = self.memory
        oldest = first + window.frames_per_block - window.local_frames
        while self._local and self._local[0].first < oldest:
            evicted = self._local.pop(0)
            if self.remembers:
                self._staged = self._updated(evicted.keys[-1], evicted.values[-1])

    def flow(self, x: Tensor, timestep: float, *, first_pass: bool) -> Tensor:
        """Predict the flow of a noisy block ``x [N, B, C, h, w]``; the first pass of a block sees the old memory."""
        return self._forward(x, timestep, self._context(self.memory if first_pass else self._staged), None)

    def keep(self, latents: Tensor) -> None:
        """End the block with its clean ``latents``: the context pass stores their keys and values."""
        block = Block(self._next_frame)
        context = self._context(self._staged)
        self._forward(latents, self.config.sampler.context_timestep, context, block)
        self.memory = self._staged
        in_sink = block.first < self.config.window.sink_frames
        (self._sink if in_sink else self._local).append(block)
        self.latents.append(latents)

    @property
    def _next_frame(self) -> int:
        return len(self.latents) * self.config.window.frames_per_block

    def _shift(self, last: int) -> int:
        return max(0, last - self.config.window.max_temporal_id)

    def _context(self, memory: Tensor | None) -> _Context:
        window, first = self.config.window, self._next_frame
        last = first + window.frames_per_block - 1
        shift = self._shift(last)
        layers = range(self.config.transformer.num_layers)
        keys: list[list[Tensor]] = [[] for _ in layers]
        values: list[list[Tensor]] = [[] for _ in layers]
        oldest = max(window.sink_frames, last - window.local_frames + 1)
        memory_first = oldest - self.config.memory_frames
        if memory is not None and memory_first - shift >= window.sink_frames and last >= window.sink_frames:
            memory_keys, memory_values = self._memory_keys_values(memory)
            turned = self._rotary(memory_keys, list(range(memory_first, oldest)))
            for layer in layers:
                keys[layer].append(turned)
                values[layer].append(memory_values)
        for blocks, moved in ((self._sink, shift), (self._local, 0)):
            for block in blocks:
                frames = [block.first + index + moved for index in range(window.frames_per_block)]
                for layer in layers:
                    keys[layer].append(self._rotary(block.keys[layer], frames))
                    values[layer].append(block.values[layer])
        return _Context(
            [torch.cat(k, 2) if k else None for k in keys], [torch.cat(v, 2) if v else None for v in values]
        )

    # ---------------------------------------------------------------- transformer

    def _forward(self, latents: Tensor, timestep: float, context: _Context, store: Block | None) -> Tensor:
        frames = list(range(self._next_frame, self._next_frame + latents.shape[1]))
        transformer = self.config.transformer
        x, e, e0 = self._enter(latents, timestep)
        for layer in range(transformer.num_layers):
            block = f"blocks.{layer}"
            m = (self.weights[f"{block}.modulation"][0] + e0).unbind(0)
            q, k, v = self._queries_keys_values(block, x, m)
            if store is not None:
                store.keys.append(k)
                store.values.append(v)
                if layer == transformer.num_layers - 1:
                    return latents  # nobody reads what the context pass predicts
            own = self._rotary(k, frames)
            before, old = context.keys[layer], context.values[layer]
            keys = own if before is None else torch.cat((before, own), 2)
            values = v if old is None else torch.cat((old, v), 2)
            x = self._rest_of_layer(layer, x, m, attention(self._rotary(q, frames), keys, values))
        return self._leave(x, e, latents)

    def _enter(self, latents: Tensor, timestep: float) -> tuple[Tensor, Tensor, Tensor]:
        _, rows, columns = self.config.transformer.patch_size
        patches = latents.unflatten(4, (-1, columns)).unflatten(3, (-1, rows))  # N F C h/r r w/c c
        tokens = patches.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)
        weight, bias = self.weights["patch_embedding.weight"].flatten(1), self.weights["patch_embedding.bias"]
        half = self.config.transformer.freq_dim // 2
        angle = timestep * _SINUSOID_BASE ** -(torch.arange(half, dtype=torch.float64) / half)
        e = self._linear("time_embedding.0", torch.cat((angle.cos(), angle.sin())).to(latents.dtype))
        e = self._linear("time_embedding.2", functional.silu(e))
        return linear(tokens, weight, bias), e, self._linear("time_projection.1", functional.silu(e)).view(6, -1)

    def _queries_keys_values(self, block: str, x: Tensor, m: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        y = self._layer_norm(x) * (1 + m[1]) + m[0]
        name = f"{block}.self_attn"
        q, k = (self._norm(f"{name}.norm_{part}", self._linear(f"{name}.{part}", y)) for part in "qk")
        return self._split(q), self._split(k), self._split(self._linear(f"{name}.v", y))

    def _rest_of_layer(self, layer: int, x: Tensor, m: tuple[Tensor, ...], attended: Tensor) -> Tensor:
        block = f"blocks.{layer}"
        x = x + m[2] * self._linear(f"{block}.self_attn.o", attended)
        y = self._layer_norm(x) * self.weights[f"{block}.norm3.weight"] + self.weights[f"{block}.norm3.bias"]
        cross = f"{block}.cross_attn"
        q = self._split(self._norm(f"{cross}.norm_q", self._linear(f"{cross}.q", y)))
        x = x + self._linear(f"{cross}.o", attention(q, *self._text[layer]))
        y = self._layer_norm(x) * (1 + m[4]) + m[3]
        return x + m[5] * self._linear(f"{block}.ffn.2", gelu(self._linear(f"{block}.ffn.0", y)))

    def _leave(self, x: Tensor, e: Tensor, latents: Tensor) -> Tensor:
        shift, scale = (self.weights["head.modulation"][0] + e).unbind(0)
        y = self._linear("head.head", self._layer_norm(x) * (1 + scale) + shift)
        _, rows, columns = self.config.transformer.patch_size
        grid = (latents.shape[1], *self.config.grid, rows, columns, latents.shape[2])
        return y.unflatten(2, (-1, grid[5])).view(len(y), *grid).permute(0, 1, 6, 2, 4, 3, 5).reshape(latents.shape)

    # ---------------------------------------------------------------- memory

    def _updated(self, k: Tensor, v: Tensor) -> Tensor:
        start = self.weights[f"{MEMORY_PREFIX}query_init"].expand(len(k), -1, -1)
        old = start if self._staged is None else self._staged
        assert self.config.memory is not None
        s = old
        for layer in range(self.config.memory.layers):
            name = f"{MEMORY_PREFIX}layers.{layer}"
            q = self._linear(f"{name}.q", self._norm(f"{name}.norm1", s))
            s = s + self._linear(f"{name}.o", attention(self._split(self._norm(f"{name}.norm_q", q)), k, v))
            hidden = gelu(self._linear(f"{name}.ffn.0", self._norm(f"{name}.norm2", s)))
            s = s + self._linear(f"{name}.ffn.2", hidden)
        connector = f"{MEMORY_PREFIX}connector_proj"
        candidate = self._norm(
            f"{connector}.3", self._linear(f"{connector}.2", gelu(self._linear(f"{connector}.0", s)))
        )
        gate = torch.sigmoid(self._linear(f"{MEMORY_PREFIX}gate_linear", torch.cat((old, candidate), -1)))
        return gate * old + (1 - gate) * candidate

    def _memory_keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        k = self._linear(f"{MEMORY_PREFIX}to_k", memory)
        assert self.config.memory is not None
        if self.config.memory.normalize_k:
            k = self._norm(f"{MEMORY_PREFIX}norm_k_out", k)
        return self._split(k), self._split(self._linear(f"{MEMORY_PREFIX}to_v", memory))

    # ---------------------------------------------------------------- prompt switch

    def _recache(self) -> None:
        """Pass the last frames through the model again: their keys and values replace the local ones."""
        window, size = self.config.window, self.config.window.frames_per_block
        count = min(len(self.latents), window.cached_frames // size)
        begin = len(self.latents) - count
        frames = list(range(begin * size, len(self.latents) * size))
        shift = self._shift(frames[-1])
        x, _, e0 = self._enter(torch.cat(self.latents[begin:], 1), self.config.sampler.context_timestep)
        fresh = {block.first: Block(block.first) for block in self._local}
        for layer in range(self.config.transformer.num_layers):
            m = (self.weights[f"blocks.{layer}.modulation"][0] + e0).unbind(0)
            q, k, v = self._queries_keys_values(f"blocks.{layer}", x, m)
            pieces = dict(zip(frames[::size], zip(k.chunk(count, 2), v.chunk(count, 2), strict=True), strict=True))
            keys, values = [], []
            for block in self._sink:
                own = pieces.get(block.first, (block.keys[layer], block.values[layer]))
                keys.append(self._rotary(own[0], [block.first + shift + index for index in range(size)]))
                values.append(own[1])
            for first, block in fresh.items():
                block.keys.append(pieces[first][0])
                block.values.append(pieces[first][1])
                keys.append(self._rotary(block.keys[layer], [first + index for index in range(size)]))
                values.append(block.values[layer])
            attended = attention(self._rotary(q, frames), torch.cat(keys, 2), torch.cat(values, 2))
            x = self._rest_of_layer(layer, x, m, attended)
        self._local = list(fresh.values())

    # ---------------------------------------------------------------- pieces

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return rms_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.config.transformer.eps)

    def _layer_norm(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], eps=self.config.transformer.eps)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, self._heads).transpose(1, 2)


def gelu(x: Tensor) -> Tensor:
    """GELU by its tanh formula."""
    return functional.gelu(x, approximate="tanh")


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend without a mask: ``q [N, H, n, d]``, ``k, v [N, H, m, d]`` to ``[N, n, H·d]``."""
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def schedule(config: ModelConfig) -> tuple[list[float], list[float]]:
    """Return the timesteps and sigmas of the denoising steps, as the runtime's sampler has them."""
    shift, steps = config.sampler.timestep_shift, config.sampler.num_train_timesteps
    parts = [step / steps for step in config.sampler.denoising_steps]
    sigmas = torch.tensor([shift * u / (1 + (shift - 1) * u) for u in parts], dtype=torch.float64).float()
    return (steps * sigmas).tolist(), sigmas.tolist()
