"""The keeper of snapshots: beside the stream, the last few, and one to go on from whenever the process is killed."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from damage import as_of_another_version

from echo_rt.errors import ConfigError, OutputError, SnapshotError, SnapshotVersionError, StreamError, TargetError
from echo_rt.snapshot.snapshot import Snapshot
from echo_rt.snapshot.store import SnapshotKeeper, latest_snapshot, snapshot_files


def snapshot(block: int, values: int = 1000) -> Snapshot:
    """One at the boundary before ``block``, which is also what its tensor is full of."""
    return Snapshot(
        model={"dim": 4},
        seed=1,
        block=block - 1,
        memory_ready=False,
        latents_decoded=3 * block,
        tensors={"t": torch.full((values,), float(block))},
        prompts={},
    )


def blocks(folder: Path) -> list[int]:
    return [int(file.stem.removeprefix("block-")) for file in snapshot_files(folder)]


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[SnapshotKeeper]:
    with SnapshotKeeper(tmp_path / "s", keep=2) as made:
        assert isinstance(made, SnapshotKeeper)
        yield made


def put(keeper: SnapshotKeeper, block: int) -> None:
    assert keeper.offer(lambda: snapshot(block))
    keeper.wait()


def test_the_last_ones_are_kept(keeper: SnapshotKeeper, tmp_path: Path) -> None:
    assert latest_snapshot(tmp_path / "s") is None and latest_snapshot(tmp_path / "absent") is None
    (tmp_path / "s" / "block-12.safetensors").write_text("of somebody else")
    kept = []
    for block in (0, 5, 99, 12345678901):
        put(keeper, block)
        kept.append(blocks(tmp_path / "s"))
    assert kept == [[0], [5, 0], [99, 5], [12345678901, 99]]
    found = latest_snapshot(tmp_path / "s")
    assert found is not None and found[0].name == "block-12345678901.safetensors"
    assert found[1].next_block == 12345678901 and found[1].tensors["t"][0] == 12345678901.0
    assert keeper.written == 4 and keeper.skipped == 0
    assert (tmp_path / "s" / "block-12.safetensors").exists()


def test_those_of_a_video_that_was_given_up_go(keeper: SnapshotKeeper, tmp_path: Path) -> None:
    """After a resume from an older one, the newer must not come back; nor push out what is written now."""
    for block in (10, 20):
        put(keeper, block)
    put(keeper, 15)
    assert blocks(tmp_path / "s") == [15, 10]


def test_damaged_ones_are_passed_over_and_named(keeper: SnapshotKeeper, tmp_path: Path) -> None:
    for block in (1, 2):
        put(keeper, block)
    newest, older = snapshot_files(tmp_path / "s")
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    with pytest.warns(RuntimeWarning, match=f"passed over: {newest}: the snapshot is damaged: its checksum"):
        found = latest_snapshot(tmp_path / "s")
    assert found is not None and found[0] == older and found[1].next_block == 1
    older.write_bytes(b"")
    with (
        pytest.warns(RuntimeWarning, match="passed over"),
        pytest.raises(SnapshotError, match="expected a whole snapshot, found 2 damaged ones"),
    ):
        latest_snapshot(tmp_path / "s")


def test_those_of_another_version_are_no_damaged_ones(keeper: SnapshotKeeper, tmp_path: Path) -> None:
    """A newest file that only another echo-rt reads is whole: to go on from the one before would in time remove it."""
    for block in (1, 2):
        put(keeper, block)
    newest, older = snapshot_files(tmp_path / "s")
    as_of_another_version(newest)
    with warnings.catch_warnings(), pytest.raises(SnapshotVersionError, match=f"{newest}: .* whole one of version 3"):
        warnings.simplefilter("error")
        latest_snapshot(tmp_path / "s")
    newest.write_bytes(newest.read_bytes()[:-1])
    as_of_another_version(older)
    with (
        pytest.warns(RuntimeWarning, match=f"passed over: {newest}: the snapshot is damaged"),
        pytest.raises(SnapshotVersionError, match=f"{older}: "),
    ):
        latest_snapshot(tmp_path / "s")
    put(keeper, 3)
    found = latest_snapshot(tmp_path / "s")
    assert found is not None and found[1].next_block == 3, "what is older than one that can be read does not matter"


def test_the_stream_does_not_wait(keeper: SnapshotKeeper, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one is being written the next is declined, and not even copied."""
    go_on = threading.Event()
    save = Snapshot.save

    def slow(self: Snapshot, path: str | Path) -> None:
        assert go_on.wait(30)
        save(self, path)

    monkeypatch.setattr(Snapshot, "save", slow)
    taken = []

    def take() -> Snapshot:
        taken.append(len(taken))
        return snapshot(len(taken))

    assert keeper.offer(take) and keeper.busy
    began = time.perf_counter()
    assert not keeper.offer(take) and not keeper.offer(take)
    assert time.perf_counter() - began < 1
    go_on.set()
    keeper.wait()
    assert (taken, keeper.written, keeper.skipped, keeper.busy) == ([0], 1, 2, False)
    assert keeper.offer(take)


def test_what_goes_wrong_is_told(keeper: SnapshotKeeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(tmp_path / "s")
    assert keeper.offer(lambda: snapshot(1))
    while keeper.busy:
        time.sleep(0.001)
    with pytest.raises(OutputError, match="there is no folder"):
        keeper.offer(lambda: snapshot(2))
    (tmp_path / "s").mkdir()  # another one, of whoever made it
    assert keeper.offer(lambda: snapshot(3))
    with pytest.raises(OutputError, match="there is no folder"):
        keeper.wait()
    assert blocks(tmp_path / "s") == []

    def bug(self: Snapshot, path: str | Path) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Snapshot, "save", bug)
    assert keeper.offer(lambda: snapshot(4))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        keeper.close()
    keeper.close()
    with pytest.raises(StreamError, match="closed"):
        keeper.offer(lambda: snapshot(5))


def test_an_old_one_that_cannot_be_removed_is_told(keeper: SnapshotKeeper, tmp_path: Path) -> None:
    (tmp_path / "s" / "block-0000000000.safetensors").mkdir()
    put(keeper, 1)
    assert keeper.offer(lambda: snapshot(2))
    with pytest.raises(OutputError, match=r"block-0000000000\.safetensors: cannot remove an old snapshot"):
        keeper.wait()
    assert blocks(tmp_path / "s")[:2] == [2, 1]


def test_a_full_disk_keeps_those_that_are_there(keeper: SnapshotKeeper, tmp_path: Path) -> None:
    for block in (1, 2):
        put(keeper, block)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        assert keeper.offer(lambda: snapshot(3))
        with pytest.raises(OutputError, match="File too large"):
            keeper.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert blocks(tmp_path / "s") == [2, 1] and len(list((tmp_path / "s").iterdir())) == 2
    put(keeper, 3)
    assert blocks(tmp_path / "s") == [3, 2]


def test_one_keeper_at_a_time(keeper: SnapshotKeeper, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="another process writes into it"):
        SnapshotKeeper(tmp_path / "s")
    keeper.close()
    SnapshotKeeper(tmp_path / "s").close()
    with pytest.raises(ConfigError, match="1 snapshot or more, got 0"):
        SnapshotKeeper(tmp_path / "s", keep=0)
    (tmp_path / "file").write_text("")
    for place in ("file", "absent/s"):
        with pytest.raises(TargetError, match="cannot be a folder to write into"):
            SnapshotKeeper(tmp_path / place)


def test_killed_before_removing_anything_does_not_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each life puts a snapshot in place and ends there: what the lives before left is removed before it writes."""
    save, most = Snapshot.save, []

    class Killed(BaseException):
        pass

    def last_deed(self: Snapshot, path: Path) -> None:
        save(self, path)
        most.append(len(blocks(tmp_path / "s")))
        raise Killed

    monkeypatch.setattr(Snapshot, "save", last_deed)
    for block in range(6):
        with contextlib.suppress(Killed):
            keeper = SnapshotKeeper(tmp_path / "s", keep=2)
            keeper.offer(lambda block=block: snapshot(block, 100))
            keeper.close()
    assert most == [1, 2, 3, 3, 3, 3]


WRITE_UNTIL_KILLED = """
    import os, sys
    sys.path[:0] = [sys.argv[1], os.path.dirname(sys.argv[1])]
    from test_snapshot_store import snapshot
    import echo_rt.snapshot.file
    from echo_rt.snapshot.store import SnapshotKeeper, latest_snapshot
    # A process for each life, without importing everything once more.
    while sys.stdin.readline():
        child = os.fork()
        if child == 0:
            found = latest_snapshot(sys.argv[2])
            block = 0 if found is None else found[1].next_block
            keeper = SnapshotKeeper(sys.argv[2], keep=2)
            print(f"{os.getpid()} {block}", flush=True)
            while True:
                block += 1
                keeper.offer(lambda: snapshot(block, 500_000))
                keeper.wait()
        os.waitpid(child, 0)
"""


def halted(pid: int) -> bool:
    """Whether all threads of the process have been stopped: the one that writes may be the last of them."""
    try:
        stats = [stat.read_text() for stat in Path(f"/proc/{pid}/task").glob("*/stat")]
    except OSError:  # one of them has just ended
        return False
    return all(stat.rsplit(")", 1)[1].split()[0] == "T" for stat in stats)


def stop_amid_writing(pid: int, folder: Path) -> None:
    """Halt the process where a file of it is half written."""
    while True:
        if not any(folder.glob(".*.part")):
            time.sleep(0.0005)
            continue
        os.kill(pid, signal.SIGSTOP)
        while not halted(pid):
            time.sleep(0.0005)
        if any(folder.glob(".*.part")):
            return
        os.kill(pid, signal.SIGCONT)


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """Each life goes on from a whole snapshot, never an older one than the life before; nothing piles up."""
    folder = tmp_path / "s"
    script = textwrap.dedent(WRITE_UNTIL_KILLED)
    command = [sys.executable, "-B", "-c", script, str(Path(__file__).parent), str(folder)]
    dice = random.Random(6)
    begun, known, parts = [], 0, []
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as lives:
        assert lives.stdin is not None and lives.stdout is not None
        try:
            for life in range(20):
                print(file=lives.stdin, flush=True)  # what this life leaves is counted before the next one begins
                pid, block = map(int, lives.stdout.readline().split())
                assert block >= known, "a snapshot that was in place is gone"
                begun.append(block)
                if life % 2:
                    stop_amid_writing(pid, folder)
                else:
                    while max(blocks(folder), default=0) <= block:
                        time.sleep(0.001)  # until it has put one in place
                    time.sleep(dice.uniform(0, 0.08))  # wherever that falls
                os.kill(pid, signal.SIGKILL)
                while os.path.exists(f"/proc/{pid}/exe"):
                    time.sleep(0.001)  # until it can write no more
                found = latest_snapshot(folder)
                known = 0 if found is None else found[1].next_block
                assert len(blocks(folder)) <= 3
                parts.append(sum(file.name.endswith(".part") for file in folder.iterdir()))
        finally:
            os.killpg(lives.pid, signal.SIGKILL)
    assert begun[-1] > 5 and all(parts[1::2]), "a file that was being written is gone"
    assert max(parts) == 1, "what killed processes leave piles up"
