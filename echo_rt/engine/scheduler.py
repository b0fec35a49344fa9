"""The blocks of one video in order: begun ahead, finished, guarded, rolled back. Threads are its caller's affair."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from echo_rt.chunk import Chunk
from echo_rt.engine.caller_noise import CallerNoise, noise_of, require_noise
from echo_rt.engine.engine import Engine
from echo_rt.engine.guard import ROLL_BACK, Guard
from echo_rt.engine.ready import ReadyQueue
from echo_rt.errors import ConfigError, NumericalError, OutputError, StallError, StreamError
from echo_rt.options import check_seed
from echo_rt.snapshot.snapshot import Snapshot
from echo_rt.utils.wording import counted, one_line

_logger = logging.getLogger("echo_rt.engine.guard")

_SEEDS = 2**64
# Added to the seed at each rollback: odd, so that 2^64 of them are all different.
_RESEED = 0x9E3779B97F4A7C15


class PromptSchedule:
    """Which prompt begins with which block; may be changed by any thread while blocks are made.

    ``first_open`` is the first block of the video that has not been begun.
    """

    def __init__(self, first_open: int = 0, prompts: Mapping[int, Tensor] | None = None) -> None:
        self._lock = threading.Lock()
        self._prompts = dict(prompts or {})
        self.first_open = first_open

    def set(self, embeds: Tensor, block: int | None) -> None:
        """``embeds`` from ``block`` on (None: the first open one); :class:`StreamError` for one that has been begun."""
        with self._lock:
            if block is not None and block < self.first_open:
                raise StreamError(
                    f"block {block} has been begun; a prompt can begin with block {self.first_open} or later"
                )
            self._prompts[self.first_open if block is None else block] = embeds

    def begin(self) -> tuple[int, Tensor | None]:
        """Begin the first open block: its number, and the prompt that it begins with if it is another."""
        with self._lock:
            block = self.first_open
            self.first_open += 1
            due = [at for at in self._prompts if at <= block]
            embeds = self._prompts[max(due)] if due else None
            for at in due:
                del self._prompts[at]
            return block, embeds

    def reopen(self, block: int, prompts: Mapping[int, Tensor]) -> None:
        """``block`` and those after it begin once more; ``prompts``, which later ones had begun with, wait again."""
        with self._lock:
            self.first_open = block
            self._prompts = {**prompts, **self._prompts}

    def pending(self) -> dict[int, Tensor]:
        """What has not begun yet."""
        with self._lock:
            return dict(self._prompts)


@dataclass(frozen=True, eq=False)
class Initial:
    """What a video begins with: latents ``[frames, C, h, w]``, whole blocks; ``shown``: whether they are handed out."""

    latents: Tensor
    shown: bool = True


class Blocks:
    """The blocks of one video in the buffers of ``engine``, which is lent to each call.

    A block is begun (``prompts.first_open`` counts), finished in order into the queue ``ready``, and taken from there.
    Numbers are the video's. After a rollback they are ahead of the state's own: the state goes back, the video goes on.
    """

    def __init__(self, engine: Engine, seed: int, guard: Guard | None, noise: CallerNoise | None = None) -> None:
        if not isinstance(guard, Guard | None):
            raise ConfigError(f"guard must be a Guard or None, got {guard!r}")
        require_noise(noise)
        self._noise = noise
        self._vae, self._frames_per_block = engine.vae, engine.rollout.config.window.frames_per_block
        self._guard = guard or Guard()
        self._seed = check_seed(seed)
        self.prompts = PromptSchedule()
        self.ready = ReadyQueue()
        self.rollbacks = 0
        self.first_frame_seconds: float | None = None
        self._failures = 0  # rollbacks since the last good block
        self._good: Snapshot | None = None
        self._prompts_since: dict[int, Tensor] = {}  # those that the good state does not know, by their blocks
        self._began = time.perf_counter()

    def start(self, engine: Engine, prompt_embeds: Tensor, initial: Initial | None = None) -> None:
        """Begin a new video with ``prompt_embeds [length, text_dim]``, or go on with the ``initial`` one."""
        engine.start(prompt_embeds, self._seed)
        if initial is None:
            return
        engine.prefill(initial.latents)
        while engine.pipeline.given and not initial.shown:
            self._begin(engine)
            self._finish(engine)
            self.ready.take()
            self.first_frame_seconds = None

    def restore(self, engine: Engine, snapshot: Snapshot) -> None:
        """Go on where ``snapshot`` was taken; :class:`StreamError` if it is another model's, or of other noise."""
        engine.require_fit(snapshot)
        if snapshot.caller_noise and self._noise is None:
            raise StreamError("the snapshot's video is made of noise that its caller gives: expected noise=, got none")
        if self._noise is not None and not snapshot.caller_noise:
            raise StreamError("the snapshot's video is made of its seed's noise: expected no noise=, got one")
        engine.load_state(snapshot, self._seed)
        self.prompts = PromptSchedule(snapshot.block + 1 + snapshot.offset, snapshot.prompts)
        self.ready = ReadyQueue(snapshot.held, self.prompts.first_open)

    def make(self, engine: Engine) -> None:
        """Finish blocks until one more is ready; begin those behind it."""
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
        """Everything needed to go on bit for bit behind the last block taken."""
        while engine.pipeline.in_flight:
            self._finish(engine)
        return self._save(engine, self.ready.blocks)

    def close(self) -> None:
        """Free what is kept for later: the video is over."""
        self.ready.close()
        self._good = None
        self._prompts_since = {}

    def first_frame(self, block: int) -> int:
        """The number of the first video frame of ``block``."""
        return self._vae.video_frames(block * self._frames_per_block)

    # ---------------------------------------------------------------- one block

    def _begin(self, engine: Engine) -> None:
        noise = self._next_noise(engine)
        block, prompt = self.prompts.begin()
        if prompt is not None:
            self._prompts_since[block] = prompt
            engine.rollout.switch_prompt(prompt)
        if engine.check is None:
            engine.pipeline.begin(block, noise)
            return
        from_host = noise is not None or engine.block + 1 == engine.initial_blocks  # the first generated one's
        if prompt is not None or from_host:
            engine.check.disturbed()
        with engine.check.block(block):
            engine.pipeline.begin(block, noise)

    def _next_noise(self, engine: Engine) -> Tensor | None:
        """The caller's noise for the block that is begun next, None for the seed's."""
        if self._noise is None or engine.pipeline.given:
            return None
        block = engine.rollout.generated_blocks + self._offset(engine)
        return noise_of(self._noise, block, engine.rollout.noise_shape)

    def _finish(self, engine: Engine) -> None:
        """Wait for the oldest block in flight; a bad one is dealt with as the guard says."""
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
            came = "is not there"
        else:
            seconds = chunk.stats.generate_seconds + chunk.stats.decode_seconds
            if seconds <= bound:
                return
            came = f"came after {seconds:.3g} s"
        raise StallError(f"block {self.ready.end} {came}; the guard allows a block {bound:g} s")

    # ---------------------------------------------------------------- state

    def _save(self, engine: Engine, held: Sequence[Chunk]) -> Snapshot:
        given = self._noise is not None
        return engine.save_state(self._seed, self.prompts.pending(), held, self._offset(engine), given)

    def _offset(self, engine: Engine) -> int:
        """How far numbers of the video are ahead of the state's own."""
        return self.prompts.first_open - 1 - engine.block

    def _good_state_due(self, engine: Engine) -> bool:
        block = engine.block
        # What is given would be no better another time: the first state to go back to is the one behind it.
        if self._guard.policy != ROLL_BACK or block < 0 or engine.pipeline.given:
            return False
        return self._good is None or block - self._good.block >= self._guard.keep_every

    def _keep_evidence(self, engine: Engine, chunk: Chunk, bad: str) -> str:
        """What the message about a bad block says of the evidence for it."""
        if self._guard.evidence is None:
            return ""
        stats = chunk.stats
        position = {"newest_temporal_id": stats.newest_temporal_id, "shift": stats.shift}
        facts = {"found": bad, "rollbacks": self.rollbacks, "position": position}
        try:
            after = self._save(engine, self.ready.blocks)
            files = self._guard.save_evidence(chunk.index, after, self._good, stats.vitals, facts)
        except (OutputError, RuntimeError) as error:  # a full disk; a device that is lost, which torch says
            # What has happened to the block matters more.
            return f"; no evidence: {one_line(error)}"
        return f"; evidence: {', '.join(map(str, files))}"

    def _refuse(self, engine: Engine, chunk: Chunk, bad: str) -> None:
        """Deal with a block that is not finite: evidence, then a rollback or the end."""
        guard, block, good = self._guard, chunk.index, self._good
        what = f"block {block}: {bad}"
        kept = self._keep_evidence(engine, chunk, bad)
        if guard.policy != ROLL_BACK or good is None or self._failures >= guard.attempts:
            tried = f", after {counted(self._failures, 'rollback')} in a row" if self._failures else ""
            raise NumericalError(f"{what}{tried}{kept}")
        self._failures += 1
        self.rollbacks += 1
        self._seed = (self._seed + _RESEED) % _SEEDS
        engine.load_state(good, self._seed)
        since = self._prompts_since
        self._prompts_since = {at: embeds for at, embeds in since.items() if at <= block}
        self.prompts.reopen(block, {at: embeds for at, embeds in since.items() if at > block})
        if self._prompts_since:
            engine.rollout.switch_prompt(self._prompts_since[max(self._prompts_since)])
        _logger.warning("%s; back to the state after block %d, with other noise%s", what, good.block, kept)


def _nonfinite(chunk: Chunk) -> str | None:
    """What is wrong with a block's values, in words."""
    vitals = chunk.stats.vitals
    for what, bad, values in (
        ("latent", vitals.latent_nonfinite, chunk.latents),
        ("decoded video", vitals.video_nonfinite, chunk.frames),
    ):
        if bad:
            return f"{what}: {bad} of {values.numel()} values are NaN or infinite"
    return None
