"""One process of a soak: resume from the files in its folder, generate blocks, write a journal and a report."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from echo_rt.engine.guard import ROLL_BACK, STOP, Guard
from echo_rt.engine.prompts import load_prompt_embeds, save_prompt_embeds
from echo_rt.errors import BackendError, ConfigError, EchoError, OutputError
from echo_rt.output.segment_index import INDEX_FILE
from echo_rt.runtime import Runtime
from echo_rt.snapshot.store import latest_snapshot, require_seed, snapshot_files
from echo_rt.soak import report
from echo_rt.soak.checks import Promises, Status, Verdict
from echo_rt.soak.config import MANIFEST_FILE, SoakConfig, check_manifest, write_manifest
from echo_rt.soak.journal import JOURNAL_FILE, Journal, Line, Past, read_lines
from echo_rt.soak.loop import EVIDENCE_FOLDER, SNAPSHOT_FOLDER, BlockLoop, Watcher
from echo_rt.soak.prometheus import Exporter
from echo_rt.utils.atomic_file import PartFile, names_in, open_plain, reason
from echo_rt.utils.device import parse_device
from echo_rt.utils.folder_lock import FolderClaim
from echo_rt.utils.signals import StopRequest
from echo_rt.utils.threads import share_cpu
from echo_rt.utils.wording import counted

EXIT_BROKEN = 3  # a promise was broken
EXIT_FAILED = 4  # the stream failed
_PROMPT_PREFIX = "prompt-"
_COMPLETE = "complete"


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
        """0 only for a complete soak that broke no promise."""
        if self.failure is not None:
            return EXIT_FAILED
        if any(verdict.status is Status.BROKEN for verdict in self.verdicts):
            return EXIT_BROKEN
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
    if config.plots and not report.can_plot():
        raise BackendError(report.NO_MATPLOTLIB)
    device = parse_device(config.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    history = report.History(Promises(config.limits.resolved(device.type)), name)
    stop = stop or StopRequest()
    with contextlib.ExitStack() as cleanup:
        claim = FolderClaim(config.folder)
        cleanup.callback(claim.release)
        begun = check_manifest(config)
        _check_folder(claim, begun is not None)
        last: Line = {}
        for last in read_lines(config.folder):
            history.see(last)
        # A complete soak may lack its report, or be asked for more blocks.
        if last.get("end") == _COMPLETE and config.is_over(last["block"], last["elapsed"]):
            return _conclude(config, history, claim, last)
        if config.serve is not None:
            watchers = [*watchers, cleanup.enter_context(closing(Exporter(*config.serve)))]
        file, snapshot = latest_snapshot(config.folder / SNAPSHOT_FOLDER) or (None, None)
        if file is not None and snapshot is not None:
            require_seed(file, snapshot, config.seed)
        past = Past(config.folder, 0 if snapshot is None else snapshot.next_block)
        options = config.arguments() | {"device": device, "like": snapshot}
        with stop.interruptible():
            runtime = cleanup.enter_context(Runtime.from_pretrained(config.model, **options))
        cleanup.enter_context(share_cpu(device))
        kept = _kept_embeds(config)
        with stop.interruptible():
            embeds = kept or runtime.encode_prompts(config.prompts)
        policy, evidence = ROLL_BACK if config.roll_back else STOP, config.folder / EVIDENCE_FOLDER
        guard = Guard(policy=policy, evidence=evidence, block_seconds=config.block_seconds)
        if snapshot is None:
            stream = runtime.stream(prompt_embeds=embeds[0], seed=config.seed, guard=guard)
        else:
            stream = runtime.resume(snapshot, guard=guard)
        offset = 0 if snapshot is None else snapshot.offset
        del snapshot, options  # gigabytes, which a day of video has no use for
        with _accepted():
            if begun != config.settings():  # only now: a mistyped model or prompt must not be tied to the folder
                write_manifest(config)
            if not kept:
                for file, tensor, prompt in zip(_embeds_files(config), embeds, config.prompts, strict=True):
                    save_prompt_embeds(file, tensor, prompt)
            part = PartFile(config.folder / report.REPORT_FILE)
            cleanup.callback(part.discard)
            journal = cleanup.enter_context(closing(Journal(config.folder)))
            loop = BlockLoop(config, runtime, stream, guard, embeds, journal, history, past, offset, stop, watchers)
            cleanup.callback(loop.close)
            loop.run()
            request = None if loop.finished else stop.request
            # The failure of a stream causes what goes wrong after it, and of several problems the first says most.
            last = loop.end_line("failed" if loop.failure or loop.problem else request.reason if request else _COMPLETE)
            try:
                journal.append(last)
                journal.sync()
            except OutputError as error:
                loop.problem = loop.problem or error
                last = loop.end_line("failed")
            journal.close()  # so that pictures can be written where no more files can be open
            history.see(last)
            try:
                outcome = _conclude(config, history, claim, last, part, request.exit_code if request else None)
            except (OutputError, OSError) as error:
                raise loop.failure or loop.problem or error from None
            if loop.problem is not None and loop.failure is None:
                raise loop.problem
            return outcome


@contextlib.contextmanager
def _accepted() -> Iterator[None]:
    """Whatever goes wrong here is not a mistake in the request."""
    try:
        yield
    except (EchoError, OSError) as error:
        if isinstance(error, EchoError) and error.exit_code == 1:
            raise
        raise OutputError(str(error)) from error


def _conclude(
    config: SoakConfig,
    history: report.History,
    claim: FolderClaim,
    last: Line,
    part: PartFile | None = None,
    signal_code: int | None = None,
) -> Outcome:
    with contextlib.ExitStack() as cleanup:
        if claim.removed:  # there is a report all the same, in a new folder if nobody has made one
            claim.release()
            claim, part = FolderClaim(config.folder, new=True), None
            cleanup.callback(claim.release)
        report.write_report(config, history, last, part or PartFile(config.folder / report.REPORT_FILE))
        told = {name: last.get(name) for name in ("backend", "backend_reason", "taken", "failure")}
        verdicts, path = history.promises.verdicts(), claim.path / report.REPORT_FILE
        return Outcome(last["end"], last["block"], verdicts, path, **told, signal_code=signal_code)


def _check_folder(claim: FolderClaim, begun: bool) -> None:
    """Raise ``ConfigError`` for what is no soak's, links and special files too; remove what killed processes left."""
    folder, files = claim.folder, (JOURNAL_FILE, report.REPORT_FILE, report.PAGE_FILE, *report.PICTURES)
    foreign = [] if begun else [folder / INDEX_FILE, folder / JOURNAL_FILE, *snapshot_files(folder / SNAPSHOT_FOLDER)]
    for path in foreign:
        if path.exists():
            found = path.relative_to(folder)
            raise ConfigError(f"{folder}: expected a folder of the soak's own, found {found} and no {MANIFEST_FILE}")
    path = folder
    try:
        for path in map(folder.joinpath, names_in(folder)):
            if path.name in (SNAPSHOT_FOLDER, EVIDENCE_FOLDER):
                inner = FolderClaim(path)
                inner.remove_parts("")
                inner.release()
            elif path.name in files or path.name.startswith(_PROMPT_PREFIX):
                os.close(open_plain(path, os.O_RDWR if path.name == JOURNAL_FILE else os.O_RDONLY))
        claim.remove_parts("")
    except OSError as error:
        raise ConfigError(f"{path}: {reason(error)}") from None


def _embeds_files(config: SoakConfig) -> list[Path]:
    return [config.folder / f"{_PROMPT_PREFIX}{index}.safetensors" for index in range(len(config.prompts))]


def _kept_embeds(config: SoakConfig) -> list[Tensor] | None:
    """Load the embeddings of an earlier process, None without: text encoders may differ in the last bits."""
    files = _embeds_files(config)
    return [load_prompt_embeds(file)[0] for file in files] if all(file.exists() for file in files) else None
