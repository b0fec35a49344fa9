"""The loop of a soak: request blocks, switch prompts, take snapshots, write lines."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from echo_rt.chunk import Chunk
from echo_rt.engine.guard import ROLL_BACK, STOP, Guard
from echo_rt.errors import NumericalError
from echo_rt.runtime import Runtime
from echo_rt.snapshot.snapshot import Snapshot
from echo_rt.snapshot.store import SnapshotKeeper, snapshot_files
from echo_rt.soak.checks import Verdict
from echo_rt.soak.config import SoakConfig
from echo_rt.soak.interval import Checker, Interval, digest
from echo_rt.soak.journal import Journal, Line, Past
from echo_rt.soak.probes import device_memory, gpu_health, host_memory
from echo_rt.soak.report import History
from echo_rt.stream import Stream

EVIDENCE_FOLDER, SNAPSHOT_FOLDER = "evidence", "snapshots"


class Watcher(Protocol):
    """Follows a soak; must not raise for want of a reader."""

    def block_done(self, block: int, frames: int, seconds: float) -> None:
        """``block`` took ``seconds``; the video has ``frames`` now."""

    def line_done(self, line: Line, verdicts: Sequence[Verdict]) -> None:
        """A line was written; the promises stand like this after it."""


class StopSignal(Protocol):
    """Why to stop, in one word, and the exit code of the process: the command line's ``StopNow``."""

    @property
    def exit_code(self) -> int: ...
    @property
    def reason(self) -> str: ...


class Stop(Protocol):
    """The command line's ``StopRequest``; ``request`` is None until somebody asks."""

    @property
    def request(self) -> StopSignal | None: ...
    def interruptible(self) -> AbstractContextManager[None]: ...
    def after_block(self) -> AbstractContextManager[None]: ...


class BlockLoop:
    """Generates the blocks of one process, from ``snapshot`` on, or from the beginning of the video.

    ``failure``: what the stream raised; ``problem``: what anything else did; ``begun``: there was a stream;
    ``finished``: all blocks are there.
    """

    def __init__(
        self,
        config: SoakConfig,
        runtime: Runtime,
        embeds: Sequence[Tensor],
        journal: Journal,
        history: History,
        past: Past,
        snapshot: Snapshot | None,
        stop: Stop,
        watchers: Sequence[Watcher],
    ) -> None:
        self.failure: Exception | None = None
        self.problem: Exception | None = None
        self.finished = self.begun = False
        self._config, self._runtime, self._embeds = config, runtime, embeds
        self._journal, self._history, self._stop, self._watchers = journal, history, stop, watchers
        self._limits = history.promises.limits
        self._snapshot = snapshot
        begin, offset = (0, 0) if snapshot is None else (snapshot.next_block, snapshot.offset)
        self._run, self._elapsed_before = past.runs + 1, past.elapsed
        self._checker = Checker(
            runtime.config, past.hashes, block=begin, frame=past.frames, hash_every=config.hash_every, offset=offset
        )
        self._guard = Guard(
            policy=ROLL_BACK if config.roll_back else STOP,
            evidence=config.folder / EVIDENCE_FOLDER,
            block_seconds=config.block_seconds,
        )
        self._made = 0
        self._switched = self._snapshot_taken = False
        self._stall: float | None = None  # longest stall of the stream by a snapshot since the last line, in ms
        self._replayed: list[tuple[int, str, str]] = []
        self._compared = self._again = 0
        window = (config.keep + 1) * (config.snapshot_every or 0) // config.hash_every + 2
        self._recent: deque[tuple[int, Future[str]]] = deque(maxlen=window)
        self._rollbacks = 0
        self._branched = -1  # the first block after the last rollback: no earlier snapshot leads to it
        self._began = time.monotonic()
        self._cleanup = contextlib.ExitStack()
        self._keeper: SnapshotKeeper | None = None
        if config.snapshot_every is not None:
            self._keeper = SnapshotKeeper(config.folder / SNAPSHOT_FOLDER, keep=config.keep)
            self._cleanup.callback(self._keeper.close)
        self._health = gpu_health(runtime.device)
        if self._health is not None:
            self._cleanup.callback(self._health.close)

    def close(self) -> None:
        """Wait for the snapshot that is being written."""
        self._cleanup.close()

    def run(self) -> None:
        """Generate blocks until the soak has its length, is stopped or fails, then some of them again to compare."""
        try:
            self._stream()
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
        return self._elapsed_before + time.monotonic() - self._began

    def _stream(self) -> None:
        config, checker, stop = self._config, self._checker, self._stop
        with self._begin() as stream:
            self.begun = True
            self._began = time.monotonic()
            interval = self._interval()
            self.finished = config.is_over(checker.block, self._elapsed)
            while not self.finished and self.failure is None and stop.request is None:
                began = time.monotonic()
                chunk = self._next(stream)
                if chunk is None:
                    break
                self._count(interval, chunk, time.monotonic() - began, stream.rollbacks)
                self.finished = config.is_over(checker.block, self._elapsed)
                due = config.snapshot_every is not None and checker.block % config.snapshot_every == 0
                if due or self.finished or interval.seconds >= config.interval:
                    self._write(interval)
                    interval = self._interval()
                if due:
                    self._take_snapshot(stream)
            if interval.blocks:
                self._write(interval)
            if stop.request is not None and self._keeper is not None and self.failure is None:
                # A request leaves the time for a snapshot, so that no block has to be generated again.
                self._keeper.wait()
                self._take_snapshot(stream)

    def _begin(self) -> Stream:
        # Nobody else holds the snapshot: gigabytes, which a day of video has no use for.
        snapshot, self._snapshot = self._snapshot, None
        if snapshot is not None:
            return self._runtime.resume(snapshot, guard=self._guard)
        first = self._embeds[self._config.prompt_of(0)]
        return self._runtime.stream(prompt_embeds=first, seed=self._config.seed, guard=self._guard)

    def _interval(self) -> Interval:
        zscore = self._limits.latency_zscore
        assert zscore != "auto"
        return Interval(self._checker, self._run, zscore)

    def _next(self, stream: Stream) -> Chunk | None:
        """Return the next chunk; None where the stream failed, or a second request came amid it."""
        try:
            # By block number, so that a prompt begins at the same block however many are begun ahead.
            for block in range(stream.next_prompt_block, stream.next_prompt_block + self._runtime.lookahead + 1):
                if self._config.switches_at(block):
                    stream.set_prompt(prompt_embeds=self._embeds[self._config.prompt_of(block)], block=block)
            with self._stop.after_block():
                return next(stream)
        except Exception as error:
            self.failure = error
            return None
        except BaseException:
            if self._stop.request is None:
                raise
            return None

    def _count(self, interval: Interval, chunk: Chunk, seconds: float, rollbacks: int) -> None:
        self._made += 1
        self._switched |= self._config.switches_at(chunk.index)
        # A switch is requested while an earlier block is handed out, and slows the block after it as well.
        near = range(chunk.index - 1, chunk.index + self._runtime.lookahead + 1)
        switching = any(self._config.switches_at(block) for block in near)
        if rollbacks > self._rollbacks:
            self._rollbacks, self._branched = rollbacks, chunk.index
            self._recent.clear()
        made = interval.add(chunk, seconds, warm=self._warm, switching=switching, rollbacks=rollbacks)
        if made is not None:
            self._recent.append((chunk.index, made))
        for watcher in self._watchers:
            watcher.block_done(chunk.index, self._checker.frame, seconds)

    @property
    def _warm(self) -> bool:
        """Whether the process is past its warm-up: the first switch and the first snapshot may allocate for good."""
        config = self._config
        switched = config.switch_every is None or self._switched
        snapped = config.snapshot_every is None or self._snapshot_taken
        return self._made > self._limits.warmup_blocks and switched and snapped

    def _write(self, interval: Interval) -> None:
        keeper, stall, self._stall = self._keeper, self._stall, None
        taken = None if keeper is None else {"written": keeper.written, "skipped": keeper.skipped, "stall": stall}
        probes = {
            "device": device_memory(self._runtime.device),
            "host": host_memory(),
            "gpu": None if self._health is None else self._health.read(),
            "snapshots": taken,
        }
        prompt = self._config.prompt_of(self._checker.block - 1)
        line = interval.line(elapsed=self._elapsed, fps=self._runtime.fps, probes=probes, prompt=prompt)
        self._history.see(line)  # first: it belongs into the report even where the journal is gone
        self._journal.append(line)
        verdicts = self._history.promises.verdicts()
        for watcher in self._watchers:
            watcher.line_done(line, verdicts)

    def _take_snapshot(self, stream: Stream) -> None:
        assert self._keeper is not None
        # Whoever finds a snapshot must find the lines before it.
        self._journal.sync()
        began = time.monotonic()
        try:
            taken = self._keeper.offer(stream.snapshot)
        except Exception as error:
            if stream.failure is None:
                raise
            self.failure = error  # of a block that was begun ahead, which the snapshot waited for
            return
        if taken:
            self._snapshot_taken = True
            self._stall = max(self._stall or 0.0, round(1e3 * (time.monotonic() - began), 3))

    def _replay(self, keeper: SnapshotKeeper) -> None:
        """Generate hashed blocks again from the newest snapshot before one, and compare."""
        for file in snapshot_files(keeper.folder):
            snapshot = Snapshot.load(file)
            begin = snapshot.next_block
            if begin <= self._branched:
                return
            end = begin + self._config.hash_every
            known = {block: made.result() for block, made in self._recent if begin <= block <= end}
            if known:
                self._compare(snapshot, known)
                return

    def _compare(self, snapshot: Snapshot, known: dict[int, str]) -> None:
        with self._runtime.resume(snapshot, guard=self._guard) as stream:
            for block in range(snapshot.next_block, max(known) + 1):
                chunk = None if self._stop.request is not None else self._next(stream)
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
            "run": self._run,
            "block": self._checker.block,
            "end": end,
            "time": round(time.time(), 3),
            "elapsed": round(self._elapsed, 3),
            "failure": _in_one_line(self.failure),
            "problem": _in_one_line(self.problem),
            "nonfinite_failure": isinstance(self.failure, NumericalError),
            "compared": self._compared,
            "mismatches": self._replayed,
            "replayed": self._again,
            "backend": self._runtime.backend,
            "backend_reason": self._runtime.backend_reason,
            "taken": self._runtime.taken.as_json(),
        }


def _in_one_line(error: BaseException | None) -> str | None:
    return None if error is None else " ".join(f"{type(error).__name__}: {error}".split())
