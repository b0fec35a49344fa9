"""A claimed folder: what is done in it goes by its descriptor, and through no link."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from echo_rt.errors import OutputError, TargetError
from echo_rt.utils.atomic_file import (
    PartFile,
    check_plain,
    names_in,
    open_plain,
    read_plain,
    remove,
    write_whole,
)
from echo_rt.utils.folder_lock import FolderClaim


@pytest.fixture
def day(tmp_path: Path) -> Iterator[FolderClaim]:
    claim = FolderClaim(tmp_path / "day")
    yield claim
    claim.release()


def test_a_moved_folder_keeps_what_belongs_into_it(day: FolderClaim, tmp_path: Path) -> None:
    inner = FolderClaim(day.folder / "snapshots")
    begun = PartFile(inner.folder / "begun")
    begun.append(b"1")
    day.folder.rename(tmp_path / "old")
    (day.folder / "snapshots").mkdir(parents=True)  # somebody else's
    (day.folder / "snapshots" / "theirs").write_text("2")
    begun.commit()
    write_whole(inner.folder / "next", b"3")
    write_whole(day.folder / "report", b"4")
    assert sorted(names_in(inner.folder)) == ["begun", "next"] and read_plain(inner.folder / "next") == b"3"
    remove(inner.folder / "theirs")
    assert day.path == tmp_path / "old" and inner.path == tmp_path / "old" / "snapshots"
    with pytest.raises(TargetError, match="this process holds another folder by that name"):
        FolderClaim(day.folder)
    inner.release()
    assert (tmp_path / "old" / "report").read_bytes() == b"4"
    assert sorted(file.name for file in (tmp_path / "day").rglob("*")) == ["snapshots", "theirs"]
    assert sorted(names_in(day.folder / "snapshots")) == ["theirs"], "it is no longer claimed"


def test_a_removed_folder_takes_nothing(day: FolderClaim) -> None:
    day.folder.rmdir()
    day.folder.mkdir()
    with pytest.raises(OutputError, match=r"cannot write: there is no folder .*day any more"):
        write_whole(day.folder / "report", b"1")
    assert not list(day.folder.iterdir())
    day.release()
    assert day.folder.exists(), "the folder of somebody else"


def test_a_folder_that_another_machine_removed(day: FolderClaim, monkeypatch: pytest.MonkeyPatch) -> None:
    """What NFS says then."""

    def stale(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    assert not day.removed
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", stale)
        assert day.removed
        patch.setattr(os, "open", stale)
        with pytest.raises(OutputError, match=r"cannot write: there is no folder .*day any more"):
            write_whole(day.folder / "report", b"1")


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(TargetError, match="day: cannot be written into: No locks available"):
        FolderClaim(tmp_path / "day")
    assert not list(tmp_path.iterdir())


def test_links_are_not_written_through(day: FolderClaim, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("good")
    (day.folder / "soft").symlink_to(outside)
    os.link(outside, day.folder / "hard")
    for name in ("soft", "hard"):
        with pytest.raises(OSError, match="expected a plain file"):
            open_plain(day.folder / name, os.O_WRONLY)
        write_whole(day.folder / name, b"new")
    assert outside.read_text() == "good" and (day.folder / "soft").read_text() == "new"
    (day.folder / "snapshots").symlink_to(tmp_path)
    with pytest.raises(TargetError, match="snapshots: cannot be a folder to write into"):
        FolderClaim(day.folder / "snapshots")
    with pytest.raises(OSError, match="found a link"):
        check_plain(day.folder / "snapshots")
    check_plain(outside)


def test_special_files_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        kinds = {"pipe": tmp_path / "pipe", "socket": tmp_path / "socket", "device": Path("/dev/zero")}
        for kind, odd in kinds.items():
            with pytest.raises(OSError, match=f"expected a plain file, found a {kind}"):
                read_plain(odd)
    with pytest.raises(OSError, match="found a folder"):
        read_plain(tmp_path)


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"x" * 11)
    assert read_plain(tmp_path / "large", most=11) == b"x" * 11
    with pytest.raises(OSError, match="expected at most 10 bytes"):
        read_plain(tmp_path / "large", most=10)


def test_one_claim_holds_a_folder(tmp_path: Path) -> None:
    first = FolderClaim(tmp_path / "a")
    with pytest.raises(TargetError, match="another process writes into it"):
        FolderClaim(tmp_path / "a")
    first.release()
    assert not (tmp_path / "a").exists()
    FolderClaim(tmp_path / "a").release()
