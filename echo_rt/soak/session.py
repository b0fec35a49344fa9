"""One process of a soak: resume from the files in its folder, generate blocks, write a journal and a report."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from echo_rt.chunk import Chunk
from echo_rt.engine.guard import ROLL_BACK, STOP, Guard
from echo_rt.engine.prompts import load_prompt_embeds, save_prompt_embeds
from echo_rt.errors import ConfigError, EchoError, NumericalError, OutputError
from echo_rt.output.segments import INDEX_FILE
from echo_rt.runtime import Runtime
from echo_rt.snapshot.snapshot import Snapshot
from echo_rt.snapshot.store import SnapshotKeeper, latest_snapshot, require_seed, snapshot_files
from echo_rt.soak.checks import Status, Verdict
from echo_rt.soak.config import MANIFEST_FILE, SoakConfig, check_manifest, write_manifest
from echo_rt.soak.interval import Figures, digest
from echo_rt.soak.journal import JOURNAL_FILE, Line, Past, read_lines
from echo_rt.soak.probes import device_memory, gpu_health, host_memory
from echo_rt.soak.prometheus import Exporter
from echo_rt.soak.report import PAGE_FILE, PICTURES, REPORT_FILE, History, write_report
from echo_rt.stream import Stream
from echo_rt.utils.atomic_file import Log, PartFile, names_in, open_plain, reason
from echo_rt.utils.checked_json import json_line
from echo_rt.utils.device import parse_device
from echo_rt.utils.folder_lock import FolderClaim
from echo_rt.utils.packages import needing
from echo_rt.utils.signals import StopRequest
from echo_rt.utils.threads import share_cpu
from echo_rt.utils.wording import counted, one_line

_EVIDENCE_FOLDER, _SNAPSHOT_FOLDER, _PROMPT_PREFIX = "evidence", "snapshots", "prompt-"
_COMPLETE = "complete"


class Watcher(Protocol):
    """Follows a soak; must not raise for want of a reader."""

    def block_done(self, block: int, frames: int, seconds: float) -> None:
        """``block`` took ``seconds``; the video has ``frames`` now."""

    def line_done(self, line: Line, verdicts: Sequence[Verdict]) -> None:
        """A line was written; the promises stand like this after it."""


@dataclass(frozen=True)
class Outcome:
    """``end``: complete, failed, interrupted or terminated. ``failure``: what the stream raised, as one line.

    ``signal_code``: the exit code of the signal that ended it, if one did. ``backend`` and ``backend_reason`` are those
    of the process that ended it; None in journals of versions that did not write them.
    """

    end: str
    blocks: int
    verdicts: Sequence[Verdict]
    report: Path
    backend: str | None = None
    backend_reason: str | None = None
    taken: Mapping[str, Any] | None = None
    failure: str | None = None
    signal_code: int | None = None

    @property
    def exit_code(self) -> int:
        """4: the stream failed; 3: a promise was broken; 0 only for a complete soak that broke none."""
        if self.failure is not None:
            return 4
        if any(verdict.status is Status.BROKEN for verdict in self.verdicts):
            return 3
        return self.signal_code or 0

    @property
    def summary(self) -> str:
        """The outcome in one line."""
        counts = {status: sum(verdict.status is status for verdict in self.verdicts) for status in Status}
        said = ", ".join(f"{count} {status.value}" for status, count in counts.items())
        broken = [f"; {v.promise}: {v.evidence}" for v in self.verdicts if v.status is Status.BROKEN]
        return f"{self.end} after {counted(self.blocks, 'block')}; promises: {said}{''.join(broken)}"


def run(config: SoakConfig, *, stop: StopRequest | None = None, watchers: Sequence[Watcher] = ()) -> Outcome:
    """Run the soak, or continue the one in ``config.out``, and write its report.

    A stream that fails is an outcome, with a report, and so is a ``stop``. Raises :class:`ConfigError` for another
    soak's folder, the errors of loading a model, and :class:`OutputError` for all that goes wrong after that, of which
    there is a report if one can be written: the files stay readable, and the same call continues from there.
    """
    if config.plots:
        with needing("matplotlib", "--plots"):
            import matplotlib.figure  # noqa: F401 - asked for, so missing before the soak and not after it
    with _Process(config, stop or StopRequest(), list(watchers)) as process:
        return process.run()


class _Process(contextlib.ExitStack):
    """What one process of a soak holds, which is given back at the exit, and what it has done so far.

    ``_failure``: what the stream raised; ``_problem``: what anything else did; ``_finished``: all blocks are there.
    """

    def __init__(self, config: SoakConfig, stop: StopRequest, watchers: list[Watcher]) -> None:
        super().__init__()
        self._config, self._stop, self._watchers = config, stop, watchers
        self._device = parse_device(config.device)
        name = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "CPU"
        self._history = History(config.limits.resolved(self._device.type), name)
        self._claim = FolderClaim(config.folder)
        self.callback(self._claim.release)
        self._failure: Exception | None = None
        self._problem: Exception | None = None
        self._finished = False
        self._made = 0
        # What may allocate for good, and so belongs to the warm-up, and has not been yet.
        first = {"switch": config.switch_every, "snapshot": config.snapshot_every}
        self._first = {name for name, every in first.items() if every is not None}
        self._stall: float | None = None  # longest stall of the stream by a snapshot since the last line, in ms
        self._replayed: list[tuple[int, str, str]] = []
        self._compared = self._again = 0

    def run(self) -> Outcome:
        """Resume or begin, generate, conclude."""
        config, stop = self._config, self._stop
        begun = check_manifest(config)
        self._check_folder(begun is not None)
        last: Line = {}
        for last in read_lines(config.folder):
            self._history.see(last)
        # A complete soak may lack its report, or be asked for more blocks.
        if last.get("end") == _COMPLETE and config.is_over(last["block"], last["elapsed"]):
            return self._conclude(last, self._part())
        if config.serve is not None:
            self._watchers.append(self.enter_context(closing(Exporter(*config.serve))))
        file, snapshot = latest_snapshot(config.folder / _SNAPSHOT_FOLDER) or (None, None)
        if file is not None and snapshot is not None:
            require_seed(file, snapshot, config.seed)
        past = Past(config.folder, 0 if snapshot is None else snapshot.next_block)
        options = config.arguments() | {"device": self._device, "like": snapshot}
        with stop.interruptible():
            self._runtime = self.enter_context(Runtime.from_pretrained(config.model, **options))
        self.enter_context(share_cpu(self._device))
        # Kept ones first: text encoders may differ in the last bits.
        files = [config.folder / f"{_PROMPT_PREFIX}{index}.safetensors" for index in range(len(config.prompts))]
        kept = [load_prompt_embeds(file)[0] for file in files] if all(file.exists() for file in files) else None
        with stop.interruptible():
            self._embeds = kept or self._runtime.encode_prompts(config.prompts)
        policy, evidence = ROLL_BACK if config.roll_back else STOP, config.folder / _EVIDENCE_FOLDER
        self._guard = Guard(policy=policy, evidence=evidence, block_seconds=config.block_seconds)
        offset = 0 if snapshot is None else snapshot.offset
        self._stream = self.enter_context(
            self._runtime.stream(prompt_embeds=self._embeds[0], seed=config.seed, guard=self._guard)
            if snapshot is None
            else self._runtime.resume(snapshot, guard=self._guard)
        )
        del snapshot, options  # gigabytes, which a day of video has no use for
        try:
            if begun != config.settings():  # only now: a mistyped model or prompt must not be tied to the folder
                write_manifest(config)
            if not kept:
                for file, tensor, prompt in zip(files, self._embeds, config.prompts, strict=True):
                    save_prompt_embeds(file, tensor, prompt)
            return self._work(past, offset)
        except (EchoError, OSError) as error:  # whatever it is, it is no mistake in the request
            if isinstance(error, EchoError) and error.exit_code == 1:
                raise
            raise OutputError(str(error)) from error

    def _part(self) -> PartFile:
        """The beginning of a report: there is one, even where the disk takes no more files in the end."""
        part = PartFile(self._config.folder / REPORT_FILE)
        self.callback(part.discard)
        return part

    def _check_folder(self, begun: bool) -> None:
        """Raise ``ConfigError`` for what is no soak's, links and special files too; remove what kills have left."""
        folder, files = self._config.folder, (JOURNAL_FILE, REPORT_FILE, PAGE_FILE, *PICTURES)
        foreign = [folder / INDEX_FILE, folder / JOURNAL_FILE, *snapshot_files(folder / _SNAPSHOT_FOLDER)]
        for path in [] if begun else foreign:
            if path.exists():
                found = f"{path.relative_to(folder)} and no {MANIFEST_FILE}"
                raise ConfigError(f"{folder}: expected a folder of the soak's own, found {found}")
        path = folder
        try:
            for path in map(folder.joinpath, names_in(folder)):
                if path.name in (_SNAPSHOT_FOLDER, _EVIDENCE_FOLDER):
                    inner = FolderClaim(path)
                    inner.remove_parts("")
                    inner.release()
                elif path.name in files or path.name.startswith(_PROMPT_PREFIX):
                    os.close(open_plain(path, os.O_RDWR if path.name == JOURNAL_FILE else os.O_RDONLY))
            self._claim.remove_parts("")
        except OSError as error:
            raise ConfigError(f"{path}: {reason(error)}") from None

    # ---------------------------------------------------------------- the loop

    def _work(self, past: Past, offset: int) -> Outcome:
        """Generate blocks until the soak has its length, is stopped or fails, then some of them again to compare."""
        config, part = self._config, self._part()
        self.callback(FolderClaim(config.folder / _EVIDENCE_FOLDER).release)
        self._journal = self.enter_context(Log(config.folder / JOURNAL_FILE))
        self._run = past.runs + 1
        assert self._history.limits.latency_zscore != "auto"
        self._figures = Figures(
            self._runtime.config,
            past.hashes,
            block=self._stream.next_block,
            frame=past.frames,
            hash_every=config.hash_every,
            outlier_from=self._history.limits.latency_zscore,
            offset=offset,
        )
        self._keeper: SnapshotKeeper | None = None
        if config.snapshot_every is not None:
            self._keeper = SnapshotKeeper(config.folder / _SNAPSHOT_FOLDER, keep=config.keep)
            self.callback(self._keeper.close)
        self._health = gpu_health(self._device)
        if self._health is not None:
            self.callback(self._health.close)
        self._began = time.monotonic() - past.elapsed  # as if one process had made it all
        try:
            with self._stream:
                self._generate()
            if self._keeper is not None:
                self._keeper.wait()
                if self._finished and self._failure is None:
                    self._replay(self._keeper)
        except Exception as error:  # raised once there is a report
            self._problem = error
            if self._keeper is not None:
                with contextlib.suppress(Exception):  # the first error says more than the snapshot's
                    self._keeper.wait()
        return self._end(part)

    @property
    def _elapsed(self) -> float:
        return round(time.monotonic() - self._began, 3)

    def _generate(self) -> None:
        config, figures = self._config, self._figures
        figures.begin()
        self._finished = config.is_over(figures.block, self._elapsed)
        while not self._finished and self._failure is None and self._stop.request is None:
            began = time.monotonic()
            chunk = self._next(self._stream)
            if chunk is None:
                break
            self._count(chunk, time.monotonic() - began)
            self._finished = config.is_over(figures.block, self._elapsed)
            due = config.snapshot_every is not None and figures.block % config.snapshot_every == 0
            if due or self._finished or figures.seconds >= config.interval:
                self._write()
            if due:
                self._take_snapshot()
        if figures.seen:
            self._write()
        if self._stop.request is not None and self._keeper is not None and self._failure is None:
            # A request leaves the time for a snapshot, so that no block has to be generated again.
            self._keeper.wait()
            self._take_snapshot()

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
            self._failure = error
        except BaseException:
            if self._stop.request is None:
                raise
        return None

    def _count(self, chunk: Chunk, seconds: float) -> None:
        config = self._config
        self._made += 1
        if config.switches_at(chunk.index):
            self._first.discard("switch")
        warm = self._made > config.limits.warmup_blocks and not self._first
        # A switch is requested while an earlier block is handed out, and slows the block after it as well.
        near = range(chunk.index - 1, chunk.index + self._runtime.lookahead + 1)
        switching = any(map(config.switches_at, near))
        self._figures.add(chunk, seconds, warm=warm, switching=switching, rollbacks=self._stream.rollbacks)
        for watcher in self._watchers:
            watcher.block_done(chunk.index, self._figures.frame, seconds)

    def _write(self) -> None:
        keeper, stall, self._stall = self._keeper, self._stall, None
        probes = {
            "device": device_memory(self._device),
            "host": host_memory(),
            "gpu": None if self._health is None else self._health.read(),
            "snapshots": keeper and {"written": keeper.written, "skipped": keeper.skipped, "stall": stall},
        }
        prompt = self._config.prompt_of(self._figures.block - 1)
        begins = {"run": self._run, "elapsed": self._elapsed, "prompt": prompt}
        line = begins | self._figures.line(self._runtime.fps) | probes
        self._history.see(line)  # first: it belongs into the report even where the journal is gone
        self._journal.append(json_line(line))
        verdicts = self._history.verdicts()
        for watcher in self._watchers:
            watcher.line_done(line, verdicts)

    def _take_snapshot(self) -> None:
        assert self._keeper is not None
        # Whoever finds a snapshot must find the lines before it.
        self._journal.sync()
        began = time.monotonic()
        try:
            taken = self._keeper.offer(self._stream.snapshot)
        except Exception as error:
            if self._stream.failure is None:
                raise
            self._failure = error  # of a block that was begun ahead, which the snapshot waited for
            return
        if taken:
            self._first.discard("snapshot")
            self._stall = max(self._stall or 0.0, round(1e3 * (time.monotonic() - began), 3))

    def _replay(self, keeper: SnapshotKeeper) -> None:
        """Generate hashed blocks again from the newest snapshot before one, and compare."""
        for snapshot in map(Snapshot.load, snapshot_files(keeper.folder)):
            begin = snapshot.next_block
            hashes = Past(self._config.folder, begin).hashes
            known = {block: made for block, made in hashes.items() if block <= begin + self._config.hash_every}
            if known:
                break
        else:
            return
        with self._runtime.resume(snapshot, guard=self._guard) as stream:
            for block in range(begin, max(known) + 1):
                chunk = None if self._stop.request is not None else self._next(stream)
                if chunk is None:
                    return
                self._again += 1
                if block in known:
                    made = digest(chunk)
                    self._compared += 1
                    if made != known[block]:
                        self._replayed.append((block, known[block], made))

    # ---------------------------------------------------------------- the end

    def _end(self, part: PartFile) -> Outcome:
        """Write the last line and the report into ``part``; raise what went wrong, unless it was the stream."""
        request = None if self._finished else self._stop.request
        # The failure of a stream causes what goes wrong after it, and of several problems the first says most.
        last = self._end_line("failed" if self._failure or self._problem else request.reason if request else _COMPLETE)
        try:
            self._journal.append(json_line(last))
            self._journal.sync()
        except OutputError as error:
            self._problem = self._problem or error
            last = self._end_line("failed")
        self._journal.close()  # so that pictures can be written where no more files can be open
        self._history.see(last)
        try:
            outcome = self._conclude(last, part, None if request is None else request.exit_code)
        except (OutputError, OSError) as error:
            raise self._failure or self._problem or error from None
        if self._problem is not None and self._failure is None:
            raise self._problem
        return outcome

    def _end_line(self, end: str) -> Line:
        failure, problem = (
            None if error is None else one_line(f"{type(error).__name__}: {error}")
            for error in (self._failure, self._problem)
        )
        return {
            "run": self._run,
            "block": self._figures.block,
            "end": end,
            "time": round(time.time(), 3),
            "elapsed": self._elapsed,
            "failure": failure,
            "problem": problem,
            "nonfinite_failure": isinstance(self._failure, NumericalError),
            "compared": self._compared,
            "mismatches": self._replayed,
            "replayed": self._again,
            "backend": self._runtime.backend,
            "backend_reason": self._runtime.backend_reason,
            "taken": self._runtime.taken.as_json(),
        }

    def _conclude(self, last: Line, part: PartFile, signal_code: int | None = None) -> Outcome:
        """Write the report of a soak whose ``last`` line this is, into ``part``."""
        claim = self._claim
        if claim.removed:  # there is a report all the same, in a new folder if nobody has made one
            claim.release()
            claim = FolderClaim(self._config.folder, new=True)
            self.callback(claim.release)
            part = self._part()
        write_report(self._config, self._history, last, part)
        told = {name: last.get(name) for name in ("backend", "backend_reason", "taken", "failure")}
        verdicts, path = self._history.verdicts(), claim.path / REPORT_FILE
        return Outcome(last["end"], last["block"], verdicts, path, **told, signal_code=signal_code)
