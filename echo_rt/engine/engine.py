"""What a runtime lends to a stream: the one builder of a video's parts, and alone what saves and loads their state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from echo_rt.config import ModelConfig
from echo_rt.engine.build import Networks, build_rollout
from echo_rt.engine.executor import SteadyCheck, make_executor
from echo_rt.engine.initial_video import InitialVideoEncoder
from echo_rt.engine.memory_budget import require_capacity
from echo_rt.engine.pipeline import Pipeline
from echo_rt.engine.prompts import NOW, PromptEncoder, check_prompt_embeds, prompt_of
from echo_rt.errors import ConfigError, PromptError, StreamError
from echo_rt.model.linear import SELF_ATTENTION
from echo_rt.options import MemoryMode, RuntimeOptions
from echo_rt.snapshot.fit import IMPLEMENTATIONS, LINEAR, LINEAR_BEFORE, WEIGHTS, Selected, conflict, difference
from echo_rt.snapshot.kv_rows import MEMORY, SINK, copy_rows, same_bits, shapes_in_snapshots, split_kv
from echo_rt.snapshot.snapshot import Snapshot
from echo_rt.utils.device import FLOAT8, model_context
from echo_rt.utils.wording import plain
from echo_rt.weights.choice import TAKEN
from echo_rt.weights.folder import ModelFolder


class Engine:
    """The parts of a model that make one video at a time: networks on the device, buffers allocated.

    ``model``: its description for snapshots; ``implementations``: by their label in it; ``lookahead``: number of blocks
    begun ahead; ``check``: None unless asked for.

    Args:
        config: the config of ``networks``, or the same without its memory.
        options: read for ``graphs``, ``lookahead``, ``check`` and ``keep_text_encoder``.
        folder: with the text encoder; without it the engine takes only embeddings.
        taken: what the model was made of, for its snapshots, in plain JSON types.

    Raises:
        ConfigError, BackendError: for options that the model cannot have, or too little memory.
    """

    def __init__(
        self,
        config: ModelConfig,
        networks: Networks,
        options: RuntimeOptions,
        mode: MemoryMode,
        *,
        folder: ModelFolder | None = None,
        taken: Mapping[str, Any] | None = None,
    ) -> None:
        vae, device = networks.vae, networks.device
        assert vae is not None
        self.vae, self.device, self.dtype, self.vae_dtype = vae, device, networks.dtype, networks.vae_dtype
        self.executor = make_executor(device, options.graphs)
        # A CPU computes one block at a time.
        self.lookahead = int(device.type == "cuda") if options.lookahead is None else options.lookahead
        depth = 1 + self.lookahead
        require_capacity(config, networks, depth)
        # Before the weights: a measurement takes memory that they will need.
        _ = networks.attention, networks.attention_in_float8, networks.linear
        # float32 whatever the model's dtype: LoRAs are merged in it, and must not depend on the caller's TF32 settings.
        with model_context(device, self.dtype, self.vae_dtype, torch.float32):
            networks.load(config)
            self.rollout = build_rollout(config, networks, mode, self.executor)
            self.pipeline = Pipeline(
                self.rollout, networks.decoder, vae, networks.ops, self.executor, device=device, depth=depth
            )
        self.implementations: Mapping[str, Selected] = networks.implementations()
        tensors = networks.tensors
        # All that a video depends on beside seed and prompts: a snapshot can be resumed only where this is the same.
        self.model: dict[str, Any] = {
            **config.to_flat(),
            "memory_mode": mode.value,
            "vae": networks.vae_name,
            "dtype": str(networks.model_dtype),
            "vae_dtype": str(self.vae_dtype),
            IMPLEMENTATIONS: {
                label: chosen.name
                for label, chosen in self.implementations.items()
                if not (label.startswith(LINEAR) and chosen.name == LINEAR_BEFORE)
            },
            WEIGHTS: [part.digest() for part in (tensors.transformer, tensors.memory, tensors.vae)],
        }
        if taken is not None:
            self.model[TAKEN] = dict(taken)
        if networks.model_dtype == FLOAT8:
            kept = networks.kept_from_float8
            self.model["float8_except"] = sorted(name for name in kept if not name.endswith(SELF_ATTENTION))
            self.model["float8_attention"] = list(networks.float8_layers)
        keep = options.keep_text_encoder
        self.prompts = PromptEncoder(folder, config.transformer, device, keep=keep, dtype=networks.model_dtype)
        self.initial_video = InitialVideoEncoder(folder, config, vae, device, self.vae_dtype)
        self.check = SteadyCheck(self.executor, device, self.pipeline.buffers) if options.check else None

    @property
    def block(self) -> int:
        """The last block that was begun, -1 before the first."""
        return self.rollout.state.block

    def start(self, prompt_embeds: Tensor, seed: int) -> None:
        """Start a new video with ``prompt_embeds [length, text_dim]``; the one before is forgotten."""
        self.pipeline.reset()
        self.rollout.start(prompt_embeds, seed)

    @property
    def initial_blocks(self) -> int:
        """Number of given blocks at the beginning of the video, those still to come included."""
        return self.rollout.state.initial_blocks + len(self.pipeline.given)

    def prefill(self, latents: Tensor) -> None:
        """Begin the video with ``latents`` float32 ``[frames, C, h, w]``, normalized, a whole number of blocks.

        Each is begun, decoded and finished like a generated block, but passes through the transformer only once, for
        its keys and values. Call this after :meth:`start`. Raises :class:`ConfigError` for other shapes and dtypes.
        """
        blocks = self.rollout.split_blocks(latents.detach().to("cpu", copy=True))
        # Pinned, the host does not wait for its copy to the device.
        self.pipeline.given.extend(block.pin_memory() if self.device.type == "cuda" else block for block in blocks)

    def save_state(self, seed: int, **of_stream: Any) -> Snapshot:
        """Wait for all submitted work and copy the state after the last block begun to the host.

        The arguments are the stream's part of a :class:`Snapshot`, by its fields.
        """
        pinned = self.device.type == "cuda"  # copied several times as fast as pageable memory
        self.executor.synchronize()
        copies: dict[str, Tensor] = {}
        with self.executor.eager():
            for name, tensor in self.saved_tensors().items():
                copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
                copy_rows(copies[name], tensor)
        self.executor.synchronize()
        given = self.pipeline.given
        return Snapshot(
            model=dict(self.model),
            seed=seed,
            block=self.block,
            memory_ready=self.rollout.state.memory_ready,
            latents_decoded=(self.block + 1) * self.rollout.config.window.frames_per_block,
            tensors=copies,
            initial_blocks=self.rollout.state.initial_blocks,
            initial_latents=torch.cat(list(given)) if given else None,
            **{"prompts": {}} | of_stream,
        )

    def saved_tensors(self) -> dict[str, Tensor]:
        """The live tensors of a snapshot by name, without what :meth:`load_state` computes to the same bits."""
        live = self._with_kv_split(self.pipeline.live_tensors())
        memory, sink = live[MEMORY], live[SINK]
        if all(same_bits(memory[0], layer) for layer in memory[1:]):
            live[MEMORY] = memory[:1]
        if all(same_bits(keys, self.rollout.rotated_sink(layer)) for layer, (keys, _) in enumerate(sink)):
            live[SINK] = sink[:, 1:]
        return live

    def _with_kv_split(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        config = self.rollout.config
        return split_kv(tensors, config.memory_tokens, config.ring_begin - config.memory_tokens)

    def finite(self) -> bool:
        """Whether all that the next block depends on is finite; waits for submitted work."""
        with self.executor.eager():
            # Some tensors are empty without a memory.
            values = [t for t in self.pipeline.live_tensors().values() if t.is_floating_point() and t.numel()]
            # Float8 has no minimum; converted layer by layer, as the whole cache would be twice its size.
            parts = (part for t in values for part in (map(Tensor.bfloat16, t) if t.dtype == FLOAT8 else (t,)))
            return all(bool(torch.isfinite(end)) for part in parts for end in torch.aminmax(part))

    def require_fit(self, snapshot: Snapshot) -> None:
        """Raise :class:`StreamError` for a snapshot of another model or implementation, or an inconsistent one."""
        if different := difference(snapshot.model, self.model, self.vae.spatial_stride):
            raise StreamError(f"the snapshot is of another model: {different}")
        if reason := conflict(snapshot.model, self.implementations):
            raise StreamError(f"the snapshot cannot go on here bit for bit: {reason}")
        frames = (snapshot.block + 1) * self.rollout.config.window.frames_per_block
        begun, given, coming = snapshot.block + 1, snapshot.initial_blocks, snapshot.initial_latents
        consistent = begun >= 0 and frames == snapshot.latents_decoded and snapshot.offset >= 0
        consistent &= 0 <= given <= begun if coming is None else given == begun
        if not consistent or snapshot.next_block < 0:
            raise StreamError(
                f"the snapshot contradicts itself: {snapshot.latents_decoded} latents decoded and {len(snapshot.held)} "
                f"blocks held at block {snapshot.block}, {snapshot.offset} behind the video's, {given} of them given"
            )
        live, tensors = (self._with_kv_split(each) for each in (self.pipeline.live_tensors(), snapshot.tensors))
        if unknown := sorted(set(tensors) - set(live)):
            raise StreamError(f"snapshot tensor {unknown[0]}: expected no tensor of that name")
        for name, tensor in live.items():
            saved, shapes = tensors.get(name), shapes_in_snapshots(name, tensor.shape)
            if saved is None or tuple(saved.shape) not in shapes or saved.dtype != tensor.dtype:
                found = "nothing" if saved is None else f"{plain(saved.dtype)} {list(saved.shape)}"
                raise StreamError(
                    f"snapshot tensor {name}: expected {plain(tensor.dtype)} {list(tensor.shape)}, found {found}"
                )
        part, text = "initial video", self.rollout.config.transformer
        prompts: dict[str, Tensor] = {str(block): embeds for block, embeds in snapshot.prompts.items()}
        if snapshot.prompt is not None:
            prompts[NOW] = snapshot.prompt
        try:
            if coming is not None:
                self.rollout.split_blocks(coming)
            for block, embeds in prompts.items():
                part = f"prompt for block {block}"
                check_prompt_embeds(embeds, text.text_dim, text.text_len)
                prompt_of(embeds, snapshot.prompt_facts.get(block))
        except (ConfigError, PromptError) as error:
            raise StreamError(f"the snapshot's {part}: {error}") from None

    def load_state(self, snapshot: Snapshot, seed: int) -> None:
        """Load the state of ``snapshot``, which :meth:`require_fit` has passed; ``seed`` is that of the next noise."""
        state = self.rollout.state
        self.pipeline.reset()
        state.reset()
        self.rollout.set_seed(seed)
        live, saved = (self._with_kv_split(each) for each in (self.pipeline.live_tensors(), snapshot.tensors))
        sink = live[SINK]
        live[SINK] = sink[:, -saved[SINK].shape[1] :]  # values alone, or keys too
        with self.executor.eager():
            for name, tensor in live.items():
                copy_rows(tensor, saved[name])
            if live[SINK].shape[1] == 1:
                for layer, (keys, _) in enumerate(sink):
                    keys.copy_(self.rollout.rotated_sink(layer))
        self.executor.synchronize()  # or the snapshot could be freed too early
        state.block = snapshot.block
        state.initial_blocks = snapshot.initial_blocks
        state.memory_ready = snapshot.memory_ready
        if snapshot.initial_latents is not None:
            self.prefill(snapshot.initial_latents)
