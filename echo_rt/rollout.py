"""The block loop: which frames are attended to, when keys move, when the memory changes, what a prompt switch does.

Everything is in absolute frames. Attention sees only differences of RoPE ids, so a local key is rotated once, by
the number of its own frame, when it is written; when the bounded ids shift, it is the few sink and memory keys that
are rotated afresh. The scores are those of ids that never exceed the pretrained maximum (arXiv 2606.04527).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from echo_rt.config import ModelConfig
from echo_rt.errors import ConfigError
from echo_rt.model.attention import attention
from echo_rt.model.memory import MemoryEncoder
from echo_rt.model.sampler import Schedule
from echo_rt.model.transformer import LayerWeights, Transformer
from echo_rt.noise import NoiseSource
from echo_rt.ops import Ops, check_memory
from echo_rt.options import MemoryMode
from echo_rt.state import RolloutState, ring_layout

# (block, denoising step, flow [B, C, h, w])
Observer = Callable[[int, int, Tensor], None]


@dataclass(frozen=True)
class Position:
    """A block's place on the bounded temporal axis."""

    newest_temporal_id: int
    shift: int


class Rollout:
    """Generates one video's latents, block after block, in the tensors of a :class:`RolloutState`."""

    def __init__(
        self,
        config: ModelConfig,
        transformer: Transformer,
        memory: MemoryEncoder | None,
        schedule: Schedule,
        ops: Ops,
        mode: MemoryMode,
    ) -> None:
        if (memory is None) != (config.memory is None):
            raise ConfigError("a rollout needs a memory encoder exactly where its config names a memory")
        if memory is None and mode is not MemoryMode.OFF:
            raise ConfigError(f"memory mode {mode.value!r} needs a memory encoder, and this model has none; use 'off'")
        if mode is MemoryMode.EVOLVE:
            check_memory(ops, transformer.dtype, config.transformer.head_dim)
        self.config, self.mode = config, mode
        self._transformer, self._memory, self._schedule, self._ops = transformer, memory, schedule, ops
        self._layout = ring_layout(config)
        self._eps = config.transformer.eps
        self.state = RolloutState(config, ops, device=transformer.device, dtype=transformer.dtype)

    # ---------------------------------------------------------------- prompts

    def start(self, prompt_embeds: Tensor) -> None:
        """Forget any video before this one; ``prompt_embeds [length, text_dim]`` is the first prompt."""
        self.state.reset()
        self._transformer.encode_text(prompt_embeds, self.state.text_kv)
        if self.mode is MemoryMode.PRIOR:
            self._restart_memory()
            self._publish_memory(rotate=False)
            self.state.memory_ready = True

    def switch_prompt(self, prompt_embeds: Tensor) -> None:
        """Take a new prompt between two blocks: new text keys, the window's keys made afresh, the memory rebuilt."""
        self._transformer.encode_text(prompt_embeds, self.state.text_kv)
        if self.state.block < 0:
            return
        self._recache()
        evolving = self.mode is MemoryMode.EVOLVE and self.config.memory is not None
        if evolving and self.config.memory.rebuild_on_prompt_switch:  # type: ignore[union-attr]
            self._rebuild_memory()

    # ---------------------------------------------------------------- blocks

    def next_block(self, noise: NoiseSource, observe: Observer | None = None) -> Tensor:
        """Generate the next block; its clean latents ``[B, C, h, w]`` float32 are a view that the next call overwrites.

        ``observe`` is shown the flow of every denoising step.
        """
        s, schedule = self.state, self._schedule
        previous, block = s.block, s.block + 1
        self._advance()
        evicting = self.mode is MemoryMode.EVOLVE and self._layout.evicts(block)
        if evicting:
            self._stage_memory(block)  # before the first pass overwrites what it reads
        self._reanchor(previous, block)
        noise.fill(s.x, block, 0)
        for step in range(schedule.steps):
            flow = self._block_pass(block, step)
            if evicting and step == 0:
                self._publish_memory(rotate=True)
            fresh = None
            if step + 1 < schedule.steps:
                fresh = s.noise
                noise.fill(fresh, block, step + 1)
            self._ops.flow_step(s.x, flow, schedule.sigmas[step], fresh)
            if observe is not None:
                observe(block, step, flow)
        self._block_pass(block, schedule.steps)  # the context pass: stores the clean keys and values
        first = self._layout.first_frame(block) % self.config.window.cached_frames
        s.latents[first : first + s.x.shape[0]] = s.x
        s.block = block
        return s.x

    def position(self, block: int) -> Position:
        """Where ``block`` stands: the id of its newest frame and how far the ids have shifted."""
        layout = self._layout
        last = layout.last_frame(block)
        return Position(newest_temporal_id=layout.temporal_id(block, last), shift=layout.shift(block))

    def memory_attended(self, block: int) -> bool:
        """Whether a pass of ``block`` that began now would attend to the memory."""
        usable = self.mode is not MemoryMode.OFF and self.state.memory_ready
        return usable and self._layout.memory_fits(block)

    def _advance(self) -> None:
        s, window = self.state, self.config.window
        self._ops.advance(
            s.positions,
            window.frames_per_block,
            window.sink_frames,
            window.local_frames,
            self.config.memory_frames,
            window.max_temporal_id,
            s.rope.inverse_frequencies,
            s.rope.temporal_block,
            s.rope.temporal_anchor,
            s.write_index,
        )

    def _reanchor(self, previous: int, block: int) -> None:
        """Turn the sink keys, if the shift moved, and the memory keys, if they are attended to, to this block's ids."""
        s, layout = self.state, self._layout
        moved = previous >= 0 and layout.shift(previous) != layout.shift(block)
        self._ops.reanchor(
            s.kv,
            s.rope.temporal_anchor,
            s.rope.spatial,
            s.sink_k if moved else None,
            s.memory_k if self.memory_attended(block) else None,
            None,
            self.config.memory_tokens,
        )

    def _block_pass(self, block: int, timestep: int) -> Tensor:
        s, layout, tokens = self.state, self._layout, self.config.tokens_per_frame
        begin = layout.attended_begin(self.memory_attended(block)) * tokens
        end = layout.attended_end(block) * tokens
        in_sink = layout.is_sink_block(block)
        sink_row = self.config.memory_tokens
        last_layer = self.config.transformer.num_layers - 1

        def self_attention(index: int, layer: LayerWeights, qkv: Tensor) -> Tensor:
            raw_k, raw_offset = None, 0
            if in_sink:
                raw_k, raw_offset = s.sink_k[index], sink_row
            elif index == last_layer:
                raw_k, raw_offset = s.ring_k, sink_row + s.sink_k.shape[1]
            k, v = s.kv[index]
            q = self._ops.qkv_norm_rope_store(
                qkv,
                layer.norm_q,
                layer.norm_k,
                s.rope.temporal_block,
                s.rope.spatial,
                k,
                v,
                s.write_index,
                raw_k,
                raw_offset,
                self._eps,
            )
            return attention(q, k[begin:end], v[begin:end])

        return self._transformer.forward(s.x, timestep, s.text_kv, self_attention)

    # ---------------------------------------------------------------- memory

    def _restart_memory(self) -> None:
        assert self._memory is not None
        self.state.staged_memory.copy_(self._memory.query_init)

    def _stage_memory(self, block: int) -> None:
        """What the memory becomes once it has seen the frames that ``block`` is about to overwrite."""
        assert self._memory is not None
        s, tokens = self.state, self.config.tokens_per_frame
        sink_end = self.config.memory_tokens + s.sink_k.shape[1]
        begin = self._layout.slot(self._layout.first_frame(block)) * tokens
        end = begin + self.config.tokens_per_block
        if not s.memory_ready:
            s.memory.copy_(self._memory.query_init)
        self._memory.update(
            s.memory, s.ring_k[begin - sink_end : end - sink_end], s.kv[-1, 1, begin:end], s.staged_memory
        )

    def _publish_memory(self, *, rotate: bool) -> None:
        """The staged state becomes the state, and its keys and values what all layers attend to."""
        assert self._memory is not None
        s = self.state
        s.memory.copy_(s.staged_memory)
        k, v = self._memory.keys_values(s.memory)
        s.memory_k.copy_(k)
        self._ops.reanchor(
            s.kv,
            s.rope.temporal_anchor,
            s.rope.spatial,
            None,
            s.memory_k if rotate else None,
            v,
            self.config.memory_tokens,
        )
        s.memory_ready = True

    def _rebuild_memory(self) -> None:
        """The memory starts again and sees the whole local window once (nothing, while there is only the sink)."""
        assert self._memory is not None
        s, tokens = self.state, self.config.tokens_per_frame
        s.memory.copy_(self._memory.query_init)
        s.memory_ready = False
        filled = self._layout.local_filled(s.block) * tokens
        if filled == 0:
            return
        begin = self.config.memory_tokens + s.sink_k.shape[1]
        self._memory.update(s.memory, s.ring_k[:filled], s.kv[-1, 1, begin : begin + filled], s.staged_memory)
        self._publish_memory(rotate=False)

    # ---------------------------------------------------------------- prompt switch

    def _recache(self) -> None:
        """One pass at the context timestep over the last frames, whose keys and values replace the local ones.

        The queries are the last ``sink + local`` frames (or all there are); they attend to the sink and to the fresh
        local keys. The sink's keys and values outlive the pass: where it reaches back to frame 0 the pass sees
        fresh ones, and each layer's old ones are put back behind it. Rare, so it may allocate.
        """
        s, layout, tokens = self.state, self._layout, self.config.tokens_per_frame
        window = self.config.window
        generated = layout.last_frame(s.block) + 1
        frames = torch.arange(max(0, generated - window.cached_frames), generated)
        whole_video = int(frames[0]) == 0
        # Never two frames of one slot: which of them an indexed copy would keep is undefined.
        stored = [f for f in frames.tolist() if whole_video or f >= layout.oldest_local(s.block)]
        rows = torch.tensor([layout.slot(f) for f in stored], dtype=torch.int64)[:, None] * tokens + torch.arange(
            tokens
        )
        rows = rows.flatten().to(s.kv.device)
        temporal = s.rope.temporal_block.new_empty(len(frames), *s.rope.temporal_block.shape[1:])
        self._ops.rope_table(frames.to(s.kv.device), s.rope.inverse_frequencies, temporal)
        sink_begin = self.config.memory_tokens
        sink_end, end = sink_begin + s.sink_k.shape[1], layout.attended_end(s.block) * tokens
        last_layer = self.config.transformer.num_layers - 1
        ring_rows = rows[rows >= sink_end]

        def self_attention(index: int, layer: LayerWeights, qkv: Tensor) -> Tensor:
            k, v = s.kv[index]
            kept = s.kv[index, :, sink_begin:sink_end].clone() if whole_video else None
            raw_k = torch.empty_like(k) if index == last_layer else None
            q = self._ops.qkv_norm_rope_store(
                qkv, layer.norm_q, layer.norm_k, temporal, s.rope.spatial, k, v, rows, raw_k, 0, self._eps
            )
            out = attention(q, k[sink_begin:end], v[sink_begin:end])
            if kept is not None:
                s.kv[index, :, sink_begin:sink_end] = kept
            if raw_k is not None:
                s.ring_k[ring_rows - sink_end] = raw_k[ring_rows]
            return out

        latents = s.latents[(frames % window.cached_frames).to(s.kv.device)]
        self._transformer.forward(latents, self._schedule.steps, s.text_kv, self_attention)
