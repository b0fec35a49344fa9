"""The loop of a soak: request blocks, switch prompts, take snapshots, write lines."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from echo_rt.chunk import Chunk
from echo_rt.engine.guard import Guard
from echo_rt.errors import NumericalError
from echo_rt.runtime import Runtime
from echo_rt.snapshot.snapshot import Snapshot
from echo_rt.snapshot.store import SnapshotKeeper, snapshot_files
from echo_rt.soak.checks import Verdict
from echo_rt.soak.config import SoakConfig
from echo_rt.soak.interval import Figures, digest
from echo_rt.soak.journal import Journal, Line, Past
from echo_rt.soak.probes import device_memory, gpu_health, host_memory
from echo_rt.soak.report import History
from echo_rt.stream import Stream
from echo_rt.utils.signals import StopRequest
from echo_rt.utils.wording import one_line

EVIDENCE_FOLDER, SNAPSHOT_FOLDER = "evidence", "snapshots"


class Watcher(Protocol):
    """Follows a soak; must not raise for want of a reader."""

    def block_done(self, block: int, frames: int, seconds: float) -> None:
        """``block`` took ``seconds``; the video has ``frames`` now."""

    def line_done(self, line: Line, verdicts: Sequence[Verdict]) -> None:
        """A line was written; the promises stand like this after it."""


@dataclass
class BlockLoop:
    """Generates the blocks of one process: those of ``stream``, which it closes.

    ``guard``: that of the stream; ``embeds``: of the prompts; ``past``: of the processes before; ``offset``: as in
    :class:`Figures`. ``failure``: what the stream raised; ``problem``: what anything else did; ``finished``: all blocks
    are there.
    """

    config: SoakConfig
    runtime: Runtime
    stream: Stream
    guard: Guard
    embeds: Sequence[Tensor]
    journal: Journal
    history: History
    past: Past
    offset: int
    stop: StopRequest
    watchers: Sequence[Watcher]

    def __post_init__(self) -> None:
        self.failure: Exception | None = None
        self.problem: Exception | None = None
        self.finished = False
        config, past, self._limits = self.config, self.past, self.history.promises.limits
        assert self._limits.latency_zscore != "auto"
        self.figures = Figures(
            self.runtime.config,
            past.hashes,
            block=self.stream.next_block,
            frame=past.frames,
            hash_every=config.hash_every,
            run=past.runs + 1,
            outlier_from=self._limits.latency_zscore,
            offset=self.offset,
        )
        self._made = 0
        self._switched = self._snapshot_taken = False
        self._stall: float | None = None  # longest stall of the stream by a snapshot since the last line, in ms
        self._replayed: list[tuple[int, str, str]] = []
        self._compared = self._again = 0
        self._began = time.monotonic()
        self._cleanup = contextlib.ExitStack()
        self._keeper: SnapshotKeeper | None = None
        if config.snapshot_every is not None:
            self._keeper = SnapshotKeeper(config.folder / SNAPSHOT_FOLDER, keep=config.keep)
            self._cleanup.callback(self._keeper.close)
        self._health = gpu_health(self.runtime.device)
        if self._health is not None:
            self._cleanup.callback(self._health.close)

    def close(self) -> None:
        """Wait for the snapshot that is being written."""
        self._cleanup.close()

    def run(self) -> None:
        """Generate blocks until the soak has its length, is stopped or fails, then some of them again to compare."""
        try:
            with self.stream:
                self._generate()
            if self._keeper is not None:
                self._keeper.wait()
                if self.finished and self.failure is None:
                    self._replay(self._keeper)
        except Exception as error:  # the session raises it once there is a report
            self.problem = error
            if self._keeper is not None:
                with contextlib.suppress(Exception):  # the first error says more than the snapshot's
                    self._keeper.wait()

    @property
    def _elapsed(self) -> float:
        return self.past.elapsed + time.monotonic() - self._began

    def _generate(self) -> None:
        config, figures = self.config, self.figures
        self._began = time.monotonic()
        figures.begin()
        self.finished = config.is_over(figures.block, self._elapsed)
        while not self.finished and self.failure is None and self.stop.request is None:
            began = time.monotonic()
            chunk = self._next(self.stream)
            if chunk is None:
                break
            self._count(chunk, time.monotonic() - began)
            self.finished = config.is_over(figures.block, self._elapsed)
            due = config.snapshot_every is not None and figures.block % config.snapshot_every == 0
            if due or self.finished or figures.seconds >= config.interval:
                self._write()
            if due:
                self._take_snapshot()
        if figures.blocks:
            self._write()
        if self.stop.request is not None and self._keeper is not None and self.failure is None:
            # A request leaves the time for a snapshot, so that no block has to be generated again.
            self._keeper.wait()
            self._take_snapshot()

    def _next(self, stream: Stream) -> Chunk | None:
        """Return the next chunk; None where the stream failed, or a second request came amid it."""
        try:
            # By block number, so that a prompt begins at the same block however many are begun ahead.
            for block in range(stream.next_prompt_block, stream.next_prompt_block + self.runtime.lookahead + 1):
                if self.config.switches_at(block):
                    stream.set_prompt(prompt_embeds=self.embeds[self.config.prompt_of(block)], block=block)
            with self.stop.after_block():
                return next(stream)
        except Exception as error:
            self.failure = error
        except BaseException:
            if self.stop.request is None:
                raise
        return None

    def _count(self, chunk: Chunk, seconds: float) -> None:
        config = self.config
        self._made += 1
        self._switched |= config.switches_at(chunk.index)
        # The first switch and the first snapshot may allocate for good.
        warm = self._made > self._limits.warmup_blocks
        warm &= (config.switch_every is None or self._switched) and (self._keeper is None or self._snapshot_taken)
        # A switch is requested while an earlier block is handed out, and slows the block after it as well.
        near = range(chunk.index - 1, chunk.index + self.runtime.lookahead + 1)
        switching = any(map(config.switches_at, near))
        self.figures.add(chunk, seconds, warm=warm, switching=switching, rollbacks=self.stream.rollbacks)
        for watcher in self.watchers:
            watcher.block_done(chunk.index, self.figures.frame, seconds)

    def _write(self) -> None:
        keeper, stall, self._stall = self._keeper, self._stall, None
        probes = {
            "device": device_memory(self.runtime.device),
            "host": host_memory(),
            "gpu": None if self._health is None else self._health.read(),
            "snapshots": keeper and {"written": keeper.written, "skipped": keeper.skipped, "stall": stall},
        }
        prompt = self.config.prompt_of(self.figures.block - 1)
        line = self.figures.line(elapsed=self._elapsed, fps=self.runtime.fps, probes=probes, prompt=prompt)
        self.history.see(line)  # first: it belongs into the report even where the journal is gone
        self.journal.append(line)
        verdicts = self.history.promises.verdicts()
        for watcher in self.watchers:
            watcher.line_done(line, verdicts)

    def _take_snapshot(self) -> None:
        assert self._keeper is not None
        # Whoever finds a snapshot must find the lines before it.
        self.journal.sync()
        began = time.monotonic()
        try:
            taken = self._keeper.offer(self.stream.snapshot)
        except Exception as error:
            if self.stream.failure is None:
                raise
            self.failure = error  # of a block that was begun ahead, which the snapshot waited for
            return
        if taken:
            self._snapshot_taken = True
            self._stall = max(self._stall or 0.0, round(1e3 * (time.monotonic() - began), 3))

    def _replay(self, keeper: SnapshotKeeper) -> None:
        """Generate hashed blocks again from the newest snapshot before one, and compare."""
        for snapshot in map(Snapshot.load, snapshot_files(keeper.folder)):
            begin = snapshot.next_block
            hashes = Past(self.config.folder, begin).hashes
            known = {block: made for block, made in hashes.items() if block <= begin + self.config.hash_every}
            if known:
                break
        else:
            return
        with self.runtime.resume(snapshot, guard=self.guard) as stream:
            for block in range(begin, max(known) + 1):
                chunk = None if self.stop.request is not None else self._next(stream)
                if chunk is None:
                    return
                self._again += 1
                if block in known:
                    made = digest(chunk)
                    self._compared += 1
                    if made != known[block]:
                        self._replayed.append((block, known[block], made))

    def end_line(self, end: str) -> Line:
        """Return the journal's line that says how this process ended."""
        return {
            "run": self.figures.run,
            "block": self.figures.block,
            "end": end,
            "time": round(time.time(), 3),
            "elapsed": round(self._elapsed, 3),
            "failure": _in_one_line(self.failure),
            "problem": _in_one_line(self.problem),
            "nonfinite_failure": isinstance(self.failure, NumericalError),
            "compared": self._compared,
            "mismatches": self._replayed,
            "replayed": self._again,
            "backend": self.runtime.backend,
            "backend_reason": self.runtime.backend_reason,
            "taken": self.runtime.taken.as_json(),
        }


def _in_one_line(error: BaseException | None) -> str | None:
    return None if error is None else one_line(f"{type(error).__name__}: {error}")
