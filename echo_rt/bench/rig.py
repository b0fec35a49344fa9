"""A model in one setting, live on its device: what runs is the rollout, decoder and lanes of :class:`echo_rt.Runtime`.

Several rigs live side by side, so that they can be measured in turns; what they compute with is shared.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from echo_rt.attention import Choice, attentions, cache_file
from echo_rt.bench.model import Model
from echo_rt.bench.timing import Span, WatchedExecutor, watched_executor
from echo_rt.engine.decoding import Convolutions, fit_decoder
from echo_rt.engine.pipeline import Finished, Pipeline
from echo_rt.engine.rollout import Rollout
from echo_rt.errors import ConfigError
from echo_rt.model.memory import MemoryEncoder
from echo_rt.model.sampler import Schedule
from echo_rt.model.transformer import Transformer
from echo_rt.model.vae_decoder import VaeDecoder
from echo_rt.ops.schema import Ops
from echo_rt.options import MemoryMode
from echo_rt.utils.device import model_context, working_dtype

_MOST_BLOCKS = 300  # a steady state that comes later is none that anyone waits for


@dataclass(frozen=True)
class Site:
    """Where a model runs: its device, the dtype that was asked for, and the attention that was chosen or asked for.

    ``dtype`` is what all is in that is not a float8 product; ``float8_except`` as in :meth:`Runtime.from_pretrained`;
    ``attention``: the name that was asked for, if any.
    """

    model: Model
    device: torch.device
    model_dtype: torch.dtype
    float8_except: tuple[str, ...]
    attention: str | None
    over_cache: Choice
    over_text: Choice

    @classmethod
    def choose(
        cls,
        model: Model,
        device: torch.device,
        dtype: torch.dtype,
        ops: Ops,
        attention: str | None,
        float8_except: tuple[str, ...] = (),
    ) -> Site:
        """The errors are those of :func:`echo_rt.attention.attentions`."""
        choices = attentions(model.config, device, working_dtype(dtype), ops, attention, cache=cache_file())
        return cls(model, device, dtype, float8_except, attention, *choices)

    @property
    def dtype(self) -> torch.dtype:
        return working_dtype(self.model_dtype)


class Parts:
    """The weights on the device for one backend, held once however many rigs compute with them.

    ``convolution``: how the decoder's are computed, None for a trial; ``tiles``: in how many bands of rows it decodes.
    """

    def __init__(self, site: Site, ops: Ops, convolution: str | None = None, tiles: int = 1) -> None:
        self.site, self.ops, self._convolution, self._tiles = site, ops, convolution, tiles

    @cached_property
    def schedule(self) -> Schedule:
        return Schedule(self.site.model.config.sampler, self.site.device)

    @cached_property
    def transformer(self) -> Transformer:
        site = self.site
        return Transformer(
            site.model.config.transformer,
            site.model.transformer,
            self.schedule.timesteps,
            self.ops,
            site.over_text.attention,
            device=site.device,
            dtype=site.model_dtype,
            float8_except=site.float8_except,
        )

    @cached_property
    def memory(self) -> MemoryEncoder:
        site = self.site
        assert site.model.memory is not None
        return MemoryEncoder(site.model.config, site.model.memory, self.ops, device=site.device, dtype=site.dtype)

    @cached_property
    def decoder(self) -> VaeDecoder:
        return self._decoding[0]

    @property
    def vae_attention(self) -> Choice:
        """How the decoder's is computed."""
        return self._decoding[1]

    @property
    def convolutions(self) -> Convolutions:
        """How those of the decoder are computed."""
        return self._decoding[2]

    @cached_property
    def _decoding(self) -> tuple[VaeDecoder, Choice, Convolutions]:
        site, config = self.site, self.site.model.config
        decoder = VaeDecoder(
            site.model.vae_config,
            site.model.vae,
            self.ops,
            device=site.device,
            dtype=site.dtype,
            tiles=self._tiles,
        )
        block = (config.window.frames_per_block, config.latent_height, config.latent_width)
        return decoder, *fit_decoder(decoder, block, self.ops, self._convolution, site.attention)


@dataclass(frozen=True, eq=False)
class Block:
    """A block on the host, and the spans of its stages; their times can be read once the rig has settled."""

    made: Finished
    spans: tuple[Span, ...]


class Rig:
    """One video that goes on and on; ``depth`` is how many blocks may be in flight."""

    def __init__(self, parts: Parts, mode: MemoryMode, *, graphs: bool | None, depth: int) -> None:
        site = parts.site
        model, self._context = site.model, (site.device, site.dtype)
        self.mode = mode
        self._graphs = graphs is not False and site.device.type == "cuda"
        self.executor: WatchedExecutor = watched_executor(site.device, graphs)
        with model_context(*self._context):
            config, encoder = model.without_memory(), None
            if mode is not MemoryMode.OFF:
                config, encoder = model.config, parts.memory
            attention = site.over_cache.attention
            self.rollout = Rollout(
                config, parts.transformer, encoder, parts.schedule, parts.ops, attention, mode, self.executor
            )
            self.pipeline = Pipeline(
                self.rollout,
                parts.decoder,
                model.vae_config,
                parts.ops,
                self.executor,
                device=site.device,
                depth=depth,
            )
        self._begun: deque[tuple[Span, ...]] = deque()
        self.executor.settle()

    def start(self, prompt_embeds: Tensor, seed: int) -> None:
        """A new video."""
        with model_context(*self._context):
            self._forget()
            self.rollout.start(prompt_embeds, seed)
        self.executor.spans.clear()

    def block(self, lookahead: int) -> Block:
        """The next block, begun as early as ``lookahead`` allows: what ``Stream`` does when it is asked for one."""
        with model_context(*self._context):
            while self.pipeline.in_flight <= lookahead:
                self.pipeline.begin()
                self._begun.append(tuple(self.executor.spans))
                self.executor.spans.clear()
            made = self.pipeline.finish()
            assert made is not None  # it was waited for without a bound
            return Block(made, self._begun.popleft())

    def in_flight_spans(self) -> list[Span]:
        """Those of the blocks that were begun and not yet handed out."""
        return [span for spans in self._begun for span in spans]

    def drain(self) -> None:
        """Finish what is in flight, and leave the device idle."""
        with model_context(*self._context):
            while self.pipeline.in_flight:
                self.pipeline.finish()
        self._begun.clear()
        self.executor.settle()

    def warm_up(self) -> None:
        """On until the ids have saturated and, where graphs are captured, a block is nothing but replays.

        :class:`ConfigError` for a model that does not come to that within a few hundred blocks.
        """
        for _ in range(_MOST_BLOCKS):
            runs, replays = self.executor.runs, self.executor.replays
            before = self.block(0).made.index - 1
            saturated = before >= 0 and self.rollout.position(before).shift > 0
            replayed = self.executor.runs - runs == self.executor.replays - replays
            if saturated and (replayed or not self._graphs):
                self.drain()
                return
        raise ConfigError(f"expected a steady state to measure, and there was none within {_MOST_BLOCKS} blocks")

    def adopt(self, other: Rig, seed: int) -> None:
        """Stand where ``other``, a rig of the same mode, stands: the next block of both is the same one."""
        other.drain()
        with model_context(*self._context):
            self._forget()
            self.rollout.state.reset()
            for rig in (self, other):
                rig.rollout.set_seed(seed)
            theirs = other.pipeline.live_tensors()
            with self.executor.apart():
                for name, tensor in self.pipeline.live_tensors().items():
                    tensor.copy_(theirs[name])
        for fact in ("block", "memory_ready", "memory_updated"):
            setattr(self.rollout.state, fact, getattr(other.rollout.state, fact))
        self.pipeline.decoder_state.latents_seen = other.pipeline.decoder_state.latents_seen
        self.executor.settle()
        self.executor.spans.clear()
        other.executor.spans.clear()

    def _forget(self) -> None:
        self.pipeline.reset()
        self._begun.clear()
        self.executor.settle()  # the decoder's lane clears its windows, which another lane may be about to fill

    @property
    def state_bytes(self) -> int:
        """What a snapshot of it holds."""
        return sum(tensor.nbytes for tensor in self.pipeline.live_tensors().values())

    def close(self) -> None:
        """Let go of lanes and graphs."""
        self.executor.close()
