"""A model in one setting, live on its device: what runs is the rollout, decoder and lanes of :class:`echo_rt.Runtime`.

Several rigs live side by side, so that they can be measured in turns; what they compute with is shared.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from echo_rt.attention import AttentionSelection, attentions, cache_file
from echo_rt.bench.model import Model
from echo_rt.bench.timing import Span, WatchedExecutor, watched_executor
from echo_rt.chunk import Chunk
from echo_rt.engine.build import ModelTensors, Networks, build_engine
from echo_rt.errors import ConfigError
from echo_rt.model.vae_decoder import VaeDecoder
from echo_rt.ops.backends import Backend
from echo_rt.ops.schema import Ops
from echo_rt.options import MemoryMode, RuntimeOptions
from echo_rt.utils.device import model_context, working_dtype
from echo_rt.weights.fingerprint import FingerprintedTensors

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
    over_cache: AttentionSelection
    over_text: AttentionSelection

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


class Parts(Networks):
    """The networks of a site's model on one backend, held once however many rigs compute with them.

    ``convolution``: how the decoder's are computed, None for a trial; ``tiles``: in how many bands of rows it decodes.
    """

    decoder: VaeDecoder  # no tiny one is measured here
    vae_attention: AttentionSelection

    def __init__(self, site: Site, ops: Ops, convolution: str | None = None, tiles: int = 1) -> None:
        model, self.site = site.model, site
        options = RuntimeOptions(
            device=site.device,
            dtype=site.model_dtype,
            float8_except=site.float8_except,
            attention=site.attention,
            convolution=convolution,
            vae_tiles=tiles,
        )
        parts = (model.transformer, model.memory or {}, model.vae)
        tensors = ModelTensors(*(FingerprintedTensors(part, model.source) for part in parts))
        attention = (site.over_cache, site.over_text)
        super().__init__(
            model.config, tensors, options, Backend(ops, "measured"), vae=model.vae_config, attention=attention
        )


@dataclass(frozen=True, eq=False)
class Block:
    """A block on the host, and the spans of its stages; their times can be read once the rig has settled."""

    made: Chunk
    spans: tuple[Span, ...]


class Rig:
    """One video that goes on and on; ``depth`` is how many blocks may be in flight."""

    def __init__(self, parts: Parts, mode: MemoryMode, *, graphs: bool | None, depth: int) -> None:
        site = parts.site
        self.mode, self._context = mode, (site.device, site.dtype)
        self._graphs = graphs is not False and site.device.type == "cuda"
        self.executor: WatchedExecutor = watched_executor(site.device, graphs)
        config = site.model.without_memory() if mode is MemoryMode.OFF else site.model.config
        options = replace(parts.options, graphs=graphs, lookahead=depth - 1)
        self.engine = build_engine(config, parts, options, mode, executor=self.executor)
        self.rollout, self.pipeline = self.engine.rollout, self.engine.pipeline
        self._begun: deque[tuple[Span, ...]] = deque()
        self.executor.settle()

    def start(self, prompt_embeds: Tensor, seed: int) -> None:
        """A new video."""
        with model_context(*self._context):
            self._begun.clear()
            self.engine.start(prompt_embeds, seed)
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
            saturated = before >= 0 and self.rollout.state.layout.shift(before) > 0
            replayed = self.executor.runs - runs == self.executor.replays - replays
            if saturated and (replayed or not self._graphs):
                self.drain()
                return
        raise ConfigError(f"expected a steady state to measure, and there was none within {_MOST_BLOCKS} blocks")

    def adopt(self, other: Rig, seed: int) -> None:
        """Stand where ``other``, a rig of the same mode, stands: the next block of both is the same one."""
        other.drain()
        with model_context(*self._context):
            self._begun.clear()
            self.engine.load_state(other.engine.save_state(seed), seed)
            other.rollout.set_seed(seed)
        self.executor.spans.clear()
        other.executor.spans.clear()

    @property
    def state_bytes(self) -> int:
        """What a snapshot of it holds."""
        return sum(tensor.nbytes for tensor in self.pipeline.live_tensors().values())

    def close(self) -> None:
        """Let go of lanes and graphs."""
        self.executor.close()
