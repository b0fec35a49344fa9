"""A recording in segments: no frame lost or doubled, whatever ends it, and it can be gone on with."""

from __future__ import annotations

import json
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
from echo_rt.output.segment_index import RecordingIndex
from echo_rt.output.segments import SegmentedWriter, check_free
from echo_rt.output.video import VideoWriter
from echo_rt.utils.atomic_file import PartFile

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
    return sorted(file.name for file in folder.iterdir())


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
    times, pictures = decode(folder / "video.ffconcat")
    assert np.array_equal(pictures, unbroken[:count])
    assert times == pytest.approx([number / 16 for number in range(count)], abs=1e-4)
    index = RecordingIndex.read(folder)
    assert [len(decode(folder / segment.file)[0]) for segment in index.segments] == [s.frames for s in index.segments]
    pieces = [load_file(folder / str(segment.latents_file))["latents"] for segment in index.segments]
    assert np.array_equal(np.concatenate(pieces), np.concatenate([latents(block) for block in range(blocks)]))
    assert len(names(folder)) == 2 * len(pieces) + 2, "something is left over"


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
        "latents-00000.safetensors",
        "latents-00001.safetensors",
        "recording.json",
        "video-00000.mp4",
        "video-00001.mp4",
        "video.ffconcat",
    ]
    feed(again, frames, range(4, len(BLOCKS)))
    again.close()
    assert_whole(tmp_path / "r", unbroken)


def test_a_kill_before_the_index_knows(
    tmp_path: Path, frames: NDArray[np.uint8], unbroken: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third piece is in place and the process ends: it does not count, and is made again."""
    writer = make(tmp_path / "r")
    feed(writer, frames, range(5))
    write = RecordingIndex.write

    def killed(self: RecordingIndex, folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RecordingIndex, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        feed(writer, frames, range(5, 7))
    writer._claim.release()
    monkeypatch.setattr(RecordingIndex, "write", write)
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
        assert names(tmp_path / "r") == ["recording.json", "video.ffconcat"]
        feed(again, frames, range(len(BLOCKS)))
    assert_whole(tmp_path / "r", unbroken)


def test_what_cannot_be_gone_on_with(tmp_path: Path, frames: NDArray[np.uint8]) -> None:
    folder = tmp_path / "r"
    with make(folder) as writer:
        assert isinstance(writer, SegmentedWriter)
        feed(writer, frames, range(6))
        with pytest.raises(TargetError, match="another process writes into it"):
            SegmentedWriter.resume(folder, 33, seconds=1)
    before = {name: (folder / name).read_bytes() for name in names(folder)}
    for frame, reached in ((40, 33), (20, 0), (1000, 69)):
        with pytest.raises(TargetError, match=f"at frame {frame}: the recording has 69 frames.* at frame {reached}$"):
            SegmentedWriter.resume(folder, frame, seconds=1)
    with pytest.raises(TargetError, match=r"a recording of 69 frames; .*name another folder"):
        make(folder)
    with pytest.raises(ConfigError, match="more than 0 seconds"):
        SegmentedWriter.resume(folder, 33, seconds=0)
    assert {name: (folder / name).read_bytes() for name in names(folder)} == before
    (folder / "video-00000.mp4").write_bytes(b"short")
    with pytest.raises(TargetError, match=r"video-00000\.mp4: expected \d+ bytes, found 5"):
        SegmentedWriter.resume(folder, 33, seconds=1)
    (folder / "latents-00000.safetensors").unlink()
    (folder / "video-00000.mp4").write_bytes(before["video-00000.mp4"])
    with pytest.raises(TargetError, match=r"latents-00000\.safetensors: expected \d+ bytes, No such file"):
        SegmentedWriter.resume(folder, 33, seconds=1)
    assert len(names(folder)) == len(before) - 1, "nothing was dropped for a resume that did not come to pass"
    with pytest.raises(TargetError, match=r"expected a recording in segments, found no recording\.json"):
        SegmentedWriter.resume(tmp_path, 0, seconds=1)


def change(**facts: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda index: index | facts


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change(format="another"), "expected the index of a recording"),
        (change(version=2), "expected version 1, found 2"),
        (change(fps="0"), "damaged"),
        (change(fps="1/0"), "damaged"),
        (change(width=None), "damaged"),
        (change(width=-64), "damaged"),
        (change(notes=[]), "damaged"),
        (change(latent_shape=[2, 3]), "damaged"),
        (change(latent_shape=None), "damaged"),
        (change(segments=[{}]), "damaged"),
        (change(segments=[3]), "damaged"),
        (lambda index: index | {"segments": index["segments"][1:]}, "damaged"),
        (lambda index: index | {"segments": [index["segments"][0] | {"file": "../v.mp4"}]}, "damaged"),
        (lambda index: index | {"segments": [index["segments"][0] | {"frames": 2.5}]}, "damaged"),
        (lambda index: [index], "expected the index of a recording"),
    ],
)
def test_a_damaged_index(
    tmp_path: Path, frames: NDArray[np.uint8], edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    with make(tmp_path / "r", seconds=0.1) as writer:
        assert isinstance(writer, SegmentedWriter)
        feed(writer, frames, range(2))
    path = tmp_path / "r" / "recording.json"
    assert RecordingIndex.read(tmp_path / "r").fps == Fraction(16)
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    for act in (lambda: SegmentedWriter.resume(tmp_path / "r", 9, seconds=1), lambda: check_free(tmp_path / "r")):
        with pytest.raises(TargetError, match=message) as caught:
            act()
        assert str(path) in str(caught.value)
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
    _, pictures = decode(tmp_path / "r" / "video.ffconcat")
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
    writer.close()
