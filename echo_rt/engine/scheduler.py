"""The blocks of one video in order: begun ahead, finished, guarded, rolled back. Threads are its caller's affair."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Mapping

from torch import Tensor

from echo_rt.chunk import Chunk, ChunkStats
from echo_rt.engine.engine import Engine
from echo_rt.engine.guard import ROLL_BACK, Guard
from echo_rt.engine.pipeline import Finished
from echo_rt.errors import ConfigError, NumericalError, OutputError, StallError, StreamError
from echo_rt.options import check_seed
from echo_rt.snapshot.snapshot import Snapshot
from echo_rt.utils.wording import counted, one_line

_logger = logging.getLogger("echo_rt.engine.guard")

_SEEDS = 2**64
# Added to the seed at each rollback: odd, so that 2^64 of them are all different.
_RESEED = 0x9E3779B97F4A7C15


class PromptSchedule:
    """Which prompt begins with which block; may be changed by any thread while blocks are made."""

    def __init__(self, first_open: int = 0, prompts: Mapping[int, Tensor] | None = None) -> None:
        self._lock = threading.Lock()
        self._prompts = dict(prompts or {})
        self._first_open = first_open

    @property
    def first_open(self) -> int:
        """The first block that has not been begun."""
        return self._first_open

    def set(self, embeds: Tensor, block: int | None) -> None:
        """``embeds`` from ``block`` on (None: the first open one); :class:`StreamError` for one that has been begun."""
        with self._lock:
            if block is not None and block < self._first_open:
                raise StreamError(
                    f"block {block} has been begun; a prompt can begin with block {self._first_open} or later"
                )
            self._prompts[self._first_open if block is None else block] = embeds

    def begin(self, block: int) -> Tensor | None:
        """The prompt that ``block`` begins with, if it is another; earlier blocks are closed from here on."""
        with self._lock:
            self._first_open = block + 1
            due = [at for at in self._prompts if at <= block]
            embeds = self._prompts[max(due)] if due else None
            for at in due:
                del self._prompts[at]
            return embeds

    def reopen(self, block: int, prompts: Mapping[int, Tensor]) -> None:
        """``block`` and those after it begin once more; ``prompts``, which later ones had begun with, wait again."""
        with self._lock:
            self._first_open = block
            self._prompts = {**prompts, **self._prompts}

    def pending(self) -> dict[int, Tensor]:
        """What has not begun yet."""
        with self._lock:
            return dict(self._prompts)


@dataclasses.dataclass(frozen=True, eq=False)
class Initial:
    """What a video begins with: latents ``[frames, C, h, w]``, whole blocks; ``shown``: whether they are handed out."""

    latents: Tensor
    shown: bool = True


class Blocks:
    """One video in the buffers of ``engine``, which is lent to each call; numbers of blocks are the video's.

    After a rollback they are ahead of the state's own by ``offset``: the state goes back, the video goes on.
    """

    def __init__(self, engine: Engine, seed: int, guard: Guard | None) -> None:
        if not isinstance(guard, Guard | None):
            raise ConfigError(f"guard must be a Guard or None, got {guard!r}")
        self._vae, self._frames_per_block = engine.vae, engine.rollout.config.window.frames_per_block
        self._guard = guard or Guard()
        self._seed = check_seed(seed)
        self.prompts = PromptSchedule()
        self.next_block = 0
        self.rollbacks = 0
        self.first_frame_seconds: float | None = None
        self._held: deque[Chunk] = deque()  # finished, and not handed out
        self._offset = 0
        self._failures = 0  # rollbacks since the last good block
        self._good: Snapshot | None = None
        self._prompts_since: dict[int, Tensor] = {}  # those that the good state does not know, by their blocks
        self._began = time.perf_counter()

    def start(self, engine: Engine, prompt_embeds: Tensor, initial: Initial | None = None) -> None:
        """From the first block, or from the first that is not of the ``initial`` video where that is not shown."""
        engine.start(prompt_embeds, self._seed)
        if initial is None:
            return
        engine.prefill(initial.latents)
        while engine.pipeline.given and not initial.shown:
            self._begin(engine)
            self._finish(engine)
            self._held.clear()
            self.next_block, self.first_frame_seconds = engine.block + 1, None

    def restore(self, engine: Engine, snapshot: Snapshot) -> None:
        """From where ``snapshot`` was taken; :class:`StreamError` if it is another model's."""
        engine.require_fit(snapshot)
        engine.load_state(snapshot, self._seed)
        self._offset = snapshot.offset
        self.prompts = PromptSchedule(snapshot.block + 1 + snapshot.offset, snapshot.prompts)
        self._held.extend(snapshot.held)
        self.next_block = snapshot.next_block

    def next(self, engine: Engine) -> Chunk:
        """The next block, waited for; those behind it are begun."""
        while not self._held:
            due = self._good_state_due(engine)
            if due and not engine.pipeline.in_flight:
                due = False
                if engine.finite():
                    self._good, self._prompts_since = self._snapshot(engine), {}
            while not due and engine.pipeline.in_flight <= engine.lookahead:
                self._begin(engine)
            self._finish(engine)
        return self._hand_out()

    def left_over(self) -> Chunk | None:
        """The next block, if it is finished already: whole, whatever became of the video."""
        return self._hand_out() if self._held else None

    def _hand_out(self) -> Chunk:
        chunk = self._held.popleft()
        self.next_block = chunk.index + 1
        return chunk

    def give_back(self, chunk: Chunk) -> None:
        """``chunk``, the last one that :meth:`next` gave, is the next one again."""
        self._held.appendleft(chunk)
        self.next_block = chunk.index

    def forget(self) -> None:
        """Let go of what is kept for later: the video is over."""
        self._held.clear()
        self._good = None
        self._prompts_since = {}

    def snapshot(self, engine: Engine) -> Snapshot:
        """Everything needed to go on bit for bit behind the last block handed out."""
        self._finish_all(engine)
        return self._snapshot(engine)

    def first_frame(self, block: int) -> int:
        """The number of the first video frame of ``block``."""
        return self._vae.video_frames(block * self._frames_per_block)

    # ---------------------------------------------------------------- one block

    def _begin(self, engine: Engine) -> None:
        block = engine.block + 1 + self._offset
        prompt = self.prompts.begin(block)
        if prompt is not None:
            self._prompts_since[block] = prompt
            engine.rollout.switch_prompt(prompt)
        if engine.check is None:
            engine.pipeline.begin()
            return
        if prompt is not None or engine.block + 1 == engine.initial_blocks:  # the first that is generated
            engine.check.disturbed()
        with engine.check.block(block):
            engine.pipeline.begin()

    def _finish_all(self, engine: Engine) -> None:
        while engine.pipeline.in_flight:
            self._finish(engine)

    def _finish(self, engine: Engine) -> None:
        """Wait for the oldest block in flight; a bad one is dealt with as the guard says."""
        block = engine.pipeline.oldest + self._offset
        bound = self._guard.block_seconds
        made = engine.pipeline.finish(bound)
        if made is None or (bound is not None and made.seconds > bound):
            if made is None:
                assert bound is not None
                engine.executor.give_up(bound)  # or closing the runtime would wait for what may never end
            came = "is not there" if made is None else f"came after {made.seconds:.3g} s"
            raise StallError(f"block {block} {came}; the guard allows a block {bound:g} s")
        if (bad := _nonfinite(made)) is not None:
            self._refuse(engine, made, bad)
            return
        self._failures = 0
        if self.first_frame_seconds is None:
            self.first_frame_seconds = time.perf_counter() - self._began
        stats = ChunkStats(
            generate_seconds=made.generate_seconds,
            decode_seconds=made.decode_seconds,
            newest_temporal_id=made.position.newest_temporal_id,
            shift=made.position.shift,
            memory_attended=made.memory_attended,
            vitals=made.vitals,
        )
        first = self.first_frame(block)
        self._held.append(Chunk(index=block, frames=made.frames, first_frame=first, latents=made.latents, stats=stats))

    # ---------------------------------------------------------------- state

    def _snapshot(self, engine: Engine) -> Snapshot:
        return engine.save_state(self._seed, self.prompts.pending(), self._held, self._offset)

    def _good_state_due(self, engine: Engine) -> bool:
        block = engine.block
        # What is given would be no better another time: the first state to go back to is the one behind it.
        if self._guard.policy != ROLL_BACK or block < 0 or engine.pipeline.given:
            return False
        return self._good is None or block - self._good.block >= self._guard.keep_every

    def _keep_evidence(self, engine: Engine, block: int, made: Finished, bad: str) -> str:
        """What the message about ``block`` says of the evidence for it."""
        if self._guard.evidence is None:
            return ""
        facts = {"found": bad, "rollbacks": self.rollbacks, "position": dataclasses.asdict(made.position)}
        try:
            files = self._guard.save_evidence(block, self._snapshot(engine), self._good, made.vitals, facts)
        except (OutputError, RuntimeError) as error:  # a full disk; a device that is lost, which torch says
            # What has happened to the block matters more.
            return f"; no evidence: {one_line(error)}"
        return f"; evidence: {', '.join(map(str, files))}"

    def _refuse(self, engine: Engine, made: Finished, bad: str) -> None:
        """A block that is not finite: evidence, then a rollback or the end."""
        guard, block = self._guard, made.index + self._offset
        what = f"block {block}: {bad}"
        again = guard.policy == ROLL_BACK and self._good is not None and self._failures < guard.attempts
        kept = self._keep_evidence(engine, block, made, bad)
        if not again:
            tried = f", after {counted(self._failures, 'rollback')} in a row" if self._failures else ""
            raise NumericalError(f"{what}{tried}{kept}")
        good = self._good
        assert good is not None
        self._failures += 1
        self.rollbacks += 1
        self._seed = (self._seed + _RESEED) % _SEEDS
        engine.load_state(good, self._seed)
        self._offset = block - (good.block + 1)
        since = self._prompts_since
        self._prompts_since = {at: embeds for at, embeds in since.items() if at <= block}
        self.prompts.reopen(block, {at: embeds for at, embeds in since.items() if at > block})
        if self._prompts_since:
            engine.rollout.switch_prompt(self._prompts_since[max(self._prompts_since)])
        _logger.warning("%s; back to the state after block %d, with other noise%s", what, good.block, kept)


def _nonfinite(made: Finished) -> str | None:
    """What is wrong with a block's values, in words."""
    for what, bad, values in (
        ("latent", made.vitals.latent_nonfinite, made.latents),
        ("decoded video", made.vitals.video_nonfinite, made.frames),
    ):
        if bad:
            return f"{what}: {bad} of {values.numel()} values are NaN or infinite"
    return None
