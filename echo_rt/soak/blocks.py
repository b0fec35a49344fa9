"""The loop of a soak: ask for blocks, switch prompts, take snapshots, write lines."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from echo_rt.chunk import Chunk
from echo_rt.engine.guard import ROLL_BACK, STOP, Guard
from echo_rt.errors import NumericalError
from echo_rt.runtime import Runtime
from echo_rt.snapshot.snapshot import Snapshot
from echo_rt.snapshot.store import SnapshotKeeper, snapshot_files
from echo_rt.soak.checks import Promises
from echo_rt.soak.config import Limits, SoakConfig
from echo_rt.soak.gpu import GpuHealth
from echo_rt.soak.interval import Checker, Interval, digest
from echo_rt.soak.journal import Journal, Line, Past
from echo_rt.soak.probes import device_memory, host_memory
from echo_rt.soak.watch import Stop, Watcher
from echo_rt.stream import Stream

EVIDENCE_FOLDER = "evidence"


@dataclass
class Start:
    """What a process goes on from: None for the beginning of the video, and once the stream has it."""

    snapshot: Snapshot | None

    @property
    def block(self) -> int:
        """The first block of the process."""
        return 0 if self.snapshot is None else self.snapshot.next_block

    def take(self) -> Snapshot | None:
        """Whoever takes it is the only one to hold it: gigabytes, which a day of video has no use for."""
        snapshot, self.snapshot = self.snapshot, None
        return snapshot


class BlockLoop:
    """Makes the blocks of one process. ``failure``: what the stream raised; ``finished``: all blocks are made."""

    def __init__(
        self,
        config: SoakConfig,
        limits: Limits,
        runtime: Runtime,
        embeds: Sequence[Tensor],
        journal: Journal,
        promises: Promises,
        past: Past,
        keeper: SnapshotKeeper | None,
        health: GpuHealth | None,
        stop: Stop,
        watchers: Sequence[Watcher],
    ) -> None:
        self.failure: Exception | None = None
        self.finished = False
        self._config, self._limits, self._runtime, self._embeds = config, limits, runtime, embeds
        self._journal, self._promises, self._keeper, self._health = journal, promises, keeper, health
        self._stop, self._watchers = stop, watchers
        self._run, self._past = past.runs + 1, past
        self._made = 0
        self._switched = False
        self._guard = Guard(
            policy=ROLL_BACK if config.roll_back else STOP,
            evidence=config.folder / EVIDENCE_FOLDER,
            block_seconds=config.block_seconds,
        )
        self._snapshot_taken = False
        self._stall: float | None = None  # of the stream by snapshots since the last line, in milliseconds
        self._replayed: list[tuple[int, str, str]] = []
        self._compared = 0
        window = 1 if keeper is None else (config.keep + 1) * (config.snapshot_every or 1) // config.hash_every + 2
        self._recent: deque[tuple[int, str]] = deque(maxlen=window)
        self._rollbacks = 0
        self._branched = -1  # the first block behind the last rollback: no snapshot of before leads to it
        self._checker: Checker | None = None
        self._began = time.monotonic()

    @property
    def _elapsed(self) -> float:
        return self._past.elapsed + time.monotonic() - self._began

    def run(self, start: Start) -> None:
        """Go on from ``start``, whose snapshot is taken, until the soak has its length, is stopped, or fails.

        Raises ``OutputError`` where the journal or a snapshot cannot be written.
        """
        config = self._config
        checker = self._checker = Checker(
            self._runtime.config,
            self._past.hashes,
            block=start.block,
            frame=self._past.frames,
            hash_every=config.hash_every,
            offset=0 if start.snapshot is None else start.snapshot.offset,
        )
        with self._begin(start.take()) as stream:
            self._began = time.monotonic()
            interval = self._interval(checker)
            self.finished = config.is_over(checker.block, self._elapsed)
            while not self.finished and self.failure is None and self._stop.request is None:
                began = time.monotonic()
                chunk = self._next(stream)
                if chunk is None:
                    break
                self._count(interval, chunk, time.monotonic() - began, stream.rollbacks)
                self.finished = config.is_over(checker.block, self._elapsed)
                due = config.snapshot_every is not None and checker.block % config.snapshot_every == 0
                if due or self.finished or interval.seconds >= config.interval:
                    self._write(interval)
                    interval = self._interval(checker)
                if due:
                    self._take_snapshot(stream)
            if interval.blocks:
                self._write(interval)
            if self._stop.request is not None and self._keeper is not None and self.failure is None:
                # On request there is time for it, and nothing need be made again.
                self._keeper.wait()
                self._take_snapshot(stream)
        if self._keeper is not None:
            self._keeper.wait()

    def _begin(self, snapshot: Snapshot | None) -> Stream:
        if snapshot is not None:
            return self._runtime.resume(snapshot, guard=self._guard)
        first = self._embeds[self._config.prompt_of(0)]
        return self._runtime.stream(prompt_embeds=first, seed=self._config.seed, guard=self._guard)

    def _interval(self, checker: Checker) -> Interval:
        zscore = self._limits.latency_zscore
        assert zscore != "auto"
        return Interval(checker, self._run, zscore)

    def _next(self, stream: Stream) -> Chunk | None:
        """The next chunk; None where the stream failed, or a second request came in the middle of it."""
        try:
            # By the number of the block, so that a switch comes with the same one however far ahead blocks are begun.
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
        # A switch is asked for while an earlier block is handed out, and felt by the one after it as well.
        near = range(chunk.index - 1, chunk.index + self._runtime.lookahead + 1)
        switching = any(self._config.switches_at(block) for block in near)
        if rollbacks > self._rollbacks:
            self._rollbacks, self._branched = rollbacks, chunk.index
            self._recent.clear()
        made = interval.add(chunk, seconds, warm=self._warm, switching=switching, rollbacks=rollbacks)
        if made is not None:
            self._recent.append((chunk.index, made))
        for watcher in self._watchers:
            watcher.block_done(chunk.index, chunk.first_frame + chunk.frames.shape[0], seconds)

    @property
    def _warm(self) -> bool:
        """Once all that a block can meet was met: the first time a switch or a snapshot may allocate for good."""
        config = self._config
        switched = config.switch_every is None or self._switched
        snapped = config.snapshot_every is None or self._snapshot_taken
        return self._made > self._limits.warmup_blocks and switched and snapped

    def _write(self, interval: Interval) -> None:
        keeper, health = self._keeper, self._health
        probes = {
            "device": device_memory(self._runtime.device),
            "host": host_memory(),
            "gpu": None if health is None else health.read(),
            "snapshots": None
            if keeper is None
            else {"written": keeper.written, "skipped": keeper.skipped, "stall": self._stall},
        }
        self._stall = None
        assert self._checker is not None
        prompt = self._config.prompt_of(self._checker.block - 1)
        line = interval.line(elapsed=self._elapsed, fps=self._runtime.fps, probes=probes, prompt=prompt)
        self._journal.append(line)
        self._promises.see(line)
        verdicts = self._promises.verdicts()
        for watcher in self._watchers:
            watcher.line_done(line, verdicts)

    def _take_snapshot(self, stream: Stream) -> None:
        assert self._keeper is not None
        # Lines up to a snapshot are on the disk before it: whoever finds it finds them.
        self._journal.sync()
        began = time.monotonic()
        try:
            taken = self._keeper.offer(stream.snapshot)
        except Exception as error:
            if stream.failure is None:
                raise
            self.failure = error  # a block that was begun ahead, and waited for to take the snapshot behind it
            return
        if taken:
            self._snapshot_taken = True
            self._stall = max(self._stall or 0.0, round(1e3 * (time.monotonic() - began), 3))

    def replay(self) -> None:
        """Make hashed blocks again from the newest snapshot that lies before one, and compare."""
        assert self._keeper is not None
        for file in snapshot_files(self._keeper.folder):
            snapshot = Snapshot.load(file)
            begin = snapshot.next_block
            if begin <= self._branched:
                return
            known = {block: made for block, made in self._recent if begin <= block <= begin + self._config.hash_every}
            if known:
                self._remake(snapshot, known)
                return

    def _remake(self, snapshot: Snapshot, known: dict[int, str]) -> None:
        with self._runtime.resume(snapshot, guard=self._guard) as stream:
            for block in range(snapshot.next_block, max(known) + 1):
                chunk = None if self._stop.request is not None else self._next(stream)
                if chunk is None:
                    return
                if block in known:
                    made = digest(chunk)
                    self._compared += 1
                    if made != known[block]:
                        self._replayed.append((block, known[block], made))

    def end_line(self, end: str, problem: BaseException | None) -> Line:
        """The line of the journal that says how this process ended; ``problem``: what else than the stream raised."""
        return {
            "run": self._run,
            "block": 0 if self._checker is None else self._checker.block,
            "end": end,
            "time": round(time.time(), 3),
            "elapsed": round(self._elapsed, 3),
            "failure": _told(self.failure),
            "problem": _told(problem),
            "nonfinite_failure": isinstance(self.failure, NumericalError),
            "compared": self._compared,
            "mismatches": self._replayed,
            "backend": self._runtime.backend,
            "backend_reason": self._runtime.backend_reason,
            "taken": self._runtime.taken.as_json(),
        }


def _told(error: BaseException | None) -> str | None:
    return None if error is None else " ".join(f"{type(error).__name__}: {error}".split())
