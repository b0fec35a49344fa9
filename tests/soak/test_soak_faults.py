"""Faults under a soak: it ends with its report and its exit code, or goes on; the same command goes on from there.

``ECHO_RT_KILLS``: how often the one test that kills kills (3).
"""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import random
import select
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faults
import pytest
from faults import ILLEGAL, LOST, file_system_of, fill, nan_in
from lives import NO_READER, Lives
from soaking import PROMPTS, arguments, hashes, intervals, line_of, lines_of, soak_of, wait_until

import echo_rt.soak
from echo_rt.errors import NumericalError, OutputError, SnapshotError, TargetError
from echo_rt.snapshot.snapshot import Snapshot
from echo_rt.snapshot.store import SnapshotKeeper, snapshot_files
from echo_rt.soak import Outcome
from echo_rt.soak.checks import Status
from echo_rt.soak.journal import JOURNAL_FILE, Past, read_lines

KILLS = int(os.environ.get("ECHO_RT_KILLS", "3"))
FAR = 100_000  # blocks: nobody gets there


def broken(outcome: Outcome) -> list[str]:
    return [verdict.promise for verdict in outcome.verdicts if verdict.status is Status.BROKEN]


def broken_in(report: dict[str, Any]) -> list[str]:
    return [verdict["promise"] for verdict in report["promises"] if verdict["status"] == Status.BROKEN.value]


def promised(outcome: Outcome, name: str) -> Status:
    return next(verdict.status for verdict in outcome.verdicts if verdict.promise == name)


class Vanish:
    """Ends a process's blocks at ``block`` and leaves no snapshot: what is left is what a kill leaves."""

    def __init__(self, block: int) -> None:
        self.request: Any = None
        self.left = block

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        yield

    @contextmanager
    def after_block(self) -> Iterator[None]:
        self.left -= 1
        if self.left < 0:
            self.request = SimpleNamespace(exit_code=130, reason="interrupted")
            raise KeyboardInterrupt
        yield


# -------------------------------------------------------------------- late blocks and lost devices


# With a block begun ahead, block 6 is waited for by the snapshot that is taken when block 5 has been handed out; a
# device that tells at once that it is lost tells before that.
@pytest.mark.parametrize(
    ("fault", "lookahead", "block", "made"),
    [
        ("late", 0, 5, 5),
        ("late", 1, 6, 6),
        ("lost", 0, 5, 5),
        ("lost", 1, 6, 5),
        ("lost, told later", 0, 5, 5),
        ("lost, told later", 1, 6, 6),
    ],
)
def test_a_stream_that_fails_ends_the_soak_in_order(
    fault: str,
    lookahead: int,
    block: int,
    made: int,
    smallest_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = dict(blocks=9, snapshot_every=2, interval=3600.0, lookahead=lookahead, block_seconds=0.9 * faults.LATE)
    config = soak_of(smallest_model, tmp_path / "out", **given)
    with monkeypatch.context() as patch:
        faults.FAULTS[fault](patch, block)
        # Each snapshot waits for the one before, however slow the disk is: none is declined.
        patch.setattr(SnapshotKeeper, "busy", False)
        outcome = echo_rt.soak.run(config)
    words = f"StallError: block {block} " if fault == "late" else f"{LOST.__name__}: {ILLEGAL} (number 1)"
    assert (outcome.exit_code, outcome.end, outcome.blocks) == (4, "failed", made)
    assert outcome.failure is not None and outcome.failure.startswith(words) and broken(outcome) == ["stream"]
    assert f"The stream failed before block {made}: {outcome.failure}" in outcome.report.read_text()
    assert "After that" not in outcome.report.read_text(), "the device was asked again"
    newest = Snapshot.load(snapshot_files(config.folder / "snapshots")[0])
    assert newest.next_block == 4
    again = echo_rt.soak.run(config)
    assert (again.exit_code, again.end, again.blocks) == (3, "complete", 9) and broken(again) == ["stream"]
    assert promised(again, "hashes") is Status.KEPT


@pytest.mark.parametrize("fault", ["late", "lost"])
def test_the_command_says_so_and_goes_on(fault: str, lives: Lives, smallest_model: Path, tmp_path: Path) -> None:
    """In processes of their own, from the command line."""
    config = soak_of(smallest_model, tmp_path / "out", blocks=7, snapshot_every=2)
    command = arguments(config, "--block-seconds", str(0.9 * faults.LATE), "--json")
    failed = lives.begin(*command, fault=(fault, 5))
    assert failed.wait() == 4 and "Traceback" not in failed.err, failed.err
    words = "StallError: block 5 " if fault == "late" else f"{LOST.__name__}: {ILLEGAL} (number 1)"
    assert words in failed.err.splitlines()[-1] and json.loads(failed.out)["error"].startswith(words)
    assert words in (config.folder / "report.md").read_text()
    resumed = lives.begin(*command)
    assert resumed.wait() == 3 and json.loads(resumed.out)["end"] == "complete", resumed.err
    assert broken_in(json.loads(resumed.out)) == ["stream"]
    assert sorted(hashes(config.folder)) == list(range(7))


def test_the_stream_fails_and_the_disk_is_full(
    smallest_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What failed first is told, although the journal cannot be written any more."""
    with file_system_of(2 * 2**20, tmp_path / "disk") as disk:
        config = soak_of(smallest_model, disk / "out", blocks=9, interval=3600.0)
        full = SimpleNamespace(
            block_done=lambda block, *_: block == 3 and fill(disk), line_done=lambda line, verdicts: None
        )
        with monkeypatch.context() as patch:
            nan_in(patch, 4)
            with pytest.raises(NumericalError, match=r"block 4: latent: .*; no evidence: .*No space left on device"):
                echo_rt.soak.run(config, watchers=[full])
        (disk / "filler").unlink()
        assert not list(config.folder.glob("evidence/*"))
        assert echo_rt.soak.run(config).end == "complete"


def test_a_stopped_process_is_not_late(lives: Lives, smallest_model: Path, tmp_path: Path) -> None:
    """By SIGSTOP amid a block, for longer than a block may take."""
    config = soak_of(smallest_model, tmp_path / "out", blocks=7)
    life = lives.begin(*arguments(config, "--block-seconds", "4", "--json"), fault=("stopped", 5))
    state = Path(f"/proc/{life.pid}/stat")
    wait_until(lambda: state.read_text().rpartition(")")[2].split()[0] == "T", life)
    time.sleep(5)
    life.send_signal(signal.SIGCONT)
    assert life.wait() == 0, life.err
    assert max(line["latency"]["max"] for line in intervals(config.folder)) > 5000, "it was not stopped amid a block"


# -------------------------------------------------------------------- rollbacks


def test_a_rollback_in_a_soak(smallest_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block behind the last snapshot but one: what is made again at the end must not be of before it."""
    config = soak_of(smallest_model, tmp_path / "out", blocks=12, snapshot_every=4, roll_back=True)
    with monkeypatch.context() as patch:
        nan_in(patch, 9)
        outcome = echo_rt.soak.run(config)
    assert (outcome.exit_code, outcome.end, outcome.blocks) == (3, "complete", 12) and broken(outcome) == ["finite"]
    assert sorted(hashes(config.folder)) == list(range(12))
    assert intervals(config.folder)[-1]["rollbacks"] == 1
    assert "the stream went back 1 time |" in outcome.report.read_text()
    state, figures, before = sorted((config.folder / "evidence").iterdir(), reverse=True)
    assert Snapshot.load(before).block < 9
    assert json.loads(figures.read_text())["block"] == 9 and Snapshot.load(state).block == 9
    newest = Snapshot.load(snapshot_files(config.folder / "snapshots")[0])
    assert newest.next_block == 12 and newest.offset > 0 and newest.seed != config.seed


@pytest.mark.parametrize(("lookahead", "life"), [(0, 1), (1, 1), (0, 2)])
def test_killed_and_rolled_back(
    lookahead: int, life: int, smallest_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks behind a rollback are made another way by the process that has none; that breaks no promise of its own."""
    config = soak_of(
        smallest_model,
        tmp_path / "out",
        blocks=11,
        snapshot_every=3,
        roll_back=True,
        lookahead=lookahead,
        interval=1e-3,
    )
    evidence = config.folder / "evidence"
    for number in (1, 2):
        with monkeypatch.context() as patch:
            if number == life:
                nan_in(patch, 7)
            outcome = echo_rt.soak.run(config, stop=Vanish(9) if number == 1 else None)
        if number == 1:
            first = hashes(config.folder)
            for file in snapshot_files(config.folder / "snapshots"):
                if Snapshot.load(file).next_block > 6:
                    file.unlink()  # a kill before it was written
            evidence.mkdir(exist_ok=True)
            (evidence / ".block-00000007.json.0123abcd.part").write_text("{")  # a kill amid it
    assert (outcome.exit_code, outcome.end) == (3, "complete") and broken(outcome) == ["finite"]
    lines = list(read_lines(config.folder))
    second = {block: made for line in lines if line["run"] == 2 and "blocks" in line for block, made in line["hashes"]}
    assert second[6] == first[6] and second[8] != first[8], "there is nothing to tell apart"
    assert sum(line["compared"] for line in lines) >= 1
    names = [f"block-00000007{kind}" for kind in ("-before.safetensors", ".json", ".safetensors")]
    assert sorted(file.name for file in evidence.iterdir()) == names


def test_which_hashes_can_come_again(tmp_path: Path) -> None:
    def line(run: int, first: int, last: int, rollbacks: int) -> dict[str, Any]:
        made = [[block, f"{run}:{block}"] for block in range(first, last + 1)]
        return line_of(first, last, run, rollbacks=rollbacks, hashes=made)

    lines = [line(1, 0, 4, 0), line(1, 5, 9, 0), line(2, 5, 6, 0), line(2, 7, 8, 1), line(2, 9, 9, 1)]
    (tmp_path / JOURNAL_FILE).write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    # From a snapshot of before the rollback: neither its own video's hashes nor those that it replaced.
    assert Past(tmp_path, 5).hashes == {5: "2:5", 6: "2:6"}
    # From one behind it: the video has the new noise.
    assert Past(tmp_path, 9).hashes == {9: "2:9"}


def test_kills_of_a_soak_that_rolls_back(lives: Lives, smallest_model: Path, tmp_path: Path) -> None:
    """Nothing is ever unreadable: snapshots, journal, evidence; and nothing piles up."""
    config = soak_of(
        smallest_model, tmp_path / "out", blocks=FAR, snapshot_every=3, keep=2, interval=0.05, roll_back=True
    )
    command = arguments(config, "--roll-back")
    journal, dice = config.folder / JOURNAL_FILE, random.Random(KILLS)
    for kill in range(KILLS + 1):
        lines = lines_of(journal) + dice.randint(1, 12)
        # Of seven blocks one is not finite, whichever process makes them.
        life = lives.begin(*command, fault=("nans", 7))
        wait_until(lambda lines=lines: lines_of(journal) >= lines, life)
        if kill == KILLS:
            wait_until(lambda: any(line.get("rollbacks") for line in read_lines(config.folder)), life)
        life.send_signal(signal.SIGKILL if kill < KILLS else signal.SIGINT)
        assert life.wait() == (-signal.SIGKILL if kill < KILLS else 3), life.err
        for file in snapshot_files(config.folder / "snapshots"):
            Snapshot.load(file)
        for file in (config.folder / "evidence").glob("block-*.json"):
            told = json.loads(file.read_text())["states"]
            assert file.with_suffix(".safetensors").name in told
            for name, block in told.items():
                kept = Snapshot.load(file.with_name(name))
                assert kept.block + kept.offset == block
    lines = list(read_lines(config.folder))
    assert sorted(hashes(config.folder)) == list(range(len(hashes(config.folder))))
    assert not [line["mismatches"] for line in lines if line["mismatches"]]
    assert {line["run"] for line in lines} == set(range(1, KILLS + 2)) and lines[-1]["end"] == "interrupted"
    assert max(line.get("rollbacks", 0) for line in lines) > 0
    assert not list(config.folder.rglob("*.part")), "what killed processes left"


# -------------------------------------------------------------------- disks, files, clocks


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with file_system_of(2 * 2**20, tmp_path / "disk") as folder:
        yield folder


@pytest.mark.parametrize("leave", [0, 20_000])
def test_a_disk_that_fills_up(leave: int, disk: Path, smallest_model: Path) -> None:
    """``leave`` 0: nothing fits but a line that the journal's last page has room for; 20,000: a snapshot does not."""
    config = soak_of(smallest_model, disk / "out", blocks=12, snapshot_every=3, prompts=PROMPTS, switch_every=4)

    def block_done(block: int, *_: object) -> None:
        if block == 6:
            while len(snapshot_files(config.folder / "snapshots")) < 2:  # a thread of its own writes them
                time.sleep(0.01)
            fill(disk, leave)

    full = SimpleNamespace(block_done=block_done, line_done=lambda *_: None)
    with pytest.raises(OutputError, match="No space left on device"):
        echo_rt.soak.run(config, watchers=[full])
    (disk / "filler").unlink()
    lines = list(read_lines(config.folder))
    assert (config.folder / "report.md").exists() == (leave > 0)
    assert "end" in lines[-1] or not leave
    assert [Snapshot.load(file).next_block for file in snapshot_files(config.folder / "snapshots")] == [6, 3]
    assert not list(config.folder.rglob("*.part"))
    again = echo_rt.soak.run(config)
    assert (again.end, again.exit_code) == ("complete", 0)


@pytest.mark.filterwarnings("default::RuntimeWarning")
def test_a_snapshot_is_damaged_between_two_lives(smallest_model: Path, tmp_path: Path) -> None:
    config = soak_of(smallest_model, tmp_path / "out", blocks=9, snapshot_every=2)
    assert echo_rt.soak.run(config, stop=Vanish(7)).blocks == 7
    newest, older, *_ = snapshot_files(config.folder / "snapshots")
    before = Snapshot.load(older).next_block
    assert before < Snapshot.load(newest).next_block
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    with pytest.warns(RuntimeWarning, match=f"passed over: {newest}: the snapshot is damaged"):
        outcome = echo_rt.soak.run(config)
    assert (outcome.end, outcome.exit_code) == ("complete", 0) and promised(outcome, "hashes") is Status.KEPT
    assert next(line["first_block"] for line in intervals(config.folder) if line["run"] == 2) == before


@pytest.mark.filterwarnings("default::RuntimeWarning")
def test_all_snapshots_are_damaged(smallest_model: Path, tmp_path: Path) -> None:
    config = soak_of(smallest_model, tmp_path / "out", blocks=5, snapshot_every=2)
    assert echo_rt.soak.run(config, stop=Vanish(4)).blocks == 4
    for file in snapshot_files(config.folder / "snapshots"):
        file.write_bytes(file.read_bytes()[:-1])
    before = {file: file.read_bytes() for file in config.folder.rglob("*") if file.is_file()}
    with pytest.warns(RuntimeWarning, match="passed over"), pytest.raises(SnapshotError, match="damaged ones") as error:
        echo_rt.soak.run(config)
    assert error.value.exit_code == 2
    assert {file: file.read_bytes() for file in config.folder.rglob("*") if file.is_file()} == before
    shutil.rmtree(config.folder / "snapshots")
    outcome = echo_rt.soak.run(config)
    assert (outcome.end, outcome.exit_code) == ("complete", 0)
    assert sum(line["compared"] for line in read_lines(config.folder)) >= 4


def test_a_clock_that_goes_back(smallest_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour at every look: intervals, hours and the report go by another clock."""
    config = soak_of(smallest_model, tmp_path / "out", blocks=9, snapshot_every=2, interval=0.01)
    now = [2e9]

    def earlier() -> float:
        now[0] -= 3600
        return now[0]

    with monkeypatch.context() as patch:
        patch.setattr(time, "time", earlier)
        assert echo_rt.soak.run(config, stop=Vanish(5)).blocks == 5
        outcome = echo_rt.soak.run(config)
    assert (outcome.end, outcome.exit_code) == ("complete", 0)
    lines = list(read_lines(config.folder))
    times, elapsed = ([line[name] for line in lines] for name in ("time", "elapsed"))
    assert times == sorted(times, reverse=True), "the clock did not go back"
    for run in (1, 2):
        seen = [line["elapsed"] for line in lines if line["run"] == run]
        assert seen == sorted(seen) and seen[-1] < 600
    assert len(elapsed) == len(lines) and all(line["fps"] > 0 for line in intervals(config.folder))


def test_a_snapshot_of_another_seed_is_refused(smallest_model: Path, tmp_path: Path) -> None:
    config = soak_of(smallest_model, tmp_path / "out", blocks=2, snapshot_every=2)
    echo_rt.soak.run(config)
    (file,) = snapshot_files(config.folder / "snapshots")
    dataclasses.replace(Snapshot.load(file), seed=5).save(file)
    with pytest.raises(SnapshotError, match=f"{file}: expected a snapshot of the video with seed 0, found one of 5"):
        echo_rt.soak.run(dataclasses.replace(config, blocks=4))


# -------------------------------------------------------------------- whoever is at the other end


def test_the_terminal_is_closed(lives: Lives, smallest_model: Path, tmp_path: Path) -> None:
    """And before that, another process wants the same folder."""
    config = soak_of(smallest_model, tmp_path / "out", blocks=FAR, snapshot_every=1000, interval=0.05)
    loud = [part for part in arguments(config) if part != "--quiet"]
    master, terminal = pty.openpty()
    life = lives.begin(*loud, terminal=os.ttyname(terminal))
    shown = b""
    while b"frames" not in shown:  # the panel's figures
        ready, _, _ = select.select([master], [], [], 0.1)
        assert life.poll() is None
        shown += os.read(master, 4096) if ready else b""
    os.close(terminal)
    before = (config.folder / JOURNAL_FILE).read_bytes()
    with pytest.raises(TargetError, match="out: cannot be written into: another process writes into it"):
        echo_rt.soak.run(config)
    os.close(master)
    assert life.wait() == 128 + signal.SIGHUP
    assert (config.folder / JOURNAL_FILE).read_bytes().startswith(before)
    *_, last = read_lines(config.folder)
    (snapshot,) = snapshot_files(config.folder / "snapshots")
    assert last["end"] == "terminated" and Snapshot.load(snapshot).next_block == last["block"]
    assert f"terminated after {last['block']} blocks" in (config.folder / "report.md").read_text()


def test_nobody_reads_what_it_prints(lives: Lives, smallest_model: Path, tmp_path: Path) -> None:
    """Neither the result nor the progress: both pipes have no reader any more."""
    config = soak_of(smallest_model, tmp_path / "out", blocks=3)
    loud = [part for part in arguments(config, "--json") if part != "--quiet"]
    assert lives.begin(*loud, output=NO_READER).wait() == 1, "nobody was told, so it is no success"
    *_, last = read_lines(config.folder)
    assert last["end"] == "complete" and "complete after 3 blocks" in (config.folder / "report.md").read_text()
