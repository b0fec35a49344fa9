"""kill -9 at random moments: every life picks up, and the video is that of one that was never killed."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from soaking import LONG, PROMPTS, command_of, hashes, intervals, soak_of

import echo_rt.soak
from echo_rt.snapshot.snapshot import Snapshot
from echo_rt.snapshot.store import snapshot_files
from echo_rt.soak.journal import JOURNAL_FILE, read_lines
from echo_rt.soak.outcome import Status

FAR = 100_000  # blocks: no life gets there


def live_and_die(command: list[str], journal: Path, moments: random.Random) -> None:
    """Start it and kill it: one in five anywhere in its start, the others somewhere in or between its blocks."""
    before = journal.stat().st_size if journal.exists() else 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        if moments.random() < 0.2:
            time.sleep(moments.uniform(0.0, 3.0))
        else:
            wait_for_lines(journal, before, process)
            time.sleep(moments.uniform(0.0, 0.6))
        assert process.poll() is None, f"ended by itself with {process.returncode}"
    finally:
        process.kill()
        process.wait()


def wait_for_lines(journal: Path, before: int, process: subprocess.Popen[Any]) -> None:
    """Until the journal is longer than it was, and so blocks are being made."""
    deadline = time.monotonic() + 60
    while not journal.exists() or journal.stat().st_size <= before:
        assert process.poll() is None and time.monotonic() < deadline, "no line was written"
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=LONG)])
def test_kills_at_random_moments(kills: int, smallest_model: Path, tmp_path: Path) -> None:
    # Lines come quicker than snapshots, so that a life has blocks to make again and to compare.
    video = dict(prompts=PROMPTS, switch_every=7, interval=0.05)
    broken = soak_of(smallest_model, tmp_path / "broken", blocks=FAR, snapshot_every=5, keep=2, **video)
    command, journal, moments = command_of(broken), broken.folder / JOURNAL_FILE, random.Random(kills)
    for _ in range(kills):
        live_and_die(command, journal, moments)
        for file in snapshot_files(broken.folder / "snapshots"):
            Snapshot.load(file)  # whole, every one of them
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for_lines(journal, journal.stat().st_size, process)
    process.send_signal(signal.SIGINT)
    complaints = process.communicate(timeout=60)[1]
    assert process.returncode == 130, complaints

    made = hashes(broken.folder)
    blocks = len(made)
    assert sorted(made) == list(range(blocks)) and blocks > 10
    whole = soak_of(smallest_model, tmp_path / "whole", blocks=blocks, **video)
    outcome = echo_rt.soak.run(whole)
    assert outcome.exit_code == 0
    assert hashes(whole.folder) == made
    lines = list(read_lines(broken.folder))
    assert all(not line["mismatches"] for line in lines)
    lives = {line["run"] for line in intervals(broken.folder)}
    compared = sum(line["compared"] for line in lines)
    print(f"{kills} kills, {len(lives)} lives that made blocks, {blocks} blocks, {compared} made twice")
    assert len(lives) > 1 and compared > 0
    assert "BROKEN" not in complaints and Status.BROKEN.value not in (broken.folder / "report.md").read_text()
