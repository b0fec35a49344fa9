"""What a runtime lends to a stream, and the state in it: saved as a snapshot, loaded from one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from echo_rt.chunk import Chunk
from echo_rt.config import VaeConfig
from echo_rt.engine.executor import Executor
from echo_rt.engine.initial_video import InitialVideoEncoder
from echo_rt.engine.pipeline import Pipeline
from echo_rt.engine.prompts import PromptEncoder, check_prompt_embeds
from echo_rt.engine.rollout import Rollout
from echo_rt.engine.steady_state import SteadyCheck
from echo_rt.errors import ConfigError, PromptError, StreamError
from echo_rt.snapshot.fit import difference
from echo_rt.snapshot.snapshot import Snapshot
from echo_rt.snapshot.ways import Ways
from echo_rt.utils.wording import plain


@dataclass(frozen=True, eq=False)
class Engine:
    """``lookahead``: blocks that are begun before an earlier one is handed out; ``check``: where it is asked for."""

    device: torch.device
    dtype: torch.dtype
    vae_dtype: torch.dtype
    rollout: Rollout
    pipeline: Pipeline
    executor: Executor
    vae: VaeConfig
    model: Mapping[str, Any]
    ways: Ways
    prompts: PromptEncoder
    initial_video: InitialVideoEncoder
    lookahead: int
    check: SteadyCheck | None

    @property
    def block(self) -> int:
        """The last block that was begun, -1 before the first."""
        return self.rollout.state.block

    def start(self, prompt_embeds: Tensor, seed: int) -> None:
        """Begin a new video with ``prompt_embeds [length, text_dim]``, whatever was in the buffers."""
        self.pipeline.reset()
        self.rollout.start(prompt_embeds, seed)

    @property
    def initial_blocks(self) -> int:
        """How many blocks at the beginning of the video are given, those that are still to come included."""
        return self.rollout.state.initial_blocks + len(self.pipeline.given)

    def prefill(self, latents: Tensor) -> None:
        """Have the video begin with ``latents`` float32 ``[frames, C, h, w]``, normalized, a whole number of blocks.

        Each is begun, decoded and finished when it is its turn, as the generated ones behind it are, but passes through
        the transformer once, for its keys and values. Call it behind :meth:`start`. :class:`ConfigError` for others.
        """
        self.rollout.split_blocks(latents)  # refused before anything is done
        own = latents.detach().to("cpu", copy=True)
        if self.device.type == "cuda":
            own = own.pin_memory()  # the host does not wait for a copy of it to the device
        self.pipeline.given.extend(self.rollout.split_blocks(own))

    def save_state(
        self,
        seed: int,
        prompts: Mapping[int, Tensor] | None = None,
        held: Sequence[Chunk] = (),
        offset: int = 0,
        caller_noise: bool = False,
    ) -> Snapshot:
        """Copy the state behind the last block begun to the host, once all that was asked for is done.

        The rest is the stream's, which :class:`Snapshot` explains.
        """
        pinned = self.device.type == "cuda"  # several times as fast as memory that may be paged out
        self.executor.synchronize()
        copies: dict[str, Tensor] = {}
        with self.executor.eager():
            for name, tensor in self.pipeline.live_tensors().items():
                copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
                copies[name].copy_(tensor, non_blocking=True)
        self.executor.synchronize()
        given = self.pipeline.given
        return Snapshot(
            model=dict(self.model),
            seed=seed,
            block=self.block,
            memory_ready=self.rollout.state.memory_ready,
            latents_decoded=self.pipeline.decoder_state.latents_seen,
            tensors=copies,
            prompts=dict(prompts or {}),
            held=tuple(held),
            offset=offset,
            initial_blocks=self.rollout.state.initial_blocks,
            caller_noise=caller_noise,
            initial_latents=torch.cat(list(given)) if given else None,
        )

    def finite(self) -> bool:
        """Whether all that the next block depends on is finite; waits for it."""
        with self.executor.eager():
            # Without a memory some are empty.
            values = [t for t in self.pipeline.live_tensors().values() if t.is_floating_point() and t.numel()]
            ends = [torch.aminmax(t) for t in values]
            return all(bool(torch.isfinite(low) & torch.isfinite(high)) for low, high in ends)

    def require_fit(self, snapshot: Snapshot) -> None:
        """:class:`StreamError` for a snapshot of another model, one computed otherwise, or one that is not whole."""
        if different := difference(snapshot.model, self.model, self.vae.spatial_stride):
            raise StreamError(f"the snapshot is of another model: {different}")
        if conflict := self.ways.conflict(snapshot.model):
            raise StreamError(f"the snapshot cannot go on here bit for bit: {conflict}")
        frames = (snapshot.block + 1) * self.rollout.config.window.frames_per_block
        whole = snapshot.block >= -1 and frames == snapshot.latents_decoded and snapshot.offset >= 0
        passed, begun = snapshot.initial_blocks, snapshot.block + 1
        whole &= passed == begun if snapshot.initial_latents is not None else 0 <= passed <= begun
        if not whole or snapshot.next_block < 0:
            raise StreamError(
                f"the snapshot contradicts itself: {snapshot.latents_decoded} latents decoded and {len(snapshot.held)} "
                f"blocks held at block {snapshot.block}, {snapshot.offset} behind the video's"
            )
        for name, tensor in self.pipeline.live_tensors().items():
            saved = snapshot.tensors.get(name)
            if saved is None or saved.shape != tensor.shape or saved.dtype != tensor.dtype:
                expected, came = (
                    "nothing" if t is None else f"{plain(t.dtype)} {list(t.shape)}" for t in (tensor, saved)
                )
                raise StreamError(f"snapshot tensor {name}: expected {expected}, got {came}")
        if snapshot.initial_latents is not None:
            try:
                self.rollout.split_blocks(snapshot.initial_latents)
            except ConfigError as error:
                raise StreamError(f"the snapshot's initial video: {error}") from None
        text = self.rollout.config.transformer
        for block, embeds in snapshot.prompts.items():
            try:
                check_prompt_embeds(embeds, text.text_dim, text.text_len)
            except PromptError as error:
                raise StreamError(f"the snapshot's prompt for block {block}: {error}") from None

    def load_state(self, snapshot: Snapshot, seed: int) -> None:
        """Stand where ``snapshot``, which :meth:`require_fit` has passed, was taken; ``seed`` is the next noise's."""
        state = self.rollout.state
        self.pipeline.reset()
        state.reset()
        self.rollout.set_seed(seed)
        with self.executor.eager():
            for name, tensor in self.pipeline.live_tensors().items():
                tensor.copy_(snapshot.tensors[name])
        self.executor.synchronize()  # the snapshot may be let go of
        state.block = snapshot.block
        state.initial_blocks = snapshot.initial_blocks
        state.memory_ready = snapshot.memory_ready
        self.pipeline.decoder_state.latents_seen = snapshot.latents_decoded
        if snapshot.initial_latents is not None:
            self.prefill(snapshot.initial_latents)
