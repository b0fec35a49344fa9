"""One video's state, and the KV buffer as the passes use it: where keys and values are stored, and which are read.

All tensors are preallocated, at addresses that never change, however long the video. The KV buffer's rows are
``memory | sink | local ring``. Attention has no mask and does not depend on the order of keys, so a block always
attends to one contiguous slice of it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from echo_rt.attention import Attention
from echo_rt.config import ModelConfig
from echo_rt.errors import BackendError
from echo_rt.model.transformer import LayerWeights
from echo_rt.ops.float8 import rounded
from echo_rt.ops.schema import POSITION_FIELDS, Ops
from echo_rt.utils.device import FLOAT8

try:
    from echo_rt._C import RingLayout
except ImportError as missing:
    raise BackendError(f"echo_rt._C must be compiled (make install, or pip install .), but: {missing}") from None


def ring_layout(config: ModelConfig) -> RingLayout:
    """The ring arithmetic of a model: slots, ids and shift as functions of the block number."""
    return RingLayout(
        frames_per_block=config.window.frames_per_block,
        sink_frames=config.window.sink_frames,
        local_frames=config.window.local_frames,
        memory_frames=config.memory_frames,
        max_temporal_id=config.window.max_temporal_id,
    )


def _inverse_frequencies(channels: int, theta: float, device: torch.device) -> Tensor:
    return theta ** -(torch.arange(0, channels, 2, dtype=torch.float64, device=device) / channels)


class RopeTables:
    """Angles of the 3-D rotation: constant for rows and columns, updated once per block for time."""

    def __init__(self, config: ModelConfig, ops: Ops, device: torch.device) -> None:
        theta = config.transformer.rope_theta
        temporal, row_channels, column_channels = config.transformer.rope_dims
        rows, columns = config.grid
        self.inverse_frequencies = _inverse_frequencies(temporal, theta, device)
        parts = []
        for places, channels in (
            (torch.arange(rows, device=device).repeat_interleave(columns), row_channels),
            (torch.arange(columns, device=device).repeat(rows), column_channels),
        ):
            table = torch.empty(places.shape[0], channels // 2, 2, device=device, dtype=torch.float32)
            ops.rope_table(places, _inverse_frequencies(channels, theta, device), table)
            parts.append(table)
        self.spatial = torch.cat(parts, dim=1)
        pairs = temporal // 2
        anchors = config.memory_frames + config.window.sink_frames
        self.temporal_block = self.spatial.new_zeros(config.window.frames_per_block, pairs, 2)
        self.temporal_anchor = self.spatial.new_zeros(anchors, pairs, 2)


# Entries of the device-side statistics of a block; echo_rt.chunk.Vitals explains them.
VITALS = ("latent_mean", "latent_std", "latent_nonfinite", "memory_norm", "gate_mean")


class RolloutState:
    """The tensors of one rollout, and what the host must know to order the work.

    ``block``: the last block of the video (-1: none); ``initial_blocks``: how many blocks at its beginning were given
    instead of generated; ``memory_ready``: the memory has been updated (or is a prior) since the start or the last
    rebuild, so it is attended to wherever its ids fit; ``memory_updated``: the vitals hold the gate of an update.
    ``sink_k`` has the layers of ``kv`` first, then those of ``kv_float8``: ``float8_layers``, never the last one.
    """

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        *,
        device: torch.device,
        dtype: torch.dtype,
        float8_layers: Collection[int] = (),
    ) -> None:
        def zeros(*shape: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, device=device, dtype=kind)

        window, transformer = config.window, config.transformer
        heads = (transformer.num_heads, transformer.head_dim)
        layers, tokens, block_tokens = transformer.num_layers, config.tokens_per_frame, config.tokens_per_block
        self.layout = ring_layout(config)
        self.kv = zeros(layers - len(float8_layers), 2, config.cached_tokens, *heads)
        self.kv_float8 = zeros(len(float8_layers), 2, config.cached_tokens, *heads, kind=FLOAT8)
        self.sink_k = zeros(layers, window.sink_frames * tokens, *heads)  # before rotation
        self.ring_k = zeros(window.local_frames * tokens, *heads)  # the last layer's, before rotation
        order = sorted(range(layers), key=lambda index: index in float8_layers)
        own = dict(zip(order, zip((*self.kv, *self.kv_float8), self.sink_k, strict=True), strict=True))
        self.layers = [own[index] for index in range(layers)]  # kv [2, rows, H, d] and sink_k [n, H, d] of each
        self.text_kv = zeros(layers, 2, transformer.text_len, *heads)
        self.memory = zeros(config.memory_tokens, transformer.dim)
        self.memory_k = zeros(config.memory_tokens, *heads)  # before rotation
        self.memory_v = zeros(config.memory_tokens, *heads)
        self.staged_memory = zeros(config.memory_tokens, transformer.dim)
        # Copies of what the last layer is about to overwrite, which the memory reads beside the first pass.
        self.evicted_k = zeros(block_tokens, *heads)  # before rotation
        self.evicted_v = zeros(block_tokens, *heads)
        self.latents = zeros(window.cached_frames, *config.latent_shape, kind=torch.float32)  # clean; frame % length
        self.x = zeros(window.frames_per_block, *config.latent_shape, kind=torch.float32)
        self.noise = zeros(config.sampler.most_steps, *self.x.shape, kind=torch.float32)
        self.flow = zeros(*self.x.shape)
        self.seed = zeros(2, kind=torch.int64)  # its low and its high 32 bits
        self.positions = zeros(len(POSITION_FIELDS), kind=torch.int64)
        self.write_index = zeros(block_tokens, kind=torch.int64)
        self.ring_rows = zeros(block_tokens, kind=torch.int64)  # the same rows, counted from the first of the ring
        self.latent_rows = zeros(window.frames_per_block, kind=torch.int64)  # rows of ``latents`` of the block
        self.vitals = zeros(len(VITALS), kind=torch.float32)
        self.frame_offsets = torch.arange(window.frames_per_block, device=device)
        self.rope = RopeTables(config, ops, device)
        self.reset()

    def reset(self) -> None:
        """Go back to before the first block; the prompt's keys stay."""
        self.positions.zero_()
        self.positions[POSITION_FIELDS.index("block")] = -1
        for left in (self.vitals, self.kv, self.kv_float8, self.sink_k, self.ring_k, self.memory, self.memory_k):
            left.zero_()  # a video that ended in NaN must leave none to the next
        self.latents.zero_()
        self.block = -1
        self.initial_blocks = 0
        self.memory_ready = self.memory_updated = False

    def tensors(self) -> dict[str, Tensor]:
        """Everything needed to continue bit for bit after this block, by name; the live tensors, not copies.

        Not what each block computes anew (``x``, noise, evicted keys, the staged memory, angles), nor the seed, which
        belongs to the stream.
        """
        names = ["kv", "sink_k", "ring_k", "text_kv", "memory", "memory_k", "latents", "positions"]
        if len(self.kv_float8):
            names.append("kv_float8")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Span:
    """The rows of the KV buffer that a block's pass attends to, and whether the block belongs to the sink."""

    begin: int
    end: int
    in_sink: bool


@dataclass(eq=False)
class _Cache:
    """The cache of a pass. ``_rounding``: layers with a 16-bit cache that the pass attends to in float8."""

    _config: ModelConfig
    _state: RolloutState
    _ops: Ops
    _attention: Attention
    _rounding: Collection[int]

    def _store(
        self,
        index: int,
        layer: LayerWeights,
        qkv: Tensor,
        temporal: Tensor,
        rows: Tensor,
        raw: tuple[Tensor | None, int],
    ) -> Tensor:
        """Store keys and values in ``rows``, and unrotated keys as ``raw`` (tensor, offset) says; returns ``q``."""
        (k, v), _ = self._state.layers[index]
        spatial, eps = self._state.rope.spatial, self._config.transformer.eps
        return self._ops.qkv_norm_rope_store(qkv, layer.norm_q, layer.norm_k, temporal, spatial, k, v, rows, *raw, eps)

    def _attend(self, index: int, q: Tensor, rows: slice) -> Tensor:
        kv = self._state.layers[index][0][:, rows]
        if index in self._rounding:
            q, kv = rounded(q, FLOAT8), rounded(kv, FLOAT8)
        return self._attention(q, kv[0], kv[1])


@dataclass(eq=False)
class BlockCache(_Cache):
    """The cache of a block's pass, which overwrites the keys and values of the pass before in the block's slot."""

    _span: Span

    def store(self, index: int, layer: LayerWeights, qkv: Tensor) -> Tensor:
        s, config = self._state, self._config
        raw: tuple[Tensor | None, int] = None, 0
        if self._span.in_sink:
            raw = s.layers[index][1], config.memory_tokens
        elif index + 1 == config.transformer.num_layers:
            raw = s.ring_k, config.ring_begin
        return self._store(index, layer, qkv, s.rope.temporal_block, s.write_index, raw)

    def attend(self, index: int, q: Tensor) -> Tensor:
        return self._attend(index, q, slice(self._span.begin, self._span.end))


@dataclass(eq=False)
class WindowCache(_Cache):
    """The cache of a prompt switch's pass, which stores new keys and values of the local frames.

    A pass that reaches back to frame 0 attends to new keys and values of the sink too. After each layer the old ones
    are restored, unless the window has ``recache_sink``. ``_frames``: numbers of the pass's frames, on the host.
    """

    _frames: Tensor

    def __post_init__(self) -> None:
        config, state, frames = self._config, self._state, self._frames
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
        self._ops.rope_table(frames.to(device), state.rope.inverse_frequencies, self._temporal)

    def store(self, index: int, layer: LayerWeights, qkv: Tensor) -> Tensor:
        s, config = self._state, self._config
        last = index + 1 == config.transformer.num_layers
        kv, sink_k = s.layers[index]
        self._kept = kv[:, self._sink].clone() if self._whole_video and not self._renews_sink else None
        raw_k = qkv.new_empty(kv.shape[1:]) if last or self._renews_sink else None
        q = self._store(index, layer, qkv, self._temporal, self._rows, (raw_k, 0))
        if raw_k is not None and self._renews_sink:
            sink_k[self._sink_rows - config.memory_tokens] = raw_k[self._sink_rows]
        if raw_k is not None and last:
            s.ring_k[self._ring_rows - config.ring_begin] = raw_k[self._ring_rows]
            self._restore_sink(index)  # the pass ends here: the last layer does not attend
        return q

    def attend(self, index: int, q: Tensor) -> Tensor:
        out = self._attend(index, q, self._attended)
        self._restore_sink(index)
        return out

    def _restore_sink(self, index: int) -> None:
        if self._kept is not None:
            self._state.layers[index][0][:, self._sink] = self._kept
