"""One video's state: every tensor preallocated, at an address that never changes, whatever the length of the video.

The KV buffer's rows are ``memory | sink | local ring``. Attention has no mask and does not care about the order of
keys, so what a block attends to is always one contiguous slice of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from echo_rt.config import ModelConfig
from echo_rt.errors import BackendError
from echo_rt.ops import POSITION_FIELDS, Ops

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
    """Angles of the 3-D rotation: constant for rows and columns, advanced once a block for time."""

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


# Entries of the device-side record of a block's statistics; echo_rt.chunk.Vitals says what they are.
VITALS = ("latent_mean", "latent_std", "latent_nonfinite", "memory_norm", "gate_mean")


class RolloutState:
    """The tensors of one rollout, and the host's mirror of the facts it needs to order the work.

    ``block``: the last block generated (-1: none); ``memory_ready``: the memory has been updated (or is a prior's)
    since the start or the last rebuild, so it is attended to wherever its ids fit; ``memory_updated``: the vitals hold
    the gate of an update.
    """

    def __init__(self, config: ModelConfig, ops: Ops, *, device: torch.device, dtype: torch.dtype) -> None:
        window, transformer = config.window, config.transformer
        heads = (transformer.num_heads, transformer.head_dim)
        layers, tokens = transformer.num_layers, config.tokens_per_frame
        rows = (config.memory_frames + window.cached_frames) * tokens

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, device=device, dtype=dtype)

        self.layout = ring_layout(config)
        self.kv = zeros(layers, 2, rows, *heads)
        self.sink_k = zeros(layers, window.sink_frames * tokens, *heads)  # before rotation
        self.ring_k = zeros(window.local_frames * tokens, *heads)  # the last layer's, before rotation
        self.text_kv = zeros(layers, 2, transformer.text_len, *heads)
        self.memory = zeros(config.memory_tokens, transformer.dim)
        self.memory_k = zeros(config.memory_tokens, *heads)  # before rotation
        self.memory_v = torch.zeros_like(self.memory_k)
        self.staged_memory = torch.zeros_like(self.memory)
        # What the last layer is about to overwrite, set aside: the memory looks at it beside the first pass.
        self.evicted_k = zeros(config.tokens_per_block, *heads)  # before rotation
        self.evicted_v = torch.zeros_like(self.evicted_k)
        self.latents = zeros(
            window.cached_frames, *config.latent_shape, dtype=torch.float32
        )  # clean, by frame % length
        self.x = zeros(window.frames_per_block, *config.latent_shape, dtype=torch.float32)
        self.noise = zeros(len(config.sampler.denoising_steps), *self.x.shape, dtype=torch.float32)
        self.flow = torch.zeros_like(self.x, dtype=dtype)
        self.seed = zeros(2, dtype=torch.int64)  # its low and its high 32 bits
        self.positions = zeros(len(POSITION_FIELDS), dtype=torch.int64)
        self.write_index = zeros(config.tokens_per_block, dtype=torch.int64)
        self.ring_rows = torch.zeros_like(self.write_index)  # the same rows, counted from the ring's first
        self.frame_offsets = torch.arange(window.frames_per_block, device=device)
        self.latent_rows = torch.zeros_like(self.frame_offsets)  # of ``latents``, that the block occupies
        self.vitals = zeros(len(VITALS), dtype=torch.float32)
        self.rope = RopeTables(config, ops, device)
        self.block = -1
        self.memory_ready = self.memory_updated = False
        self.reset()

    def reset(self) -> None:
        """Back to before the first block; the prompt's keys stay."""
        self.positions.zero_()
        self.positions[POSITION_FIELDS.index("block")] = -1
        for left in (self.vitals, self.kv, self.sink_k, self.ring_k, self.memory, self.memory_k, self.latents):
            left.zero_()  # a video that ended in NaN leaves none to the next
        self.block = -1
        self.memory_ready = self.memory_updated = False

    def tensors(self) -> dict[str, Tensor]:
        """What must be kept to go on bit for bit after this block, by name; the live tensors, not copies.

        What each block computes afresh (``x``, noise, what was evicted, the staged memory, the angles) is not among
        them, nor is the seed, which belongs to the stream.
        """
        return {
            "kv": self.kv,
            "sink_k": self.sink_k,
            "ring_k": self.ring_k,
            "text_kv": self.text_kv,
            "memory": self.memory,
            "memory_k": self.memory_k,
            "latents": self.latents,
            "positions": self.positions,
        }
