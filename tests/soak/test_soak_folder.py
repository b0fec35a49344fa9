"""The soak's folder: moved, removed, full, with links and special files in it. Its soak ends in order, or goes on."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from faults import file_system_of, nan_in
from lives import Lives
from soaking import arguments, hashes, intervals, lines_of, soak_of, wait_until

import echo_rt.soak
from echo_rt.errors import ConfigError, EchoError
from echo_rt.snapshot.store import snapshot_files
from echo_rt.soak import SoakConfig
from echo_rt.soak.journal import JOURNAL_FILE, read_lines


def at(block: int, act: Callable[[], Any]) -> Any:
    """A watcher that does ``act`` once ``block`` is there."""
    return SimpleNamespace(block_done=lambda found, *_: found == block and act(), line_done=lambda *_: None)


def refused(config: SoakConfig, code: int, words: str, *watchers: Any) -> None:
    """The soak ends with an error of this exit code, and nothing that nobody awaited."""
    with pytest.raises(EchoError, match=words) as error:
        echo_rt.soak.run(config, watchers=watchers)
    assert error.value.exit_code == code, error.value


def report_of(folder: Path, *blocks: int) -> str:
    """The report, which says that the soak failed after one of these numbers of ``blocks``."""
    text = (folder / "report.md").read_text()
    assert any(f"failed after {n} blocks" in text and f"made: {n} blocks" in text for n in blocks)
    return text


# -------------------------------------------------------------------- moved and removed


def test_a_folder_that_is_moved_keeps_its_soak(smallest_model: Path, tmp_path: Path) -> None:
    """And the folder that has its name now gets nothing, and keeps all it has."""
    out, old = tmp_path / "out", tmp_path / "old"
    config = soak_of(smallest_model, out, blocks=14, snapshot_every=3, keep=2, interval=1e-3)

    def move() -> None:
        out.rename(old)
        shutil.copytree(old, out)  # as another soak that has come as far

    before: dict[Path, bytes] = {}

    def note() -> None:
        before.update({file: file.read_bytes() for file in out.rglob("*") if file.is_file()})

    outcome = echo_rt.soak.run(config, watchers=[at(6, move), at(7, note)])
    assert (outcome.exit_code, outcome.end, outcome.report) == (0, "complete", old / "report.md")
    assert len(before) > 4 and {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    assert sorted(hashes(old)) == list(range(14)) and "complete after 14 blocks" in outcome.report.read_text()
    assert [file.name for file in snapshot_files(old / "snapshots")] == [
        f"block-00000000{block:02}.safetensors" for block in (12, 9)
    ]
    old_soak = soak_of(smallest_model, old, blocks=14, snapshot_every=3, keep=2, interval=1e-3)
    assert echo_rt.soak.run(old_soak).blocks == 14


@pytest.mark.parametrize("gone", ["", "snapshots", JOURNAL_FILE])
def test_what_is_removed_ends_it_with_a_report(gone: str, smallest_model: Path, tmp_path: Path) -> None:
    config = soak_of(smallest_model, tmp_path / "out", blocks=12, snapshot_every=3, interval=3600.0)
    path = config.folder / gone

    def remove() -> None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    refused(config, 1, "somebody removed|there is no folder", at(4, remove))
    # A snapshot is written beside the next blocks: how it ended is seen at the next snapshot, or the one after.
    text = report_of(config.folder, *((9, 12) if gone == "snapshots" else (6,)))
    assert "The stream did not fail; the soak ended with: OutputError: " in text or "TargetError: " in text
    assert not list(config.folder.rglob("*.part"))


def test_a_journal_that_is_replaced(smallest_model: Path, tmp_path: Path) -> None:
    """At the end of the soak, when only its last line is missing: it is not complete."""
    config = soak_of(smallest_model, tmp_path / "out", blocks=5, interval=3600.0)
    journal = config.folder / JOURNAL_FILE
    watcher = SimpleNamespace(block_done=lambda *_: None, line_done=lambda *_: journal.write_bytes(b""))
    journal_gone = SimpleNamespace(block_done=lambda *_: None, line_done=lambda *_: journal.unlink())
    refused(config, 1, r"soak\.jsonl: cannot write: somebody removed, replaced", journal_gone, watcher)
    report_of(config.folder, 5)
    assert journal.read_bytes() == b""


@pytest.mark.parametrize("gone", ["", "snapshots"])
def test_the_command_says_so(gone: str, lives: Lives, smallest_model: Path, tmp_path: Path) -> None:
    config = soak_of(smallest_model, tmp_path / "out", blocks=10**6, snapshot_every=5, interval=0.01)
    life = lives.begin(*arguments(config, "--json"))
    wait_until(lambda: lines_of(config.folder / JOURNAL_FILE) > 2, life)
    (config.folder / gone).rename(tmp_path / "gone")
    while (tmp_path / "gone").exists():
        shutil.rmtree(tmp_path / "gone", ignore_errors=True)  # files still get there
    assert life.wait() == 1 and len(life.err.splitlines()) == 1, life.err
    assert "failed after" in (config.folder / "report.md").read_text()


# -------------------------------------------------------------------- nothing left


def test_inodes_are_used_up(smallest_model: Path, tmp_path: Path) -> None:
    with file_system_of("2m,nr_inodes=40", tmp_path / "disk") as disk:
        config = soak_of(smallest_model, disk / "out", blocks=12, snapshot_every=3)

        def use_up() -> None:
            with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
                for number in range(100):
                    (disk / str(number)).touch()

        refused(config, 1, r"block-0000000006\.safetensors: cannot write: No space left on device", at(4, use_up))
        report_of(config.folder, 9)
        for number in disk.glob("[0-9]*"):
            number.unlink()
        assert echo_rt.soak.run(config).exit_code == 0


@contextmanager
def no_more_files() -> Iterator[None]:
    """No file can be opened, beside those that are."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("snapshot_every", [None, 3])
def test_files_are_used_up(snapshot_every: int | None, smallest_model: Path, tmp_path: Path) -> None:
    """Figures that cannot be read are null and noted; a snapshot that cannot be written ends the soak."""
    config = soak_of(smallest_model, tmp_path / "out", blocks=8, snapshot_every=snapshot_every, interval=1e-3)
    limit = no_more_files()
    used_up = at(3, limit.__enter__)
    try:
        refused(config, 1, os.strerror(errno.EMFILE), used_up)
    finally:
        limit.__exit__(None, None, None)
    text = (config.folder / "report.md").read_text()
    assert f"{'complete after 8' if snapshot_every is None else 'failed after'} " in text
    hosts = [line["host"] for line in intervals(config.folder)]
    assert hosts[0]["rss"] > 0 and "unread" not in hosts[0]
    assert hosts[4]["rss"] is None and hosts[4]["unread"] == os.strerror(errno.EMFILE) and hosts[4]["peak"] > 0


# -------------------------------------------------------------------- links and special files


NAMES = ("soak.json", JOURNAL_FILE, "report.md", "report.html", "prompt-0.safetensors", "snapshots", "evidence")


@pytest.mark.parametrize("name", NAMES)
def test_a_link_in_the_folder_is_refused(name: str, smallest_model: Path, tmp_path: Path) -> None:
    config = soak_of(smallest_model, tmp_path / "out", blocks=4, snapshot_every=2)
    assert echo_rt.soak.run(config).exit_code == 0
    outside, path = tmp_path / name, config.folder / name
    if path.exists():
        path.rename(outside)
    else:
        outside.mkdir()
    path.symlink_to(outside)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    longer = soak_of(smallest_model, config.folder, blocks=8, snapshot_every=2)
    refused(longer, 2, f"{name}: .*(expected a plain file, found a link|cannot be a folder to write into)")
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_hard_link_of_the_journal_is_refused(smallest_model: Path, tmp_path: Path) -> None:
    config = soak_of(smallest_model, tmp_path / "out", blocks=4)
    assert echo_rt.soak.run(config).exit_code == 0
    os.link(config.folder / JOURNAL_FILE, tmp_path / "copy")
    os.link(config.folder / "report.md", tmp_path / "report")
    longer = soak_of(smallest_model, config.folder, blocks=8)
    refused(longer, 2, r"soak\.jsonl: expected a plain file with one name")
    before = (tmp_path / "report").read_bytes()
    (tmp_path / "copy").unlink()
    assert echo_rt.soak.run(longer).blocks == 8
    assert (tmp_path / "report").read_bytes() == before != (config.folder / "report.md").read_bytes()


@pytest.mark.parametrize("name", ["soak.json", JOURNAL_FILE, "prompt-0.safetensors"])
def test_a_pipe_in_the_folder_is_refused_at_once(name: str, smallest_model: Path, tmp_path: Path) -> None:
    config = soak_of(smallest_model, tmp_path / "out", blocks=2)
    assert echo_rt.soak.run(config).exit_code == 0
    (config.folder / name).unlink()
    os.mkfifo(config.folder / name)

    def hangs(*_: object) -> None:
        raise AssertionError("it waits for a writer")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(60)
    try:
        with pytest.raises(ConfigError, match=f"{name}: .*expected a plain file, found a pipe"):
            echo_rt.soak.run(config)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_evidence_does_not_follow_a_link(smallest_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that somebody has made meanwhile."""
    config = soak_of(smallest_model, tmp_path / "out", blocks=9)
    outside = tmp_path / "outside"
    outside.mkdir()
    nan_in(monkeypatch, 6)

    def replace() -> None:
        (config.folder / "evidence").rmdir()
        (config.folder / "evidence").symlink_to(outside)

    outcome = echo_rt.soak.run(config, watchers=[at(4, replace)])
    assert outcome.exit_code == 4 and "no evidence: " in (outcome.failure or "")
    assert not list(outside.iterdir())
    assert list(read_lines(config.folder))[-1]["end"] == "failed"
