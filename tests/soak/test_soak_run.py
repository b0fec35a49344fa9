"""Soaks of the smallest model: ends of every kind, and what is left behind."""

from __future__ import annotations

import json
import socket
import sys
import urllib.request
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from soaking import PROMPTS, hashes, intervals, soak_of

import echo_rt.soak
import echo_rt.soak.session
from echo_rt.chunk import Chunk
from echo_rt.engine.pipeline import Pipeline
from echo_rt.engine.scheduler import Blocks
from echo_rt.errors import (
    BackendError,
    ConfigError,
    NumericalError,
    OutputError,
    PromptError,
    TargetError,
    WeightsError,
)
from echo_rt.snapshot.snapshot import Snapshot
from echo_rt.soak import Outcome
from echo_rt.soak.checks import Status
from echo_rt.soak.journal import JOURNAL_FILE, read_lines
from echo_rt.stream import Stream
from echo_rt.utils.atomic_file import Log
from echo_rt.utils.folder_lock import FolderClaim


def status(outcome: Outcome) -> dict[str, Status]:
    return {verdict.promise: verdict.status for verdict in outcome.verdicts}


class StopAt:
    """A signal that comes while a block is made."""

    def __init__(self, block: int) -> None:
        self.request: Any = None
        self.block = block

    def block_done(self, block: int, frames: int, seconds: float) -> None:
        if block >= self.block:
            self.request = SimpleNamespace(exit_code=143, reason="terminated")

    def line_done(self, line: object, verdicts: object) -> None: ...

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        yield

    after_block = interruptible


def fail_at(monkeypatch: pytest.MonkeyPatch, block: int, error: Exception) -> None:
    """The stream raises instead of handing out ``block``."""
    real = Stream.__next__

    def broken(stream: Stream) -> Chunk:
        if stream.next_block >= block:
            raise error
        return real(stream)

    monkeypatch.setattr(Stream, "__next__", broken)


def test_a_line_has_every_figure(smallest_model: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    watcher = SimpleNamespace(block_done=lambda block, frames, seconds: seen.append(block), line_done=lambda *_: None)
    config = soak_of(smallest_model, tmp_path / "out", blocks=14, interval=3600.0, hash_every=5, prompts=PROMPTS[:1])
    outcome = echo_rt.soak.run(config, watchers=[watcher])
    assert (outcome.exit_code, outcome.end, outcome.blocks, seen) == (0, "complete", 14, list(range(14)))
    line, end = read_lines(tmp_path / "out")
    assert (line["first_block"], line["block"], line["blocks"], line["frame"]) == (0, 13, 14, 9 + 13 * 12)
    assert line["video_seconds"] == pytest.approx(line["frame"] / 16, abs=1e-3)
    assert line["fps"] > 0 and line["elapsed"] > 0 and line["latency"]["max"] > 0 and line["warm"] is False
    assert sum(line["latency"]["bins"].values()) == 14 - 11 + 1 and line["latency"]["p50"] <= line["latency"]["p99"]
    position = line["position"]
    assert (position["least_newest_id"], position["newest_id"], position["misplaced"]) == (2, 20, [])
    assert position["shift"] == 14 * 3 - 1 - 20
    assert line["memory_state"]["norm"] > 0 and 0 < line["memory_state"]["gate_mean"] < 1
    assert line["memory_state"]["attended"] is True and line["latents"]["std"] > 0
    assert -5 < line["video"]["min"] < line["video"]["max"] < 5
    assert line["nonfinite"] == {"latent": 0, "video": 0, "block": None}
    assert [block for block, _ in line["hashes"]] == [0, 5, 10] and len(line["hashes"][0][1]) == 32
    assert line["device"] is None and line["gpu"] is None and line["host"]["rss"] > 2**20
    assert end["end"] == "complete" and end["failure"] is None
    assert (outcome.backend, outcome.backend_reason) == (end["backend"], end["backend_reason"])
    report = outcome.report.read_text()
    assert "**kept**" in report and f"CPU, backend torch ({outcome.backend_reason})." in report


def test_a_soak_that_is_done_is_only_reported_again(smallest_model: Path, tmp_path: Path) -> None:
    config = soak_of(smallest_model, tmp_path / "out", blocks=3)
    first = echo_rt.soak.run(config)
    journal = (tmp_path / "out" / JOURNAL_FILE).read_bytes()
    first.report.unlink()
    left = tmp_path / "out" / ".report.md.0123abcd.part"  # as a kill does
    left.write_text("# So")
    again = echo_rt.soak.run(config)
    assert again == first and again.report.exists() and not left.exists()
    assert (tmp_path / "out" / JOURNAL_FILE).read_bytes() == journal


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_a_stop_keeps_all_that_was_made(lookahead: int, smallest_model: Path, tmp_path: Path) -> None:
    config = soak_of(
        smallest_model,
        tmp_path / "out",
        blocks=20,
        snapshot_every=100,
        prompts=PROMPTS,
        switch_every=3,
        interval=3600.0,
        lookahead=lookahead,
    )
    stop = StopAt(8)  # and so a switch comes right after the resume
    outcome = echo_rt.soak.run(config, stop=stop, watchers=[stop])
    assert (outcome.exit_code, outcome.end, outcome.blocks) == (143, "terminated", 9)
    outcome = echo_rt.soak.run(config)
    assert (outcome.exit_code, outcome.end, outcome.blocks) == (0, "complete", 20)
    first, second = intervals(tmp_path / "out")
    assert (first["block"], second["first_block"], second["run"]) == (8, 9, 2)
    assert second["elapsed"] > first["elapsed"] and second["frame"] == 9 + 19 * 12
    whole = soak_of(smallest_model, tmp_path / "whole", blocks=20, prompts=PROMPTS, switch_every=3)
    echo_rt.soak.run(whole)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_a_second_request_ends_it_amid_a_block(smallest_model: Path, tmp_path: Path) -> None:
    class Twice(StopAt):
        @contextmanager
        def after_block(self) -> Iterator[None]:
            if self.blocks == 5:
                self.request = SimpleNamespace(exit_code=130, reason="interrupted")
                raise KeyboardInterrupt
            self.blocks += 1
            yield

    stop = Twice(1000)
    stop.blocks = 0  # type: ignore[attr-defined]
    config = soak_of(smallest_model, tmp_path / "out", blocks=9, snapshot_every=2)
    outcome = echo_rt.soak.run(config, stop=stop)
    assert (outcome.exit_code, outcome.end, outcome.blocks) == (130, "interrupted", 5)
    assert echo_rt.soak.run(config).exit_code == 0


def test_a_snapshot_is_seen_to_stall(smallest_model: Path, tmp_path: Path) -> None:
    echo_rt.soak.run(soak_of(smallest_model, tmp_path / "out", blocks=6, snapshot_every=2, interval=3600.0))
    stalls = [line["snapshots"]["stall"] for line in intervals(tmp_path / "out")]
    seen = [stall for stall in stalls if stall is not None]  # one that is still being written is not
    assert stalls[0] is None and seen and all(stall > 0 for stall in seen)


def test_the_snapshot_it_goes_on_from_is_let_go(
    smallest_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is as large as the state itself, on the host, and the run that begins with it may take a day."""
    config = soak_of(smallest_model, tmp_path / "out", blocks=8, snapshot_every=3)
    stop = StopAt(4)
    echo_rt.soak.run(config, stop=stop, watchers=[stop])
    found: list[weakref.ref[Any]] = []
    held: list[int] = []
    latest = echo_rt.soak.session.latest_snapshot

    def noted(folder: Path) -> tuple[Path, Snapshot] | None:
        newest = latest(folder)
        assert newest is not None
        largest = max(newest[1].tensors.values(), key=lambda tensor: tensor.nbytes)
        found.extend(weakref.ref(each) for each in (newest[1], largest))
        return newest

    class Look:
        def block_done(self, block: int, frames: int, seconds: float) -> None:
            held.append(sum(each() is not None for each in found))

        def line_done(self, line: object, verdicts: object) -> None: ...

    monkeypatch.setattr(echo_rt.soak.session, "latest_snapshot", noted)
    assert echo_rt.soak.run(config, watchers=[Look()]).exit_code == 0
    assert len(found) == 2 and held == [0] * (8 - 5)


def test_without_snapshots_it_begins_again_and_compares(smallest_model: Path, tmp_path: Path) -> None:
    config = soak_of(smallest_model, tmp_path / "out", blocks=8)
    stop = StopAt(4)
    echo_rt.soak.run(config, stop=stop, watchers=[stop])
    outcome = echo_rt.soak.run(config)
    assert status(outcome)["hashes"] is Status.KEPT
    assert sum(line["compared"] for line in read_lines(tmp_path / "out")) == 5


def test_another_hash_is_a_broken_promise_for_good(smallest_model: Path, tmp_path: Path) -> None:
    config = soak_of(smallest_model, tmp_path / "out", blocks=8)
    stop = StopAt(4)
    echo_rt.soak.run(config, stop=stop, watchers=[stop])
    path = tmp_path / "out" / JOURNAL_FILE
    made = hashes(tmp_path / "out")[3]
    path.write_text(path.read_text().replace(made, "0" * 32))
    for _ in range(2):
        outcome = echo_rt.soak.run(config)
        assert outcome.exit_code == 3 and outcome.end == "complete"
        assert f"hashes: block 3: expected {'0' * 32}, found {made}" in outcome.summary


def test_the_end_is_made_again_from_a_snapshot(
    smallest_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = soak_of(smallest_model, tmp_path / "out", blocks=9, snapshot_every=4, prompts=PROMPTS, switch_every=2)
    assert status(echo_rt.soak.run(config))["hashes"] is Status.KEPT
    # A restore that forgets something shows, in a video that nothing ever interrupted.
    restore = Blocks.restore

    def forgetful(self: Blocks, engine: Any, snapshot: Any) -> None:
        restore(self, engine, snapshot)
        engine.rollout.state.kv.zero_()

    monkeypatch.setattr(Blocks, "restore", forgetful)
    outcome = echo_rt.soak.run(soak_of(smallest_model, tmp_path / "forgetful", blocks=9, snapshot_every=4))
    assert outcome.exit_code == 3 and status(outcome)["hashes"] is Status.BROKEN


@pytest.mark.parametrize(
    ("error", "broken"),
    [(NumericalError("block 5: 7 of 48 values"), ["stream", "finite"]), (RuntimeError("CUDA error: x"), ["stream"])],
)
def test_a_stream_that_fails_is_reported(
    error: Exception, broken: list[str], smallest_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = soak_of(smallest_model, tmp_path / "out", blocks=9, snapshot_every=2, interval=3600.0)
    with monkeypatch.context() as patch:
        fail_at(patch, 5, error)
        outcome = echo_rt.soak.run(config)
    assert (outcome.exit_code, outcome.end, outcome.blocks) == (4, "failed", 5)
    assert outcome.failure == f"{type(error).__name__}: {error}"
    assert [name for name, value in status(outcome).items() if value is Status.BROKEN] == broken
    assert f"The stream failed before block 5: {outcome.failure}" in outcome.report.read_text()
    assert intervals(tmp_path / "out")[-1]["block"] == 4  # what was made is in the journal
    again = echo_rt.soak.run(config)  # goes on, and does not forget
    assert (again.end, again.blocks, again.exit_code) == ("complete", 9, 3)


@pytest.mark.parametrize("roll_back", [False, True])
def test_a_block_that_is_not_finite(
    roll_back: bool, smallest_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, spoilt = Pipeline.finish, [0]

    def finish(pipeline: Pipeline, seconds: float | None = None) -> Chunk | None:
        made = real(pipeline, seconds)
        if made is None or made.index != 12 or spoilt[0]:
            return made
        spoilt[0] += 1
        vitals = replace(made.stats.vitals, latent_nonfinite=7)
        return replace(made, stats=replace(made.stats, vitals=vitals))

    monkeypatch.setattr(Pipeline, "finish", finish)
    config = soak_of(smallest_model, tmp_path / "out", blocks=20, roll_back=roll_back, interval=3600.0)
    outcome = echo_rt.soak.run(config)
    broken = [name for name, value in status(outcome).items() if value is Status.BROKEN]
    if roll_back:
        assert (outcome.exit_code, outcome.end, outcome.blocks) == (3, "complete", 20) and broken == ["finite"]
    else:
        assert (outcome.exit_code, outcome.end, outcome.blocks) == (4, "failed", 12) and broken == ["stream", "finite"]
    assert sorted(hashes(tmp_path / "out")) == list(range(outcome.blocks))
    kinds = {".json", ".safetensors"} | ({"-before.safetensors"} if roll_back else set())
    names = {file.name for file in (tmp_path / "out" / "evidence").iterdir()}
    assert names == {f"block-00000012{kind}" for kind in kinds}


def test_a_full_disk_ends_it_readable(smallest_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = soak_of(smallest_model, tmp_path / "out", blocks=12, snapshot_every=3)
    real, written = Log.append, [0]

    def full(journal: Log, line: bytes) -> None:
        written[0] += 1
        if written[0] > 2:
            raise OutputError(f"{journal.path}: cannot write: No space left on device")
        real(journal, line)

    with monkeypatch.context() as patch:
        patch.setattr(Log, "append", full)
        with pytest.raises(OutputError, match="No space left on device"):
            echo_rt.soak.run(config)
    assert len(list(read_lines(tmp_path / "out"))) == 2
    assert echo_rt.soak.run(config).exit_code == 0


def test_refusals_come_before_the_model(smallest_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with pytest.raises(WeightsError):
        echo_rt.soak.run(soak_of(tmp_path / "mistyped", out, blocks=3))
    with pytest.raises(PromptError, match="at most"):
        echo_rt.soak.run(soak_of(smallest_model, out, blocks=3, prompts=("fox " * 10**5,)))
    assert not out.exists()
    assert echo_rt.soak.run(soak_of(smallest_model, out, blocks=3)).exit_code == 0  # the mistake binds nobody
    monkeypatch.setattr("echo_rt.soak.session.Runtime", None)
    with pytest.raises(ConfigError, match="another soak, name another --out: seed was 0 and is 1"):
        echo_rt.soak.run(soak_of(smallest_model, out, blocks=3, seed=1))
    claim = FolderClaim(out)
    with pytest.raises(TargetError, match="another process"):
        echo_rt.soak.run(soak_of(smallest_model, out, blocks=3))
    claim.release()
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(BackendError, match="prometheus-client"):
        echo_rt.soak.run(soak_of(smallest_model, tmp_path / "served", blocks=3, serve=("127.0.0.1", 0)))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BackendError, match="matplotlib"):
        echo_rt.soak.run(soak_of(smallest_model, tmp_path / "drawn", blocks=3, plots=True))
    assert not (tmp_path / "drawn").exists()


@pytest.mark.parametrize("killed", [False, True])
def test_a_finished_soak_is_extended(
    killed: bool, smallest_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the process that was to extend it has only got as far as to say so."""
    out, unbroken = tmp_path / "out", tmp_path / "unbroken"
    settings = {"snapshot_every": 4, "prompts": PROMPTS, "switch_every": 3}
    assert echo_rt.soak.run(soak_of(smallest_model, out, blocks=6, **settings)).end == "complete"
    longer = soak_of(smallest_model, out, blocks=11, **settings)
    if killed:
        with monkeypatch.context() as patch:
            patch.setattr("echo_rt.soak.session.gpu_health", lambda *_: pytest.exit("killed"))
            with pytest.raises(pytest.exit.Exception):
                echo_rt.soak.run(longer)
    outcome = echo_rt.soak.run(longer)
    assert (outcome.end, outcome.blocks, outcome.exit_code) == ("complete", 11, 0)
    assert intervals(out)[-1]["run"] == 2 and any(line.get("compared") for line in intervals(out))
    echo_rt.soak.run(soak_of(smallest_model, unbroken, blocks=11, **settings))
    assert hashes(out) == hashes(unbroken)
    monkeypatch.setattr("echo_rt.soak.session.Runtime", None)
    assert echo_rt.soak.run(longer).blocks == 11  # reported again, and nothing made


def test_hours(smallest_model: Path, tmp_path: Path) -> None:
    outcome = echo_rt.soak.run(soak_of(smallest_model, tmp_path / "out", blocks=None, hours=0.5 / 3600))
    end = list(read_lines(tmp_path / "out"))[-1]
    assert outcome.end == "complete" and end["elapsed"] >= 0.5


def test_figures_are_served_while_it_runs(smallest_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served: list[str] = []

    def fetch(line: dict[str, Any], verdicts: object) -> None:
        # The line before: the exporter is told of this one after the others.
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            served.append(answer.read().decode())

    watcher = SimpleNamespace(block_done=lambda *_: None, line_done=fetch)
    config = soak_of(
        smallest_model, tmp_path / "out", blocks=6, snapshot_every=2, interval=60.0, serve=("127.0.0.1", port)
    )
    echo_rt.soak.run(config, watchers=[watcher])
    assert len(served) == 3 and "echo_rt_soak_latency_max" not in served[0]
    assert "echo_rt_soak_block 3.0" in served[2] and 'promise="finite"} 1.0' in served[2]
    assert "echo_rt_soak_current_block 5.0" in served[2]
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics")


def test_lines_are_json_that_everyone_reads(smallest_model: Path, tmp_path: Path) -> None:
    echo_rt.soak.run(soak_of(smallest_model, tmp_path / "out", blocks=2))

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    for text in (tmp_path / "out" / JOURNAL_FILE).read_text().splitlines():
        json.loads(text, parse_constant=refuse)


def test_the_report_names_the_recipe(smallest_model: Path, tmp_path: Path) -> None:
    outcome = echo_rt.soak.run(soak_of(smallest_model, tmp_path / "out", blocks=1, recipe="echo-infinity-short"))
    assert "\nRecipe echo-infinity-short (asked for by name).\n" in outcome.report.read_text()


@pytest.mark.parametrize("found", ["recording.json", "snapshots/block-0000000004.safetensors", "soak.jsonl"])
def test_what_is_not_a_soaks_is_left_alone(found: str, smallest_model: Path, tmp_path: Path) -> None:
    (tmp_path / "snapshots").mkdir()
    (tmp_path / found).write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=f"expected a folder of the soak's own, found {found} and no soak.json"):
        echo_rt.soak.run(soak_of(smallest_model, tmp_path, blocks=2))
    assert sorted(tmp_path.rglob("*")) == before
