"""A second rollout, written from the formulas alone: float64, the whole history kept, the window picked from it.

No ring, no anchors, no absolute frames: every pass rotates every attended key anew by its bounded relative id. It
shares no code with echo_rt and is as slow as it looks; small models only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MEMORY = "query_memory_encoder."
Noise = Callable[[int, int], Tensor]  # (block, step) -> [B, C, h, w]


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _layer_norm(x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``q [n, H, d]``, ``k, v [m, H, d]`` -> ``[n, H·d]``."""
    scores = torch.einsum("nhd,mhd->hnm", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v).flatten(1)


class NaiveRollout:
    """``config`` is a golden bundle's flat one, ``weights`` its tensors; ``mode`` evolve, prior or off."""

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Tensor], mode: str) -> None:
        self.c = config
        self.w = {name: tensor.double() for name, tensor in weights.items()}
        self.mode = mode
        # Golden bundles leave out what all released models share.
        self.patch = tuple(config.get("patch_size", (1, 2, 2))[1:])
        self.eps = config.get("eps", 1e-6)
        self.theta = config.get("rope_theta", 10000.0)
        self.train_steps = config.get("num_train_timesteps", 1000)
        self.rows, self.columns = config["latent_height"] // self.patch[0], config["latent_width"] // self.patch[1]
        self.heads, self.head_dim = config["num_heads"], config["dim"] // config["num_heads"]
        self.latents: list[Tensor] = []  # one a frame
        self.generated = 0  # blocks that were not given
        self.keys: list[list[Tensor]] = []  # [frame][layer], not rotated
        self.values: list[list[Tensor]] = []
        self.memory: Tensor | None = None
        self.ids_seen: set[int] = set()

    # ---------------------------------------------------------------- pieces

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def _rms(self, name: str, x: Tensor) -> Tensor:
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + self.eps) * self.w[f"{name}.weight"]

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.heads, self.head_dim)

    def _rotate(self, x: Tensor, frame_id: int) -> Tensor:
        """One frame's ``x [S, H, d]`` at temporal id ``frame_id``, as complex numbers."""
        self.ids_seen.add(frame_id)
        part = 2 * (self.head_dim // 6)
        angles = []
        for place, channels in (
            (torch.full((self.rows, self.columns), frame_id), self.head_dim - 2 * part),
            (torch.arange(self.rows)[:, None].expand(-1, self.columns), part),
            (torch.arange(self.columns)[None].expand(self.rows, -1), part),
        ):
            rates = self.theta ** -(torch.arange(0, channels, 2, dtype=torch.float64) / channels)
            angles.append(place.reshape(-1, 1).double() * rates)
        turn = torch.polar(torch.ones((), dtype=torch.float64), torch.cat(angles, 1))[:, None]
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    # ---------------------------------------------------------------- schedule

    def _schedule(self, first: bool) -> tuple[list[float], list[float]]:
        shift = self.c["timestep_shift"]
        own = self.c.get("first_block_steps") if first else None
        u = [step / self.train_steps for step in own or self.c["denoising_steps"]]
        sigmas = torch.tensor([shift * x / (1 + (shift - 1) * x) for x in u], dtype=torch.float64).float()
        return (self.train_steps * sigmas).tolist(), sigmas.tolist()

    # ---------------------------------------------------------------- transformer

    def _forward(self, latents: Tensor, t: float, attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        c, frames = self.c, latents.shape[0]
        height, width = self.patch
        patches = latents.reshape(frames, -1, self.rows, height, self.columns, width).permute(0, 2, 4, 1, 3, 5)
        weight = self.w["patch_embedding.weight"].flatten(1)
        x = patches.reshape(frames * self.rows * self.columns, -1) @ weight.T + self.w["patch_embedding.bias"]
        half = c["freq_dim"] // 2
        angle = t * 10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
        e = self._linear("time_embedding.0", torch.cat((angle.cos(), angle.sin())))
        e = self._linear("time_embedding.2", _silu(e))
        e0 = self._linear("time_projection.1", _silu(e)).view(6, -1)
        for layer in range(c["num_layers"]):
            block = f"blocks.{layer}"
            m = self.w[f"{block}.modulation"][0] + e0
            y = _layer_norm(x, self.eps) * (1 + m[1]) + m[0]
            own = f"{block}.self_attn"
            q = self._split(self._rms(f"{own}.norm_q", self._linear(f"{own}.q", y)))
            k = self._split(self._rms(f"{own}.norm_k", self._linear(f"{own}.k", y)))
            v = self._split(self._linear(f"{own}.v", y))
            x = x + m[2] * self._linear(f"{own}.o", attend(layer, q, k, v))
            y = _layer_norm(x, self.eps) * self.w[f"{block}.norm3.weight"] + self.w[f"{block}.norm3.bias"]
            cross = f"{block}.cross_attn"
            q = self._split(self._rms(f"{cross}.norm_q", self._linear(f"{cross}.q", y)))
            k = self._split(self._rms(f"{cross}.norm_k", self._linear(f"{cross}.k", self.text)))
            v = self._split(self._linear(f"{cross}.v", self.text))
            x = x + self._linear(f"{cross}.o", softmax_attention(q, k, v))
            y = _layer_norm(x, self.eps) * (1 + m[4]) + m[3]
            x = x + m[5] * self._linear(f"{block}.ffn.2", _gelu(self._linear(f"{block}.ffn.0", y)))
        head = self.w["head.modulation"][0] + e
        y = self._linear("head.head", _layer_norm(x, self.eps) * (1 + head[1]) + head[0])
        y = y.view(frames, self.rows, self.columns, height, width, -1).permute(0, 5, 1, 3, 2, 4)
        return y.reshape(latents.shape)

    def _per_frame(self, x: Tensor) -> Sequence[Tensor]:
        return x.view(-1, self.rows * self.columns, self.heads, self.head_dim).unbind()

    # ---------------------------------------------------------------- rollout

    def set_prompt(self, embeds: Tensor) -> None:
        """The first prompt, or a switch between two blocks."""
        padded = torch.zeros(self.c["text_len"], self.c["text_dim"], dtype=torch.float64)
        padded[: embeds.shape[0]] = embeds
        self.text = self._linear("text_embedding.2", _gelu(self._linear("text_embedding.0", padded)))
        if self.latents:
            self._recache()
            if self.mode == "evolve" and self.c["memory"]["rebuild_on_prompt_switch"]:
                local = self._local_frames(len(self.latents) - 1)
                self.memory = None
                if local:
                    shift = max(0, len(self.latents) - 1 - self.c["max_temporal_id"])
                    self.memory = self._updated(self.w[MEMORY + "query_init"][0], local, shift)

    def given_block(self, latents: Tensor) -> Tensor:
        """The next block is ``latents [B, C, h, w]``: one pass, for its keys and values and what it evicts."""
        _, attend, new_memory = self._begin_block()
        self._forward(latents.double(), self.c["context_timestep"], attend)
        self.memory = new_memory
        self.latents += latents.double().unbind()
        return latents

    def next_block(self, noise: Noise) -> Tensor:
        c = self.c
        first, attend, new_memory = self._begin_block()
        size = c["frames_per_block"]
        timesteps, sigmas = self._schedule(self.generated == 0)
        self.generated += 1
        x = noise(first // size, 0).double()
        for step, (t, sigma) in enumerate(zip(timesteps, sigmas, strict=True)):
            x0 = x - sigma * self._forward(x, t, attend)
            self.memory = new_memory
            if step + 1 < len(sigmas):
                x = (1 - sigmas[step + 1]) * x0 + sigmas[step + 1] * noise(first // size, step + 1).double()
        self._forward(x0, c["context_timestep"], attend)
        self.latents += x0.unbind()
        return x0

    def _begin_block(self) -> tuple[int, Callable[[int, Tensor, Tensor, Tensor], Tensor], Tensor | None]:
        """Its first frame, what its passes attend to, and the memory from its second pass on."""
        c = self.c
        size = c["frames_per_block"]
        first = len(self.latents)
        frames = list(range(first, first + size))
        last = frames[-1]
        self.keys += [[None] * c["num_layers"] for _ in frames]  # type: ignore[list-item]
        self.values += [[None] * c["num_layers"] for _ in frames]  # type: ignore[list-item]
        new_memory = self.memory
        evicted = [f for f in range(first - c["local_frames"], last - c["local_frames"] + 1) if f >= c["sink_frames"]]
        if self.mode == "evolve" and evicted:
            start = self.w[MEMORY + "query_init"][0] if self.memory is None else self.memory
            new_memory = self._updated(start, evicted, max(0, last - c["max_temporal_id"]))
        return first, self._block_attention(frames), new_memory

    def _local_frames(self, last: int) -> list[int]:
        return list(range(max(self.c["sink_frames"], last - self.c["local_frames"] + 1), last + 1))

    def _block_attention(self, frames: list[int]) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
        c = self.c
        shift = max(0, frames[-1] - c["max_temporal_id"])
        sink = [f for f in range(c["sink_frames"]) if f <= frames[-1]]
        local = self._local_frames(frames[-1])

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for frame, one_k, one_v in zip(frames, self._per_frame(k), self._per_frame(v), strict=True):
                self.keys[frame][layer], self.values[frame][layer] = one_k, one_v
            keys = [self._rotate(self.keys[f][layer], f) for f in sink]
            values = [self.values[f][layer] for f in sink]
            keys += [self._rotate(self.keys[f][layer], f - shift) for f in local]
            values += [self.values[f][layer] for f in local]
            if local and self.mode != "off":
                first_id = local[0] - shift - c["memory"]["frames"]
                state = self.w[MEMORY + "query_init"][0] if self.mode == "prior" else self.memory
                if state is not None and first_id >= c["sink_frames"]:
                    memory_k, memory_v = self._memory_keys_values(state)
                    keys += [self._rotate(one, first_id + i) for i, one in enumerate(self._per_frame(memory_k))]
                    values += self._per_frame(memory_v)
            turned = [self._rotate(one, f - shift) for f, one in zip(frames, self._per_frame(q), strict=True)]
            return softmax_attention(torch.cat(turned), torch.cat(keys), torch.cat(values))

        return attend

    # ---------------------------------------------------------------- memory

    def _updated(self, old: Tensor, frames: list[int], shift: int) -> Tensor:
        rotated = self.c["memory"].get("reads") == "rotated"
        k = torch.cat([self._rotate(self.keys[f][-1], f - shift) if rotated else self.keys[f][-1] for f in frames])
        v = torch.cat([self.values[f][-1] for f in frames])
        s = old
        for layer in range(self.c["memory"]["layers"]):
            name = f"{MEMORY}layers.{layer}"
            q = self._rms(f"{name}.norm_q", self._linear(f"{name}.q", self._rms(f"{name}.norm1", s)))
            s = s + self._linear(f"{name}.o", softmax_attention(self._split(q), k, v))
            s = s + self._linear(f"{name}.ffn.2", _gelu(self._linear(f"{name}.ffn.0", self._rms(f"{name}.norm2", s))))
        candidate = self._linear(MEMORY + "connector_proj.2", _gelu(self._linear(MEMORY + "connector_proj.0", s)))
        candidate = self._rms(MEMORY + "connector_proj.3", candidate)
        gate = torch.sigmoid(self._linear(MEMORY + "gate_linear", torch.cat((old, candidate), -1)))
        return gate * old + (1 - gate) * candidate

    def _memory_keys_values(self, state: Tensor) -> tuple[Tensor, Tensor]:
        k = self._linear(MEMORY + "to_k", state)
        if self.c["memory"]["normalize_k"]:
            k = self._rms(MEMORY + "norm_k_out", k)
        return self._split(k), self._split(self._linear(MEMORY + "to_v", state))

    # ---------------------------------------------------------------- prompt switch

    def _recache(self) -> None:
        c, generated = self.c, len(self.latents)
        shift = max(0, generated - 1 - c["max_temporal_id"])
        frames = list(range(max(0, generated - c["sink_frames"] - c["local_frames"]), generated))
        local = self._local_frames(generated - 1)
        sink = [f for f in range(c["sink_frames"]) if f < generated]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            fresh_k = dict(zip(frames, self._per_frame(k), strict=True))
            fresh_v = dict(zip(frames, self._per_frame(v), strict=True))
            renewed = [*sink, *local] if frames[0] == 0 and c.get("recache_sink") else local
            for frame in renewed:
                self.keys[frame][layer], self.values[frame][layer] = fresh_k[frame], fresh_v[frame]
            seen = []
            for frame in (*sink, *local):
                fresh = frame in local or frames[0] == 0
                key = fresh_k[frame] if fresh else self.keys[frame][layer]
                value = fresh_v[frame] if fresh else self.values[frame][layer]
                seen.append((self._rotate(key, frame if frame in sink else frame - shift), value))
            # Frames older than the window have negative ids here; only differences of ids count.
            turned = [self._rotate_query(one, f - shift) for f, one in zip(frames, self._per_frame(q), strict=True)]
            return softmax_attention(torch.cat(turned), *(torch.cat(part) for part in zip(*seen, strict=True)))

        self._forward(torch.stack(self.latents[frames[0] :]), c["context_timestep"], attend)

    def _rotate_query(self, x: Tensor, frame_id: int) -> Tensor:
        seen = self.ids_seen.copy()
        try:
            return self._rotate(x, frame_id)
        finally:
            self.ids_seen = seen
