"""The block loop: which frames are attended to, when keys move, when the memory changes, what a prompt switch does.

Everything is in absolute frames. Attention sees only differences of RoPE ids, so a local key is rotated once, by
the number of its own frame, when it is written; when the bounded ids shift, it is the few sink and memory keys that
are rotated afresh. The scores are those of ids that never exceed the pretrained maximum (arXiv 2606.04527).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from echo_rt.attention import Attention
from echo_rt.config import ModelConfig
from echo_rt.engine.executor import Event, Executor, Queue
from echo_rt.engine.state import VITALS, BlockCache, RolloutState, Span, WindowCache
from echo_rt.errors import ConfigError
from echo_rt.model.memory import MemoryEncoder
from echo_rt.model.sampler import Schedule
from echo_rt.model.transformer import Transformer
from echo_rt.ops.backends import check_memory
from echo_rt.ops.noise import seed_words
from echo_rt.ops.schema import POSITION_FIELDS, Ops
from echo_rt.options import MemoryMode, check_seed
from echo_rt.utils.wording import plain

# (block, denoising step, flow [B, C, h, w])
Observer = Callable[[int, int, Tensor], None]

_FIRST_FRAME, _SHIFT = POSITION_FIELDS.index("first_frame"), POSITION_FIELDS.index("shift")


class Rollout:
    """Generates one video's latents, block after block, in the tensors of a :class:`RolloutState`.

    A block is a sequence of stages (:mod:`echo_rt.engine.executor`). What the host decides about it is in the stages'
    static arguments, everything else is in the state. A stage must not read anything else from the host: a captured
    graph would replay the values of the block it was captured from.
    """

    def __init__(
        self,
        config: ModelConfig,
        transformer: Transformer,
        memory: MemoryEncoder | None,
        schedule: Schedule,
        ops: Ops,
        attention: Attention,
        mode: MemoryMode,
        executor: Executor,
        float8_attention: Mapping[int, Collection[int]],
    ) -> None:
        if memory is None and mode is not MemoryMode.OFF:
            raise ConfigError(f"memory mode {mode.value!r} needs a memory encoder, and this model has none; use 'off'")
        if mode is MemoryMode.EVOLVE:
            check_memory(ops, transformer.dtype, config.transformer.head_dim)
        self.config, self.mode = config, mode
        self._transformer, self._memory, self._schedule, self._ops = transformer, memory, schedule, ops
        self._attention, self._executor = attention, executor
        in_float8 = [layer for layer, kept in float8_attention.items() if not kept]
        self.state = RolloutState(
            config, ops, device=transformer.device, dtype=transformer.dtype, float8_layers=in_float8
        )
        # The layers that attend in 16 bits at some steps have a 16-bit cache, which all other passes round.
        mixed = {layer: kept for layer, kept in float8_attention.items() if kept}
        self._rounding = {schedule.context: frozenset(mixed)} | {
            row: frozenset(layer for layer, kept in mixed.items() if step not in kept)
            for first in (False, True)
            for step, row in enumerate(schedule.steps(first))
        }
        self._layout = self.state.layout
        self._reads_rotated = config.memory is not None and config.memory.reads_rotated

    # ---------------------------------------------------------------- prompts

    def start(self, prompt_embeds: Tensor, seed: int = 0) -> None:
        """Start a new video with the prompt ``prompt_embeds [length, text_dim]``."""
        with self._executor.eager():
            self.state.reset()
            self.set_seed(seed)
            self._transformer.encode_text(prompt_embeds, self.state.text_kv)
            if self.mode is MemoryMode.PRIOR:
                assert self._memory is not None
                self._take_memory(self._memory.query_init)
                self._publish_memory(False)
                self.state.memory_ready = True

    def set_seed(self, seed: int) -> None:
        """Set the seed (0 .. 2^64-1) of the noise from the next block on."""
        words = torch.tensor(seed_words(check_seed(seed)), device="cpu")
        with self._executor.eager():
            self.state.seed.copy_(words)

    def switch_prompt(self, prompt_embeds: Tensor, rebuild: bool = True) -> None:
        """Switch the prompt between two blocks: recompute text keys and the window's keys, rebuild the memory.

        ``rebuild``: False keeps the memory also where the recipe rebuilds it.
        """
        with self._executor.eager():
            self._transformer.encode_text(prompt_embeds, self.state.text_kv)
            if self.state.block < 0:
                return
            self._recache()
            memory = self.config.memory if self.mode is MemoryMode.EVOLVE else None
            if rebuild and memory is not None and memory.rebuild_on_prompt_switch:
                self._rebuild_memory()

    # ---------------------------------------------------------------- blocks

    def next_block(self, noise: Tensor | None = None, observe: Observer | None = None) -> Tensor:
        """Generate the next block; returns its clean latents float32 ``[B, C, h, w]``, which the next call overwrites.

        ``noise`` float32 of :attr:`noise_shape` replaces the seed's. ``observe`` is called with the flow of every
        denoising step. On a GPU the work is only submitted to the main queue when this returns.
        """
        steps, run = self._steps, self._executor.run
        if noise is not None:
            with self._executor.eager():
                self.state.noise[: len(steps)].copy_(noise)
        block, updated = self._turn(len(steps) if noise is None else 0)
        for step, row in enumerate(steps):
            renoise = step + 1 if step + 1 < len(steps) else None
            run(self._denoise, row, renoise, self._span(block), observe is not None)
            if step == 0:
                self._publish_update(updated)
            if observe is not None:
                observe(block, step, self.state.flow)
        run(self._keep, self._span(block), self.state.memory_ready)
        self.state.block = block
        return self.state.x

    def given_block(self, latents: Tensor) -> Tensor:
        """Take ``latents`` float32 ``[B, C, h, w]`` as the next block: :meth:`next_block` without the denoising.

        Only before the first generated block. The context pass is the block's only one, so it sees the memory as it
        was; what the block evicts is in the memory from the next pass on.
        """
        s = self.state
        if s.block + 1 != s.initial_blocks:
            raise ConfigError(f"a block can be given only before the first that is generated, got one after {s.block}")
        with self._executor.eager():
            s.noise[0].copy_(latents, non_blocking=True)  # _begin copies it to x, and here x stays so
        block, updated = self._turn(0)
        # After the update, whose result the vitals describe; the pass attends to the memory published before.
        self._executor.run(self._keep, self._span(block), s.memory_ready or updated is not None, after=[updated])
        self._publish_update(updated)
        s.block, s.initial_blocks = block, block + 1
        return s.x

    def _turn(self, drawn: int) -> tuple[int, Event | None]:
        """Begin the next block, with noise drawn for ``drawn`` steps, and update the memory if it evicts frames.

        Returns its number, and the event of the update.
        """
        s, layout, run = self.state, self._layout, self._executor.run
        block = s.block + 1
        evicting = self.mode is MemoryMode.EVOLVE and layout.evicts(block)
        moved = s.block >= 0 and layout.shift(s.block) != layout.shift(block)
        begun = run(self._begin, drawn, evicting, moved, self.memory_attended(block))
        if not evicting:
            return block, None
        return block, run(self._update_memory, s.memory_ready, queue=Queue.MEMORY, after=[begun])

    def _publish_update(self, updated: Event | None) -> None:
        """Have the next passes attend to the updated memory, once ``updated`` has passed; None: there is none."""
        if updated is not None:
            self._executor.run(self._publish_memory, True, after=[updated])
            self.state.memory_ready = self.state.memory_updated = True

    def split_blocks(self, latents: Tensor) -> tuple[Tensor, ...]:
        """Split ``latents [frames, C, h, w]`` into blocks; :class:`ConfigError` unless they are whole blocks."""
        frames, *shape = self.noise_shape[1:]
        whole = latents.shape[1:] == tuple(shape) and len(latents) > 0 and len(latents) % frames == 0
        if latents.dtype != torch.float32 or not whole:
            raise ConfigError(
                f"expected initial latents float32 [k*{frames}, {', '.join(map(str, shape))}], "
                f"got {plain(latents.dtype)} {list(latents.shape)}"
            )
        blocks: tuple[Tensor, ...] = latents.split(frames)
        return blocks

    def memory_attended(self, block: int) -> bool:
        """Whether a pass of ``block`` would attend to the memory now."""
        usable = self.mode is not MemoryMode.OFF and self.state.memory_ready
        return usable and self._layout.memory_fits(block)

    @property
    def memory(self) -> Tensor | None:
        """The memory's state ``[tokens, dim]``, the live tensor; None before the first update."""
        return self.state.memory if self.state.memory_ready else None

    @property
    def generated_blocks(self) -> int:
        """Number of generated blocks so far, given ones not counted."""
        return self.state.block + 1 - self.state.initial_blocks

    @property
    def noise_shape(self) -> torch.Size:
        """Shape of the next block's noise, ``[steps, B, C, h, w]``."""
        return torch.Size((len(self._steps), *self.state.x.shape))

    @property
    def _steps(self) -> range:
        """The next block's denoising steps, by their numbers in the schedule."""
        return self._schedule.steps(first=self.generated_blocks == 0)

    def _span(self, block: int) -> Span:
        layout, tokens = self._layout, self.config.tokens_per_frame
        return Span(
            begin=layout.attended_begin(self.memory_attended(block)) * tokens,
            end=layout.attended_end(block) * tokens,
            in_sink=layout.is_sink_block(block),
        )

    # ---------------------------------------------------------------- stages

    def _begin(self, drawn: int, evicting: bool, moved: bool, memory_attended: bool) -> None:
        """Advance the position and its angles, copy what is evicted, rotate keys to the new ids, draw noise.

        ``drawn``: number of steps to draw noise for; 0 where the noise is given.
        """
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
        torch.add(s.frame_offsets, s.positions[_FIRST_FRAME], out=s.latent_rows)
        s.latent_rows.remainder_(window.cached_frames)
        if evicting:
            torch.sub(s.write_index, self.config.ring_begin, out=s.ring_rows)
            torch.index_select(s.ring_k, 0, s.ring_rows, out=s.evicted_k)
            torch.index_select(s.kv[-1, 1], 0, s.write_index, out=s.evicted_v)
        self._reanchor(s.sink_k if moved and window.sink_frames else None, s.memory_k if memory_attended else None)
        for step, noise in enumerate(s.noise[:drawn]):
            self._ops.counter_noise(noise, s.positions, s.seed, step)
        s.x.copy_(s.noise[0])

    def _denoise(self, row: int, renoise: int | None, span: Span, observed: bool) -> None:
        """Run one denoising pass; ``x`` becomes the input of the next one, or the clean latents.

        ``row``: the step's number in the schedule; ``renoise``: that of the fresh noise, None after the last step.
        """
        s = self.state
        flow = self._transformer.flow(s.x, row, s.text_kv, self._cache(row, span))
        fresh = None if renoise is None else s.noise[renoise]
        self._ops.flow_step(s.x, flow, self._schedule.sigmas[row], fresh)
        if observed:
            s.flow.copy_(flow)

    def _cache(self, row: int, span: Span) -> BlockCache:
        return BlockCache(self.config, self.state, self._ops, self._attention, self._rounding[row], span)

    def _keep(self, span: Span, memory_ready: bool) -> None:
        """Run the context pass, which stores clean keys and values in the block's slot; keep latents and vitals."""
        s, context = self.state, self._schedule.context
        self._transformer.store_keys(s.x, context, s.text_kv, self._cache(context, span))
        s.latents.index_copy_(0, s.latent_rows, s.x)
        finite = torch.isfinite(s.x)
        s.vitals[VITALS.index("latent_mean")] = s.x.mean()
        s.vitals[VITALS.index("latent_std")] = s.x.std()
        s.vitals[VITALS.index("latent_nonfinite")] = finite.logical_not_().sum()
        if memory_ready:
            s.vitals[VITALS.index("memory_norm")] = s.memory.float().square().mean().sqrt()

    # ---------------------------------------------------------------- memory

    def _update_memory(self, ready: bool) -> None:
        """Stage the memory's update with the evicted keys and values; it is not attended to yet."""
        assert self._memory is not None
        s = self.state
        if not ready:
            s.memory.copy_(self._memory.query_init)
        k = s.evicted_k
        if self._reads_rotated:
            first, shift = s.positions[_FIRST_FRAME], s.positions[_SHIFT]
            k = self._rotated(k, s.frame_offsets + (first - self.config.window.local_frames - shift))
        self._show_memory(k, s.evicted_v)

    def _show_memory(self, k: Tensor, v: Tensor) -> None:
        """Update the memory with keys ``k`` and values ``v [n, H, d]``, and compute its own keys and values."""
        assert self._memory is not None
        s, gate = self.state, VITALS.index("gate_mean")
        self._memory.update(s.memory, k, v, s.staged_memory, s.vitals[gate : gate + 1])
        self._take_memory(s.staged_memory)

    def _rotated(self, keys: Tensor, ids: Tensor) -> Tensor:
        """Rotate ``keys [F·S, H, d]`` by the temporal ``ids`` [F] of their frames and by their rows and columns."""
        rope = self.state.rope
        turns = rope.temporal_block.new_empty(len(ids), *rope.temporal_block.shape[1:])
        self._ops.rope_table(ids, rope.inverse_frequencies, turns)
        kv = keys.new_empty(1, 2, *keys.shape)
        self._ops.reanchor(kv, turns, rope.spatial, keys[None], None, None, 0)  # as the sink of a model of one layer
        return kv[0, 0]

    def rotated_sink(self, layer: int) -> Tensor:
        """Rotate the sink keys of a layer of ``kv`` ``[n, H, d]`` to their present ids, as each shift of ids does."""
        s, frames = self.state, self.config.window.sink_frames
        ids = torch.arange(frames, device=s.sink_k.device) + s.positions[_SHIFT]
        return self._rotated(s.sink_k[layer], ids) if frames else s.sink_k[layer]

    def _take_memory(self, memory: Tensor) -> None:
        """Set the memory's state, and compute its keys and values, which all layers share."""
        assert self._memory is not None
        s = self.state
        s.memory.copy_(memory)
        k, v = self._memory.keys_values(s.memory)
        s.memory_k.copy_(k)
        s.memory_v.copy_(v)

    def _publish_memory(self, rotate: bool) -> None:
        """Copy the memory's keys and values to where all layers attend to them; without ``rotate``, only the values."""
        self._reanchor(None, self.state.memory_k if rotate else None, self.state.memory_v)

    def _reanchor(self, sink_k: Tensor | None, memory_k: Tensor | None, memory_v: Tensor | None = None) -> None:
        """Rotate unrotated keys to their ids, and copy values, to where all layers attend to them; None: not these."""
        s, tokens = self.state, self.config.memory_tokens
        sinks = (None, None) if sink_k is None else sink_k.split([len(s.kv), len(s.kv_float8)])
        for kv, sink in zip((s.kv, s.kv_float8), sinks, strict=True):
            if len(kv):
                self._ops.reanchor(kv, s.rope.temporal_anchor, s.rope.spatial, sink, memory_k, memory_v, tokens)

    def _rebuild_memory(self) -> None:
        """Restart the memory and update it once with the whole local window, if that is not empty."""
        assert self._memory is not None
        s, layout, begin = self.state, self._layout, self.config.ring_begin
        s.memory.copy_(self._memory.query_init)
        s.memory_ready = False
        frames = range(layout.oldest_local(s.block), layout.last_frame(s.block) + 1)
        if not frames:
            return
        filled = len(frames) * self.config.tokens_per_frame
        k = s.ring_k[:filled]
        if self._reads_rotated:
            ids = [layout.temporal_id(s.block, frame) for frame in sorted(frames, key=layout.slot)]
            k = self._rotated(k, torch.tensor(ids, device="cpu").to(k.device))
        self._show_memory(k, s.kv[-1, 1, begin : begin + filled])
        self._publish_memory(False)
        s.memory_ready = s.memory_updated = True

    # ---------------------------------------------------------------- prompt switch

    def _recache(self) -> None:
        """Run one pass at the context timestep over the last frames; its keys and values replace the local ones.

        The frames are the last ``sink + local``, or all there are. Rare, so it may allocate.
        """
        s, window = self.state, self.config.window
        generated = self._layout.last_frame(s.block) + 1
        frames = torch.arange(max(0, generated - window.cached_frames), generated, device="cpu")
        latents = s.latents[(frames % window.cached_frames).to(s.kv.device)]
        context = self._schedule.context
        cache = WindowCache(self.config, s, self._ops, self._attention, self._rounding[context], frames)
        self._transformer.store_keys(latents, context, s.text_kv, cache)
