"""The file beside the target, and its move into place."""

from __future__ import annotations

import errno
import os

import pytest

from echo_rt.errors import OutputError
from echo_rt.utils.atomic_file import PartFile, write_whole


@pytest.mark.parametrize("name", ["x" * 251 + ".mp4", "影" * 83 + ".mp4", "a.mp4"], ids=["long", "wide", "short"])
def test_any_name_that_a_file_can_have(tmp_path, name):
    part = PartFile(tmp_path / name)
    (beside,) = tmp_path.iterdir()
    assert beside.name.startswith(f".{name[:5]}") and beside.name.endswith(".part")
    assert len(os.fsencode(beside.name)) <= 143, "the most that some file systems take"
    part.append(b"good")
    assert not part.in_place
    part.commit()
    assert part.in_place
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == b"good"


def test_two_at_once_with_a_long_name(tmp_path):
    first, second = (PartFile(tmp_path / ("x" * 240 + end)) for end in ("1", "2"))
    first.append(b"1")
    second.append(b"2")
    second.commit()
    first.commit()
    assert [(tmp_path / ("x" * 240 + end)).read_bytes() for end in ("1", "2")] == [b"1", b"2"]


def test_what_cannot_be_moved_is_not_in_place(tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    part = PartFile(tmp_path / "a.mp4")
    monkeypatch.setattr("echo_rt.utils.atomic_file.os.replace", fail)
    with pytest.raises(OutputError, match=r"left as .*\.part: Input/output error"):
        part.commit()
    assert not part.in_place


def test_a_folder_that_is_removed_meanwhile(tmp_path):
    (tmp_path / "out").mkdir()
    part = PartFile(tmp_path / "out" / "a.mp4")
    (tmp_path / "out").rename(tmp_path / "gone")
    with pytest.raises(OutputError, match=r"somebody removed .*\.part$"):
        part.commit()
    assert not part.in_place


def test_a_small_file_on_a_full_disk_leaves_the_old_one(tmp_path, monkeypatch):
    def fail(part: PartFile, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "a").write_bytes(b"good")
    monkeypatch.setattr(PartFile, "append", fail)
    with pytest.raises(OutputError, match="No space left on device"):
        write_whole(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"good" and len(list(tmp_path.iterdir())) == 1
