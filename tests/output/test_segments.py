"""A recording in segments: no frame lost or doubled, whatever ends it, and it can be gone on with."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from echo_rt.errors import ConfigError, OutputError, TargetError
from echo_rt.output.segments import RecordingIndex, SegmentedWriter, check_free
from echo_rt.output.video import VideoWriter
from echo_rt.utils.atomic_file import Log, PartFile

av = pytest.importorskip("av")

SIZE = (64, 48)
BLOCKS = [9, *[12] * 7]  # as Wan's decoder gives them
STARTS = np.cumsum([0, *BLOCKS])


@pytest.fixture(scope="module")
def frames() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (sum(BLOCKS), SIZE[1], SIZE[0], 3), np.uint8)


def latents(block: int) -> NDArray[np.float32]:
    return np.full((3, 2, 3, 4), block, np.float32)


def make(folder: Path, **options: Any) -> SegmentedWriter:
    """Lossless, so that what is decoded can be compared."""
    return SegmentedWriter(folder, *SIZE, 16, **{"seconds": 1.5, "crf": 0, "latent_shape": (2, 3, 4), **options})


def feed(writer: SegmentedWriter, frames: NDArray[np.uint8], blocks: range) -> None:
    for block in blocks:
        writer.write(frames[STARTS[block] : STARTS[block + 1]], latents(block))


def decode(path: Path) -> tuple[list[float], NDArray[np.uint8]]:
    """Times and pictures, before any conversion of colours."""
    with av.open(str(path)) as container:
        decoded = list(container.decode(video=0))
    return [frame.time for frame in decoded], np.stack([frame.to_ndarray(format="yuv420p") for frame in decoded])


def names(folder: Path) -> list[str]:
    return sorted(re.sub(r"^init-[0-9a-f]{8}\.mp4$", "init.mp4", file.name) for file in folder.iterdir())


def segments(folder: Path) -> list[tuple[int, int]]:
    return [(segment.first_frame, segment.frames) for segment in RecordingIndex.read(folder).segments]


@pytest.fixture(scope="module")
def unbroken(frames: NDArray[np.uint8], tmp_path_factory: pytest.TempPathFactory) -> NDArray[np.uint8]:
    """The pictures of one file with all the frames."""
    path = tmp_path_factory.mktemp("unbroken") / "v.mp4"
    with VideoWriter(path, *SIZE, 16, crf=0) as writer:
        writer.write(frames)
    return decode(path)[1]


def assert_whole(folder: Path, unbroken: NDArray[np.uint8], blocks: int = len(BLOCKS)) -> None:
    """The list plays as the one file does, the pieces follow each other, the latents are all there."""
    count = STARTS[blocks]
    times, pictures = decode(folder / "video.m3u8")
    assert np.array_equal(pictures, unbroken[:count])
    assert times == pytest.approx([number / 16 for number in range(count)], abs=1e-4)
    index = RecordingIndex.read(folder)
    assert [len(decode(folder / segment.file)[0]) for segment in index.segments] == [s.frames for s in index.segments]
    pieces = [load_file(folder / str(segment.latents_file))["latents"] for segment in index.segments]
    assert np.array_equal(np.concatenate(pieces), np.concatenate([latents(block) for block in range(blocks)]))
    assert len(names(folder)) == 2 * len(pieces) + 3, "something is left over"


def test_the_same_frames_as_one_file(tmp_path: Path, frames: NDArray[np.uint8], unbroken: NDArray[np.uint8]) -> None:
    with make(tmp_path / "r") as writer:
        assert isinstance(writer, SegmentedWriter)
        feed(writer, frames, range(3))
        assert (writer.frames_on_disk, writer.latents_on_disk) == (33, 9), "a segment that is full is on the disk"
        feed(writer, frames, range(3, len(BLOCKS)))
    assert segments(tmp_path / "r") == [(0, 33), (33, 24), (57, 24), (81, 12)]
    assert (writer.frames_on_disk, writer.latents_on_disk) == (93, 24)
    assert_whole(tmp_path / "r", unbroken)
    writer.close()
    with pytest.raises(OutputError, match="closed"):
        writer.write(frames[:1])


def test_a_cut_ends_a_segment(tmp_path: Path, frames: NDArray[np.uint8], unbroken: NDArray[np.uint8]) -> None:
    with make(tmp_path / "r", seconds=1000) as writer:
        assert isinstance(writer, SegmentedWriter)
        writer.cut()  # of nothing
        for block in range(len(BLOCKS)):
            feed(writer, frames, range(block, block + 1))
            if block in (1, 2, 5):
                writer.cut()
                writer.cut()
                assert writer.frames_on_disk == STARTS[block + 1]
    assert segments(tmp_path / "r") == [(0, 21), (21, 12), (33, 36), (69, 24)]
    assert_whole(tmp_path / "r", unbroken)


@pytest.mark.parametrize("ending", ["close", "kill"])
def test_resume_drops_what_will_be_made_again(
    tmp_path: Path, frames: NDArray[np.uint8], unbroken: NDArray[np.uint8], ending: str
) -> None:
    """From a snapshot amid the second segment's time; after it came more segments, and a part of one."""
    writer = make(tmp_path / "r", notes={"seed": 3})
    feed(writer, frames, range(4))
    writer.cut()  # the snapshot of block 4, frame 45
    feed(writer, 255 - frames, range(4, 7))
    if ending == "close":
        writer.close()
    else:
        writer._claim.release()  # as the end of the process does; the open part stays
        assert any(name.endswith(".part") for name in names(tmp_path / "r"))
    again = SegmentedWriter.resume(tmp_path / "r", 45, seconds=1.5, crf=0)
    assert (again.frames_on_disk, again.notes) == (45, {"seed": 3})
    assert names(tmp_path / "r") == [
        "init.mp4",
        "latents-00000.safetensors",
        "latents-00001.safetensors",
        "recording.json",
        "video-00000.mp4",
        "video-00001.mp4",
        "video.m3u8",
    ]
    feed(again, frames, range(4, len(BLOCKS)))
    again.close()
    assert_whole(tmp_path / "r", unbroken)


@pytest.mark.parametrize("written", [0, 1, 60, -1])
def test_a_kill_before_the_index_knows(
    tmp_path: Path, frames: NDArray[np.uint8], unbroken: NDArray[np.uint8], monkeypatch: Any, written: int
) -> None:
    """The third piece is in place and the process ends, maybe amid its line: it does not count, and is made again."""
    writer = make(tmp_path / "r")
    feed(writer, frames, range(5))
    torn = []

    def killed(self: Log, text: bytes) -> None:
        torn.append(text)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Log, "append", killed)
        feed(writer, frames, range(5, 7))
    writer._claim.release()
    with (tmp_path / "r" / "recording.json").open("ab") as index:
        index.write(torn[0][:written])
    assert (tmp_path / "r" / "video-00002.mp4").exists() and RecordingIndex.read(tmp_path / "r").frames == 57
    with SegmentedWriter.resume(tmp_path / "r", 57, seconds=1.5, crf=0) as again:
        assert isinstance(again, SegmentedWriter)
        assert not (tmp_path / "r" / "video-00002.mp4").exists()
        feed(again, frames, range(5, len(BLOCKS)))
    assert_whole(tmp_path / "r", unbroken)


def test_resume_from_the_start_and_the_end(
    tmp_path: Path, frames: NDArray[np.uint8], unbroken: NDArray[np.uint8]
) -> None:
    with make(tmp_path / "r") as writer:
        assert isinstance(writer, SegmentedWriter)
        feed(writer, frames, range(4))
    with SegmentedWriter.resume(tmp_path / "r", 45, seconds=1.5) as again:
        assert again is not writer
    assert_whole(tmp_path / "r", unbroken, 4)
    with SegmentedWriter.resume(tmp_path / "r", 0, seconds=1.5, crf=0) as again:
        assert isinstance(again, SegmentedWriter)
        assert names(tmp_path / "r") == ["recording.json", "video.m3u8"]
        feed(again, frames, range(len(BLOCKS)))
    assert_whole(tmp_path / "r", unbroken)


def test_what_cannot_be_gone_on_with(tmp_path: Path, frames: NDArray[np.uint8]) -> None:
    folder = tmp_path / "r"
    with make(folder) as writer:
        assert isinstance(writer, SegmentedWriter)
        feed(writer, frames, range(6))
        with pytest.raises(TargetError, match="another process writes into it"):
            SegmentedWriter.resume(folder, 33, seconds=1)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    for frame, reached in ((40, 33), (20, 0), (1000, 69)):
        with pytest.raises(TargetError, match=f"at frame {frame}: the recording has 69 frames.* at frame {reached}$"):
            SegmentedWriter.resume(folder, frame, seconds=1)
    with pytest.raises(TargetError, match=r"a recording of 69 frames; .*name another folder"):
        make(folder)
    with pytest.raises(ConfigError, match="more than 0 seconds"):
        SegmentedWriter.resume(folder, 33, seconds=0)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    (folder / "video-00000.mp4").write_bytes(b"short")
    with pytest.raises(TargetError, match=r"video-00000\.mp4: expected \d+ bytes, found 5"):
        SegmentedWriter.resume(folder, 33, seconds=1)
    (folder / "latents-00000.safetensors").unlink()
    (folder / "video-00000.mp4").write_bytes(before["video-00000.mp4"])
    with pytest.raises(TargetError, match=r"latents-00000\.safetensors: expected \d+ bytes: No such file"):
        SegmentedWriter.resume(folder, 33, seconds=1)
    assert len(names(folder)) == len(before) - 1, "nothing was dropped for a resume that did not come to pass"
    with pytest.raises(TargetError, match=r"expected a recording in segments, found no recording\.json"):
        SegmentedWriter.resume(tmp_path, 0, seconds=1)


def change(line: int, **facts: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda lines: [entry | facts if number == line else entry for number, entry in enumerate(lines)]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change(0, format="another"), "expected the index of a recording"),
        (change(0, version=3), "expected version 2 or older, found 3"),
        (change(0, version=-1), "expected version 2 or older, found -1"),
        (change(0, version="2"), "expected the index of a recording"),
        (change(0, fps="0"), "damaged"),
        (change(0, fps="1/0"), "damaged"),
        (change(0, fps="9" * 5000), "damaged"),
        (change(0, fps=16), "damaged"),
        (change(0, width=None), "damaged"),
        (change(0, width=-64), "damaged"),
        (change(0, width=10**30), "damaged"),
        (change(0, notes=[]), "damaged"),
        (change(0, notes={"script": [{"seconds": float("nan")}]}), "damaged"),
        (change(0, latent_shape=[2, 3]), "damaged"),
        (change(0, latent_shape=None), "damaged"),
        (lambda lines: [lines[0], {}], "damaged"),
        (lambda lines: [lines[0], 3], "damaged"),
        (lambda lines: [lines[0], *lines[2:]], "damaged"),
        (lambda lines: [lines[0], lines[1], lines[1]], "damaged"),
        (change(1, file="../v.mp4"), "damaged"),
        (change(1, file="recording.json"), "damaged"),
        (change(1, file="video-00000.mp4\n"), "damaged"),
        (change(1, latents_file=None), "damaged"),
        (change(1, frames=2.5), "damaged"),
        (change(1, frames=True), "damaged"),
        (change(1, first_frame=2**60), "damaged"),
        (lambda lines: [[lines[0]], *lines[1:]], "expected the index of a recording"),
    ],
)
def test_a_damaged_index(
    tmp_path: Path, frames: NDArray[np.uint8], edit: Callable[[list[Any]], list[Any]], message: str
) -> None:
    with make(tmp_path / "r", seconds=0.1) as writer:
        assert isinstance(writer, SegmentedWriter)
        feed(writer, frames, range(2))
    path = tmp_path / "r" / "recording.json"
    assert RecordingIndex.read(tmp_path / "r").frame_rate == Fraction(16)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in edit(lines)))
    for act in (lambda: SegmentedWriter.resume(tmp_path / "r", 9, seconds=1), lambda: check_free(tmp_path / "r")):
        with pytest.raises(TargetError, match=message) as caught:
            act()
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    path.write_bytes(b'{"format": "echo-rt reco')
    with pytest.raises(TargetError, match="damaged file"):
        check_free(tmp_path / "r")


def test_folders_for_a_new_recording(tmp_path: Path, frames: NDArray[np.uint8]) -> None:
    folder = tmp_path / "r"
    make(folder).close()
    make(folder).close()  # one without frames is nothing to lose
    (folder / "recording.json").unlink()
    (folder / "video-00000.mp4").write_bytes(b"of somebody else")
    with pytest.raises(TargetError, match=r"found video-00000\.mp4"):
        make(folder)
    (folder / "video-00000.mp4").rename(folder / "video-0.mp4")
    make(folder).close()
    assert "video-0.mp4" in names(folder)
    with pytest.raises(ConfigError, match="an even width"):
        SegmentedWriter(tmp_path / "odd", 63, 48, 16, seconds=1).write(frames[:1, :, :63])
    with pytest.raises(ConfigError, match="expected latents with a block"):
        make(tmp_path / "l").write(frames[:1])
    with pytest.raises(ConfigError, match="expected no latents with a block"):
        make(tmp_path / "n", latent_shape=None).write(frames[:1], latents(0))


def test_a_full_disk_keeps_what_fits(
    tmp_path: Path, frames: NDArray[np.uint8], unbroken: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    append, room = PartFile.append, 300_000

    def append_to_small_disk(part: PartFile, data: bytes) -> None:
        nonlocal room
        if len(data) > room:
            raise OSError(28, "No space left on device")
        room -= len(data)
        append(part, data)

    monkeypatch.setattr(PartFile, "append", append_to_small_disk)
    writer = make(tmp_path / "r")
    with pytest.raises(OutputError, match="No space left on device"):
        feed(writer, frames, range(len(BLOCKS)))
    monkeypatch.setattr(PartFile, "append", append)
    writer.close()
    assert 33 <= writer.frames_on_disk < 93
    _, pictures = decode(tmp_path / "r" / "video.m3u8")
    assert np.array_equal(pictures, unbroken[: writer.frames_on_disk])
    with SegmentedWriter.resume(tmp_path / "r", 33, seconds=1.5, crf=0) as again:
        assert isinstance(again, SegmentedWriter)
        feed(again, frames, range(3, len(BLOCKS)))
    assert_whole(tmp_path / "r", unbroken)


def test_a_segment_that_cannot_be_begun_whole_is_not_begun(
    tmp_path: Path, frames: NDArray[np.uint8], unbroken: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OutputError("No space left on device")

    writer = make(tmp_path / "r")
    with monkeypatch.context() as patch, pytest.raises(OutputError):
        patch.setattr("echo_rt.output.segments.LatentsWriter", full)
        feed(writer, frames, range(1))
    with writer:
        feed(writer, frames, range(len(BLOCKS)))
    assert_whole(tmp_path / "r", unbroken)


def test_a_folder_that_vanishes(tmp_path: Path, frames: NDArray[np.uint8]) -> None:
    writer = make(tmp_path / "r")
    feed(writer, frames, range(3))
    shutil.rmtree(tmp_path / "r")
    with pytest.raises(OutputError, match="there is no folder"):
        feed(writer, frames, range(3, 6))
    with pytest.raises(OutputError, match="cannot write: somebody removed"):
        writer.close()
    writer.close()
