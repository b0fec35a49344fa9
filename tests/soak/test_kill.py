"""kill -9 at random moments: every life picks up, and the video is that of one that was never killed."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
from lives import Lives
from soaking import LONG, PROMPTS, arguments, hashes, intervals, lines_of, soak_of, wait_until

import echo_rt.soak
from echo_rt.snapshot.snapshot import Snapshot
from echo_rt.snapshot.store import snapshot_files
from echo_rt.soak.checks import Status
from echo_rt.soak.journal import JOURNAL_FILE, read_lines

FAR = 100_000  # blocks: no life gets there


def live_and_die(lives: Lives, command: list[str], journal: Path, moments: random.Random) -> None:
    """Start it and kill it: one in five anywhere in its start, the others somewhere in or between its blocks."""
    before = lines_of(journal)
    life = lives.begin(*command)
    if started := moments.random() >= 0.2:
        lines = before + moments.randint(1, 8)
        wait_until(lambda: lines_of(journal) >= lines, life)
    # Wherever that falls will do: into the start, into a block or between two.
    time.sleep(moments.uniform(0.0, 0.1 if started else 0.5))
    assert life.poll() is None, f"ended by itself with {life.poll()}"
    lives.kill()
    assert life.wait() == -signal.SIGKILL


def compared(folder: Path) -> int:
    """How many blocks were made twice."""
    return sum(line["compared"] for line in read_lines(folder))


def beyond_snapshots(folder: Path) -> bool:
    """Whether there are blocks in the journal that the newest snapshot does not have."""
    newest = next((Snapshot.load(file).next_block for file in snapshot_files(folder / "snapshots")), 0)
    return max(hashes(folder), default=-1) >= newest


@pytest.mark.slow
@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=LONG)])
def test_kills_at_random_moments(kills: int, lives: Lives, smallest_model: Path, tmp_path: Path) -> None:
    # Lines come quicker than snapshots, so that a life has blocks to make again and to compare.
    video = dict(prompts=PROMPTS, switch_every=7, interval=0.05)
    broken = soak_of(smallest_model, tmp_path / "broken", blocks=FAR, snapshot_every=5, keep=2, **video)
    command, journal, moments = arguments(broken), broken.folder / JOURNAL_FILE, random.Random(kills)
    left = kills
    # The last of them leaves blocks that no snapshot has: they are made again, and compared.
    while left > 0 or not beyond_snapshots(broken.folder):
        left -= 1
        live_and_die(lives, command, journal, moments)
        for file in snapshot_files(broken.folder / "snapshots"):
            Snapshot.load(file)  # whole, every one of them
    before = lines_of(journal)
    life = lives.begin(*command)

    def enough() -> bool:
        runs = {line["run"] for line in intervals(broken.folder)}
        begun = lines_of(journal) > before  # and so a signal is answered
        return begun and len(runs) > 1 and len(hashes(broken.folder)) > 10 and compared(broken.folder) > 0

    wait_until(enough, life)
    life.send_signal(signal.SIGINT)
    assert life.wait() == 130, life.err

    made = hashes(broken.folder)
    blocks = len(made)
    assert sorted(made) == list(range(blocks)) and blocks > 10
    whole = soak_of(smallest_model, tmp_path / "whole", blocks=blocks, **video)
    outcome = echo_rt.soak.run(whole)
    assert outcome.exit_code == 0
    assert hashes(whole.folder) == made
    lines = list(read_lines(broken.folder))
    assert all(not line["mismatches"] for line in lines)
    runs = {line["run"] for line in intervals(broken.folder)}
    print(f"{kills} kills, {len(runs)} lives that made blocks, {blocks} blocks, {compared(broken.folder)} made twice")
    assert "BROKEN" not in life.err and Status.BROKEN.value not in (broken.folder / "report.md").read_text()
