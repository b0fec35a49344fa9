"""One process of a soak: pick up what is there, make blocks and watch them, leave a journal and a report."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from echo_rt.engine.prompts import load_prompt_embeds, save_prompt_embeds
from echo_rt.errors import ConfigError, OutputError
from echo_rt.output.segment_index import INDEX_FILE
from echo_rt.runtime import Runtime
from echo_rt.snapshot.snapshot import Snapshot
from echo_rt.snapshot.store import SnapshotKeeper, latest_snapshot, snapshot_files
from echo_rt.soak.blocks import EVIDENCE_FOLDER, BlockLoop, Start
from echo_rt.soak.checks import Promises
from echo_rt.soak.config import MANIFEST_FILE, Begun, Limits, SoakConfig, check_manifest, write_manifest
from echo_rt.soak.gpu import gpu_health
from echo_rt.soak.journal import Journal, Line, Past, read_lines
from echo_rt.soak.outcome import Outcome
from echo_rt.soak.plots import PICTURES, require_matplotlib
from echo_rt.soak.prometheus import Exporter
from echo_rt.soak.report import REPORT_FILE, device_name, write_report
from echo_rt.soak.watch import NeverStop, Stop, Watcher
from echo_rt.utils.atomic_file import reason
from echo_rt.utils.build_info import __version__
from echo_rt.utils.device import parse_device
from echo_rt.utils.folder_lock import FolderClaim
from echo_rt.utils.threads import share_cpu

SNAPSHOT_FOLDER = "snapshots"
_PROMPT_PREFIX = "prompt-"
_COMPLETE = "complete"


def run(config: SoakConfig, *, stop: Stop | None = None, watchers: Sequence[Watcher] = ()) -> Outcome:
    """Do the soak, or go on with the one that was begun in ``config.out``; write its report.

    A stream that fails is an outcome, with its report, and so is a ``stop``. Raises :class:`ConfigError` for another
    soak's folder, what loading a model raises, :class:`OutputError` where the folder cannot be written: what is in
    it stays readable, and the same call goes on from there.
    """
    if config.plots:
        require_matplotlib()
    device = parse_device(config.device)
    limits, name = config.limits.resolved(device.type), device_name(device)
    stop = stop or NeverStop()
    with contextlib.ExitStack() as cleanup:
        claim = FolderClaim(config.folder)
        cleanup.callback(claim.release)
        begun = check_manifest(config)
        if begun is Begun.NOT:
            _require_no_other(config.folder)
        _sweep(claim)
        promises = Promises(limits)
        last: Line = {}
        for last in read_lines(config.folder):
            promises.see(last)
        # Only its report may be missing, unless it is to be longer now.
        if last.get("end") == _COMPLETE and config.is_over(last["block"], last["elapsed"]):
            return _conclude(config, name, promises, last, None)
        if config.serve is not None:
            exporter = Exporter(*config.serve)
            cleanup.callback(exporter.close)
            watchers = [*watchers, exporter]
        start = _start(config)
        with stop.interruptible():
            runtime = _load(config, device, start.snapshot)
        cleanup.callback(runtime.close)
        cleanup.enter_context(share_cpu(device))
        if begun is not Begun.SAME:  # only now: a mistyped name of a model must not be what --out is bound to
            write_manifest(config, __version__)
        journal = Journal(config.folder)
        cleanup.callback(journal.close)
        with stop.interruptible():
            embeds = _prompt_embeds(runtime, config)
        return _soak(config, limits, name, runtime, embeds, start, journal, promises, stop, watchers, cleanup)


def _sweep(claim: FolderClaim) -> None:
    """Remove what a process that was killed amid a file left of it."""
    try:
        for name in (MANIFEST_FILE, REPORT_FILE, _PROMPT_PREFIX, *PICTURES):
            claim.remove_parts(name)
        if (claim.folder / EVIDENCE_FOLDER).is_dir():
            evidence = FolderClaim(claim.folder / EVIDENCE_FOLDER)
            evidence.remove_parts("")
            evidence.release()
    except OSError as error:
        raise OutputError(f"{claim.folder}: cannot remove what a killed process left: {reason(error)}") from None


def _require_no_other(folder: Path) -> None:
    """:class:`ConfigError` for a folder in which something else than a soak has left what a soak would go on from."""
    others = [folder / INDEX_FILE, *snapshot_files(folder / SNAPSHOT_FOLDER)]
    for other in others:
        if other.exists():
            found = other.relative_to(folder)
            raise ConfigError(f"{folder}: expected a folder of the soak's own, found {found} and no {MANIFEST_FILE}")


def _start(config: SoakConfig) -> Start:
    found = latest_snapshot(config.folder / SNAPSHOT_FOLDER)
    return Start(None if found is None else found[1])


def _load(config: SoakConfig, device: torch.device, like: Snapshot | None) -> Runtime:
    return Runtime.from_pretrained(config.model, **config.arguments() | {"device": device, "like": like})


def _prompt_embeds(runtime: Runtime, config: SoakConfig) -> list[Tensor]:
    """Those of an earlier process where they are there: a text encoder need not be bit for bit the same elsewhere."""
    files = [config.folder / f"{_PROMPT_PREFIX}{index}.safetensors" for index in range(len(config.prompts))]
    if all(file.exists() for file in files):
        return [load_prompt_embeds(file)[0] for file in files]
    embeds = runtime.encode_prompts(config.prompts)
    for file, tensor, prompt in zip(files, embeds, config.prompts, strict=True):
        save_prompt_embeds(file, tensor, prompt)
    return embeds


def _soak(
    config: SoakConfig,
    limits: Limits,
    name: str,
    runtime: Runtime,
    embeds: Sequence[Tensor],
    start: Start,
    journal: Journal,
    promises: Promises,
    stop: Stop,
    watchers: Sequence[Watcher],
    cleanup: contextlib.ExitStack,
) -> Outcome:
    past = Past(config.folder, start.block)
    keeper = None
    if config.snapshot_every is not None:
        keeper = SnapshotKeeper(config.folder / SNAPSHOT_FOLDER, keep=config.keep)
        cleanup.callback(keeper.close)
    health = gpu_health(runtime.device)
    if health is not None:
        cleanup.callback(health.close)
    loop = BlockLoop(config, limits, runtime, embeds, journal, promises, past, keeper, health, stop, watchers)
    problem: BaseException | None = None
    try:
        loop.run(start)
        if loop.finished and loop.failure is None and keeper is not None:
            loop.replay()
    except Exception as error:  # raised again below, when there is a report
        problem = error
        if keeper is not None:
            with contextlib.suppress(Exception):  # what a snapshot met meanwhile comes second
                keeper.wait()
    request = stop.request
    end = _COMPLETE if loop.finished else "interrupted" if request is None else request.reason
    first = loop.failure or problem  # what went wrong behind a stream that failed comes second
    line = loop.end_line(end if first is None else "failed", problem)
    promises.see(line)
    try:
        journal.append(line)
        journal.sync()
        outcome = _conclude(
            config, name, promises, line, None if loop.finished or request is None else request.exit_code
        )
    except OutputError:
        # A disk that is full may not take these two either, and the first error says more.
        if first is None:
            raise
        raise first from None
    if loop.failure is None and problem is not None:
        raise problem
    return outcome


def _conclude(config: SoakConfig, device_name: str, promises: Promises, last: Line, signal_code: int | None) -> Outcome:
    verdicts = promises.verdicts()
    report = write_report(config, verdicts, last, device_name)
    return Outcome(
        end=last["end"],
        blocks=last["block"],
        verdicts=verdicts,
        report=report,
        backend=last.get("backend"),
        backend_reason=last.get("backend_reason"),
        taken=last.get("taken"),
        failure=last["failure"],
        signal_code=signal_code,
    )
