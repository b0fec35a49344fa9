"""The KV buffer as the passes use it: where a layer stores its keys and values, and which of them it attends to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from echo_rt.attention import Attention
from echo_rt.config import ModelConfig
from echo_rt.engine.state import RolloutState
from echo_rt.model.transformer import LayerWeights
from echo_rt.ops.schema import Ops


@dataclass(frozen=True)
class Span:
    """The rows of the KV buffer that a block's pass attends to, and whether the block belongs to the sink."""

    begin: int
    end: int
    in_sink: bool


class BlockCache:
    """The cache of a block's pass, which overwrites the keys and values of the pass before in the block's slot."""

    def __init__(self, config: ModelConfig, state: RolloutState, ops: Ops, attention: Attention, span: Span) -> None:
        self._config, self._state, self._ops, self._attention, self._span = config, state, ops, attention, span

    def store(self, index: int, layer: LayerWeights, qkv: Tensor) -> Tensor:
        s, config = self._state, self._config
        raw_k, raw_offset = None, 0
        if self._span.in_sink:
            raw_k, raw_offset = s.sink_k[index], config.memory_tokens
        elif index + 1 == config.transformer.num_layers:
            raw_k, raw_offset = s.ring_k, config.ring_begin
        k, v = s.kv[index]
        return self._ops.qkv_norm_rope_store(
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
            config.transformer.eps,
        )

    def attend(self, index: int, q: Tensor) -> Tensor:
        k, v = self._state.kv[index]
        return self._attention(q, k[self._span.begin : self._span.end], v[self._span.begin : self._span.end])


class WindowCache:
    """The cache of a prompt switch's pass, which stores new keys and values of the local frames.

    A pass that reaches back to frame 0 attends to new keys and values of the sink too. After each layer the old ones
    are restored, unless the window has ``recache_sink``. ``frames``: numbers of the pass's frames, on the host.
    """

    def __init__(
        self, config: ModelConfig, state: RolloutState, ops: Ops, attention: Attention, frames: Tensor
    ) -> None:
        self._config, self._state, self._ops, self._attention = config, state, ops, attention
        layout, tokens, device = state.layout, config.tokens_per_frame, state.kv.device
        self._whole_video = int(frames[0]) == 0
        self._renews_sink = self._whole_video and config.window.recache_sink
        # Never two frames with the same slot: it is undefined which of them an indexed copy keeps.
        stored = [f for f in frames.tolist() if self._whole_video or f >= layout.oldest_local(state.block)]
        slots = torch.tensor([layout.slot(f) for f in stored], dtype=torch.int64, device="cpu")
        rows = slots[:, None] * tokens + torch.arange(tokens, device="cpu")
        self._rows = rows.flatten().to(device)
        self._ring_rows = rows[rows >= config.ring_begin].to(device)
        self._sink_rows = rows[rows < config.ring_begin].to(device)
        self._sink = slice(config.memory_tokens, config.ring_begin)
        self._attended = slice(config.memory_tokens, layout.attended_end(state.block) * tokens)
        self._kept: Tensor | None = None
        self._temporal = state.rope.temporal_block.new_empty(len(frames), *state.rope.temporal_block.shape[1:])
        ops.rope_table(frames.to(device), state.rope.inverse_frequencies, self._temporal)

    def store(self, index: int, layer: LayerWeights, qkv: Tensor) -> Tensor:
        s, config = self._state, self._config
        last = index + 1 == config.transformer.num_layers
        k, v = s.kv[index]
        self._kept = s.kv[index, :, self._sink].clone() if self._whole_video and not self._renews_sink else None
        raw_k = torch.empty_like(k) if last or self._renews_sink else None
        q = self._ops.qkv_norm_rope_store(
            qkv,
            layer.norm_q,
            layer.norm_k,
            self._temporal,
            s.rope.spatial,
            k,
            v,
            self._rows,
            raw_k,
            0,
            config.transformer.eps,
        )
        if raw_k is not None and self._renews_sink:
            s.sink_k[index, self._sink_rows - config.memory_tokens] = raw_k[self._sink_rows]
        if raw_k is not None and last:
            s.ring_k[self._ring_rows - config.ring_begin] = raw_k[self._ring_rows]
            self._restore_sink(index)  # the pass ends here: the last layer does not attend
        return q

    def attend(self, index: int, q: Tensor) -> Tensor:
        k, v = self._state.kv[index]
        out = self._attention(q, k[self._attended], v[self._attended])
        self._restore_sink(index)
        return out

    def _restore_sink(self, index: int) -> None:
        if self._kept is not None:
            self._state.kv[index, :, self._sink] = self._kept
