"""The blocks of one video in order: begun ahead, finished, guarded, rolled back. For one thread at a time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from echo_rt.chunk import Chunk
from echo_rt.engine.engine import Engine
from echo_rt.engine.guard import ROLL_BACK, Guard
from echo_rt.engine.prompts import NOW, Prompt, check_dense, prompt_of
from echo_rt.engine.ready import ReadyQueue
from echo_rt.errors import ConfigError, NumericalError, OutputError, StallError, StreamError
from echo_rt.options import check_seed
from echo_rt.snapshot.snapshot import Snapshot, reseeded
from echo_rt.utils.stopped_time import stopped_seconds
from echo_rt.utils.wording import counted, one_line, plain, type_of

_logger = logging.getLogger("echo_rt.engine.guard")

# (number of the generated block, shape [steps, B, C, h, w]) -> float32 of that shape: the block's initial noise, then
# the fresh noise between its steps
CallerNoise = Callable[[int, tuple[int, ...]], Tensor]


class PromptSchedule:
    """Prompts by the block that begins with them. Any thread may set one while blocks are made.

    ``now``: that of the last block begun, None where an older snapshot does not say; ``first_open``: the first block of
    the video that has not been begun.
    """

    def __init__(self, now: Prompt | None, first_open: int = 0, prompts: Mapping[int, Prompt] | None = None) -> None:
        self._lock = threading.RLock()  # reentrant: a signal handler may close amid a change of its own thread
        self._waiting = dict(prompts or {})
        self.now, self.first_open = now, first_open

    @property
    def next(self) -> Prompt | None:
        """The prompt of the first open block, or the one that it begins to turn to."""
        with self._lock:
            due = self._due()
            return self._waiting[max(due)] if due else self.now

    def set(self, prompt: Prompt, block: int | None) -> int:
        """Set the prompt from ``block`` on (None: the first open one), and return its number.

        :class:`StreamError` if it has been begun, or a blend has nothing to begin with.
        """
        with self._lock:
            if block is not None and block < self.first_open:
                raise StreamError(
                    f"block {block} has been begun; a prompt can begin with block {self.first_open} or later"
                )
            if prompt.over > 1 and self.now is None:
                raise StreamError("the snapshot of this video is of an older version, without its prompt to blend from")
            at = self.first_open if block is None else block
            self._waiting[at] = prompt
            return at

    def begin(self) -> tuple[int, Prompt | None]:
        """Begin the first open block; returns its number, and its prompt where that is a new one."""
        with self._lock:
            due, block = self._due(), self.first_open
            self.first_open += 1
            if not due:
                return block, None
            prompt = self._waiting[max(due)]
            for at in due:
                del self._waiting[at]
            if self.now is not None:
                prompt, rest = prompt.step(self.now.embeds)
                if rest is not None:
                    self._waiting.setdefault(block + 1, rest)  # another prompt that begins there ends the blend
            self.now = prompt
            return block, prompt

    def _due(self) -> list[int]:
        return [at for at in self._waiting if at <= self.first_open]

    def reopen(self, block: int, now: Prompt | None, prompts: Mapping[int, Prompt]) -> None:
        """Let ``block`` and those after it begin again; ``prompts``, which later blocks had begun with, wait again."""
        with self._lock:
            self.first_open, self.now = block, now
            self._waiting = {**prompts, **self._waiting}

    def close(self) -> None:
        """Free the embeddings; the text of the last prompt stays."""
        with self._lock:
            self._waiting.clear()
            self.now = self.now and replace(self.now, embeds=torch.empty(0, device="cpu"))

    def for_snapshot(self) -> dict[str, Any]:
        """The fields of a :class:`Snapshot` about prompts."""
        with self._lock:
            named = {str(at): prompt for at, prompt in self._waiting.items()} | ({NOW: self.now} if self.now else {})
            return {
                "prompts": {at: prompt.embeds for at, prompt in self._waiting.items()},
                "prompt": self.now and self.now.embeds,
                "prompt_facts": {name: facts for name, prompt in named.items() if (facts := prompt.facts())},
            }

    @classmethod
    def of_snapshot(cls, snapshot: Snapshot) -> PromptSchedule:
        """Return the schedule that a snapshot holds."""
        facts, now = snapshot.prompt_facts, snapshot.prompt
        waiting = {at: prompt_of(embeds, facts.get(str(at))) for at, embeds in snapshot.prompts.items()}
        begun = None if now is None else prompt_of(now, facts.get(NOW))
        return cls(begun, snapshot.block + 1 + snapshot.offset, waiting)


class Blocks:
    """Makes the blocks of one video in the buffers of ``engine``, which is lent to each call.

    A block is begun (``prompts.first_open`` counts), finished in order into the queue ``ready``, and taken from there.
    Block numbers are the video's. After a rollback they are ahead of the state's: the state goes back, the video does
    not.
    """

    def __init__(self, engine: Engine, seed: int, guard: Guard | None, noise: CallerNoise | None = None) -> None:
        if not isinstance(guard, Guard | None):
            raise ConfigError(f"guard must be a Guard or None, got {guard!r}")
        if noise is not None and not callable(noise):
            raise ConfigError(f"noise must be a function of a block and a shape, or None; got {noise!r}")
        self._noise = noise
        self._vae, self._frames_per_block = engine.vae, engine.rollout.config.window.frames_per_block
        self._guard = guard or Guard()
        self.seed = check_seed(seed)
        self.prompts = PromptSchedule(None)
        self.ready = ReadyQueue()
        self.rollbacks = 0
        self.first_frame_seconds: float | None = None
        self._failures = 0  # rollbacks since the last good block
        self._good: Snapshot | None = None
        self._prompts_since: dict[int, Prompt] = {}  # by block: prompts that began after the good state
        self._stopped_before: dict[int, float] = {}  # by block in flight: stopped seconds when it began
        self._began = 0.0

    def start(self, engine: Engine, prompt: Prompt, initial: Tensor | None, shown: bool) -> None:
        """Start a video; it begins with the blocks of ``initial [frames, C, h, w]``, handed out if ``shown``."""
        self._began = time.perf_counter()
        self.prompts.now = prompt
        engine.start(prompt.embeds, self.seed)
        if initial is None:
            return
        engine.prefill(initial)
        while engine.pipeline.given and not shown:
            self._begin(engine)
            self._finish(engine)
            self.ready.take()
            self.first_frame_seconds = None

    def restore(self, engine: Engine, snapshot: Snapshot) -> None:
        """Continue where ``snapshot`` was taken; :class:`StreamError` for one of another model or kind of noise."""
        engine.require_fit(snapshot)
        if snapshot.caller_noise != (self._noise is not None):
            made_of, expected, found = ("its seed's noise", "no noise=", "one")
            if snapshot.caller_noise:
                made_of, expected, found = ("noise that its caller gives", "noise=", "none")
            raise StreamError(f"the snapshot's video is made of {made_of}: expected {expected}, found {found}")
        self._began = time.perf_counter()
        engine.load_state(snapshot, self.seed)
        self.prompts = PromptSchedule.of_snapshot(snapshot)
        self.ready = ReadyQueue(snapshot.held, self.prompts.first_open)

    def make(self, engine: Engine) -> None:
        """Finish blocks until one more is ready, and begin the next ones ahead of it."""
        block = self.ready.end
        while self.ready.end == block:
            due = self._good_state_due(engine)
            if due and not engine.pipeline.in_flight:
                due = False
                if engine.finite():
                    self._good, self._prompts_since = self._save(engine, held=()), {}
            while not due and engine.pipeline.in_flight <= engine.lookahead:
                self._begin(engine)
            self._finish(engine)

    def snapshot(self, engine: Engine) -> Snapshot:
        """Finish what is in flight, and copy all that is needed to continue bit for bit after the last block taken."""
        while engine.pipeline.in_flight:
            self._finish(engine)
        return self._save(engine, self.ready.blocks)

    def close(self) -> None:
        """End the video: free what is kept for later."""
        self.ready.close()
        self.prompts.close()
        self._good, self._prompts_since = None, {}

    def first_frame(self, block: int) -> int:
        """Number of the first video frame of ``block``."""
        return self._vae.video_frames(block * self._frames_per_block)

    # ---------------------------------------------------------------- one block

    def _begin(self, engine: Engine) -> None:
        noise = self._next_noise(engine)
        block, prompt = self.prompts.begin()
        if self._guard.block_seconds is not None:
            self._stopped_before[block] = stopped_seconds()
        if prompt is not None:
            if self._good is not None:
                self._prompts_since[block] = prompt
            engine.rollout.switch_prompt(prompt.embeds, rebuild=not prompt.continued)
        # Neither a prompt switch, nor noise copied from the host, nor the first generated block is the steady state.
        disturbed = prompt is not None or noise is not None or engine.block + 1 == engine.initial_blocks
        with nullcontext() if engine.check is None else engine.check.block(block, disturbed):
            engine.pipeline.begin(block, noise)

    def _next_noise(self, engine: Engine) -> Tensor | None:
        """The caller's noise of the next block, on the host; None for the seed's, and for a given block.

        Raises :class:`ConfigError` for what is not finite float32 of the shape asked for.
        """
        if self._noise is None or engine.pipeline.given:
            return None
        block, shape = engine.rollout.generated_blocks + self._offset(engine), engine.rollout.noise_shape
        noise = self._noise(block, shape)
        expected = f"noise for block {block}: expected a float32 tensor {list(shape)}"
        if not isinstance(noise, Tensor):
            raise ConfigError(f"{expected}, found {type_of(noise)}")
        if noise.dtype != torch.float32 or noise.shape != shape:
            raise ConfigError(f"{expected}, found {plain(noise.dtype)} {list(noise.shape)}")
        check_dense(noise, expected, ConfigError)
        noise = noise.detach().cpu()
        if bad := int(torch.isfinite(noise).logical_not_().sum()):
            raise ConfigError(f"{expected} of finite values, found {bad} that are NaN or infinite")
        return noise

    def _finish(self, engine: Engine) -> None:
        """Wait for the oldest block in flight and queue it; a bad one is handled as the guard says."""
        bound = self._guard.block_seconds
        chunk = engine.pipeline.finish(bound)
        if bound is not None:
            self._require_in_time(engine, chunk, bound)
        assert chunk is not None  # it was waited for without a bound
        if (bad := _nonfinite(chunk)) is not None:
            self._refuse(engine, chunk, bad)
            return
        self._failures = 0
        if self.first_frame_seconds is None:
            self.first_frame_seconds = time.perf_counter() - self._began
        self.ready.append(chunk)

    def _require_in_time(self, engine: Engine, chunk: Chunk | None, bound: float) -> None:
        if chunk is None:
            engine.executor.give_up(bound)  # or closing the runtime would wait for what may never end
            what = "is not there"
        else:
            stopped = stopped_seconds() - self._stopped_before.pop(chunk.index)
            seconds = chunk.stats.generate_seconds + chunk.stats.decode_seconds - stopped
            if seconds <= bound:
                return
            what = f"took {seconds:.3g} s"
        raise StallError(f"block {self.ready.end} {what}; a block may take {bound:g} s")

    # ---------------------------------------------------------------- state

    def _save(self, engine: Engine, held: Sequence[Chunk]) -> Snapshot:
        return engine.save_state(
            self.seed,
            held=tuple(held),
            offset=self._offset(engine),
            caller_noise=self._noise is not None,
            **self.prompts.for_snapshot(),
        )

    def _offset(self, engine: Engine) -> int:
        """How far the video's block numbers are ahead of the state's."""
        return self.prompts.first_open - 1 - engine.block

    def _good_state_due(self, engine: Engine) -> bool:
        block = engine.block
        # Given blocks would be no better the next time: the first state to go back to is the one after them.
        if self._guard.policy != ROLL_BACK or block < 0 or engine.pipeline.given:
            return False
        return self._good is None or block - self._good.block >= self._guard.keep_every

    def _keep_evidence(self, engine: Engine, chunk: Chunk, bad: str) -> str:
        """Save the evidence of a bad block, if wanted; returns the end of the message that names its files."""
        if self._guard.evidence is None:
            return ""
        try:
            after = self._save(engine, self.ready.blocks)
            files = self._guard.save_evidence(chunk, after, self._good, bad, self.rollbacks)
        except (OutputError, RuntimeError) as error:  # a full disk; a device that is lost, which torch says
            # What happened to the block matters more than that its evidence is missing.
            return f"; no evidence: {one_line(error)}"
        return f"; evidence: {', '.join(map(str, files))}"

    def _refuse(self, engine: Engine, chunk: Chunk, bad: str) -> None:
        """Handle a block that is not finite: save evidence, then roll back or end the video."""
        guard, block, good = self._guard, chunk.index, self._good
        what = f"block {block}: {bad}"
        kept = self._keep_evidence(engine, chunk, bad)
        if guard.policy != ROLL_BACK or good is None or self._failures >= guard.attempts:
            tried = f", after {counted(self._failures, 'rollback')} in a row" if self._failures else ""
            raise NumericalError(f"{what}{tried}{kept}")
        self._failures += 1
        self.rollbacks += 1
        self.seed = reseeded(self.seed)
        engine.load_state(good, self.seed)
        begun = self._prompts_since
        self._prompts_since = {at: prompt for at, prompt in begun.items() if at <= block}
        now = PromptSchedule.of_snapshot(good).now
        if self._prompts_since:
            now = self._prompts_since[max(self._prompts_since)]
        # Numbers that a flush has skipped stay so.
        self.prompts.reopen(
            max(block, self.ready.wanted), now, {at: prompt for at, prompt in begun.items() if at > block}
        )
        if self._prompts_since and now is not None:
            rebuild = any(not prompt.continued for prompt in self._prompts_since.values())
            engine.rollout.switch_prompt(now.embeds, rebuild)
        _logger.warning("%s; back to the state after block %d, with other noise%s", what, good.block, kept)


def _nonfinite(chunk: Chunk) -> str | None:
    """Name the values of a block that are not finite; None where all are."""
    vitals = chunk.stats.vitals
    for what, bad, values in (
        ("latent", vitals.latent_nonfinite, chunk.latents),
        ("decoded video", vitals.video_nonfinite, chunk.frames),
    ):
        if bad:
            return f"{what}: {bad} of {values.numel()} values are NaN or infinite"
    return None
