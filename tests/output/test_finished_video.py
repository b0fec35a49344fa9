"""A finished MP4 as others see it: ffprobe, a reader of tags, a browser behind a server without ranges."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echo_rt.output.video import VideoWriter
from echo_rt.utils.atomic_file import PartFile

pytest.importorskip("av")

SIZE, FRAMES = (128, 80), 200
SECONDS = FRAMES / 16


def boxes(path: Path) -> list[str]:
    """Names of the file's outer boxes; it must consist of nothing else."""
    data, names, place = path.read_bytes(), [], 0
    while place < len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        names.append(data[place + 4 : place + 8].decode("ascii"))
        assert 8 <= size <= len(data) - place
        place += size
    return names


@pytest.fixture(scope="module")
def finished(moving: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "v.mp4"
    with VideoWriter(path, *SIZE, 16) as writer:
        for start in range(0, FRAMES, 20):
            writer.write(moving(start, 20, *SIZE))
    return path


@pytest.fixture(scope="module")
def fragmented(moving: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fragmented") / "v.mp4"
    with VideoWriter(path, *SIZE, 16, fragmented=True) as writer:
        writer.write(moving(0, FRAMES, *SIZE))
    return path


def test_it_is_ordinary(finished: Path, fragmented: Path, read_video: Any) -> None:
    assert boxes(finished) == ["ftyp", "free", "mdat", "moov"]
    data = finished.read_bytes()
    assert b"mvex" not in data[data.rindex(b"moov") :]
    assert boxes(fragmented)[:4] == ["ftyp", "moov", "moof", "mdat"] and "mvex" in fragmented.read_bytes().decode(
        "latin"
    )
    one, other = read_video(finished), read_video(fragmented)
    assert np.array_equal(one.luma, other.luma) and one.times == pytest.approx(other.times)
    assert one.times[0] == 0 and one.seconds == SECONDS


def test_each_byte_is_written_once(tmp_path: Path, moving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No second copy, and the header at the start changes only when the index at the end is on the disk."""
    steps: list[Any] = []
    append, overwrite, fsync = PartFile.append, PartFile.overwrite, os.fsync

    def note_append(part: PartFile, data: bytes) -> None:
        steps.append(len(data))
        append(part, data)

    def note_overwrite(part: PartFile, place: int, data: bytes) -> None:
        steps.append("change")
        assert (place, len(data), data[4:8]) == (32, 8, b"mdat")
        overwrite(part, place, data)

    monkeypatch.setattr(PartFile, "append", note_append)
    monkeypatch.setattr(PartFile, "overwrite", note_overwrite)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (steps.append("sync"), fsync(descriptor))[1])
    with VideoWriter(tmp_path / "v.mp4", *SIZE, 16) as writer:
        writer.write(moving(0, FRAMES, *SIZE))
    assert [step for step in steps if isinstance(step, str)] == ["change", "sync", "sync", "sync"]  # disk, file, folder
    assert sum(step for step in steps if isinstance(step, int)) == (tmp_path / "v.mp4").stat().st_size
    assert isinstance(steps[steps.index("change") - 1], int), "nothing is written after the change"


def test_without_room_for_the_index_it_stays_in_fragments(
    tmp_path: Path, moving: Any, read_video: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = PartFile.append

    def full(part: PartFile, data: bytes) -> None:
        if b"stsz" in data and part.size > 5_000:
            raise OSError(28, "No space left on device")
        append(part, data)

    monkeypatch.setattr(PartFile, "append", full)
    writer = VideoWriter(tmp_path / "v.mp4", *SIZE, 16)
    writer.write(moving(0, FRAMES, *SIZE))
    with pytest.raises(Exception, match="No space left on device; its first"):
        writer.close()
    assert len(read_video(tmp_path / "v.mp4").luma) == writer.frames_on_disk >= FRAMES - 32
    assert boxes(tmp_path / "v.mp4")[-2:] == ["moof", "mdat"]


KILLED = """
    import os, signal, sys
    import numpy as np
    from echo_rt.output.video import VideoWriter
    writer = VideoWriter(sys.argv[1], 128, 80, 16)
    for _ in range(10):
        writer.write(np.random.default_rng(0).integers(0, 256, (20, 80, 128, 3), np.uint8))
    print(writer.frames_on_disk, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_after_a_kill_it_plays(tmp_path: Path, read_video: Any) -> None:
    command = [sys.executable, "-B", "-c", textwrap.dedent(KILLED), str(tmp_path / "v.mp4")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (part,) = tmp_path.iterdir()
    video = read_video(part)
    assert len(video.luma) == int(done.stdout) >= 96
    assert video.times == pytest.approx([number / 16 for number in range(len(video.luma))])


@pytest.mark.parametrize("codec", ["h264", "hevc", "av1"])
@pytest.mark.parametrize("kind", [{}, {"fragmented": True}, {"continues": 48}], ids=["ordinary", "fragmented", "piece"])
def test_codecs(tmp_path: Path, moving: Any, read_video: Any, luma: Any, codec: str, kind: dict[str, Any]) -> None:
    frames = moving(0, 48, *SIZE)
    with VideoWriter(tmp_path / "v.mp4", *SIZE, 16, codec=codec, gop_seconds=1, **kind) as writer:
        writer.write(frames)
    video = read_video(tmp_path / "v.mp4")
    assert video.codec == {"av1": "libdav1d"}.get(codec, codec) and video.colours == (1, 1)
    first = kind.get("continues", 0)
    assert video.times == pytest.approx([(first + number) / 16 for number in range(48)])
    assert np.abs(video.luma - luma(frames)).mean() < 3
    assert max(np.diff([*video.key_frames, 48])) <= 16


@pytest.mark.skipif(shutil.which("ffprobe") is None, reason="there is no ffprobe")
def test_ffprobe_sees_its_length(finished: Path) -> None:
    command = ["ffprobe", "-v", "error", "-show_format", "-show_streams", "-of", "json", str(finished)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    facts = json.loads(done.stdout)
    assert done.stderr == "" and facts["format"]["duration"] == f"{SECONDS:.6f}"
    (stream,) = facts["streams"]
    assert (stream["nb_frames"], stream["duration"], stream["start_time"]) == (str(FRAMES), "12.500000", "0.000000")


def test_a_reader_of_tags_sees_its_length(finished: Path, fragmented: Path) -> None:
    mp4 = pytest.importorskip("mutagen.mp4")
    assert mp4.MP4(finished).info.length == pytest.approx(SECONDS)
    assert mp4.MP4(fragmented).info.length == 0, "what the ordinary kind is for"
