"""Videos and pictures read back: their frames, upright, and files that are none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fuzzing import damaged, one_line
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from echo_rt.errors import ConfigError
from echo_rt.output import VideoFile, VideoWriter
from echo_rt.output.contact_sheet import ContactSheet

av = pytest.importorskip("av")

Moving = Callable[[int, int, int, int], NDArray[np.uint8]]


@pytest.fixture
def clip(tmp_path: Path, moving: Moving) -> Path:
    """Twelve frames at 16 a second, 64x48."""
    writer = VideoWriter(tmp_path / "clip.mp4", 64, 48, 16, crf=1)
    writer.write(moving(0, 12, 64, 48))
    writer.close()
    return tmp_path / "clip.mp4"


def picture(path: Path, image: NDArray[np.uint8]) -> Path:
    height, width, _ = image.shape
    with av.open(str(path), "w", format="image2") as container:
        stream = container.add_stream("png" if path.suffix == ".png" else "mjpeg")
        stream.width, stream.height = width, height
        stream.pix_fmt = "rgb24" if path.suffix == ".png" else "yuvj444p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def test_a_video_that_was_written_comes_back(clip: Path, moving: Moving) -> None:
    file = VideoFile(clip)
    assert (file.frames, file.fps) == (12, 16.0)
    for _ in range(2):  # as often as one likes
        pieces = list(file)
        assert [piece.shape for piece in pieces] == [(1, 48, 64, 3)] * 12
        frames = np.concatenate(pieces)
        assert frames.dtype == np.uint8
        assert np.abs(frames.astype(int) - moving(0, 12, 64, 48)).mean() < 3


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_picture_is_a_video_of_one_frame(tmp_path: Path, moving: Moving, suffix: str) -> None:
    image = moving(3, 1, 64, 48)[0]
    file = VideoFile(picture(tmp_path / f"picture{suffix}", image))
    assert file.frames == 1 and file.fps is None
    (piece,) = file
    assert piece.shape == (1, 48, 64, 3)
    difference = np.abs(piece[0].astype(int) - image)
    assert difference.max() == 0 if suffix == ".png" else difference.mean() < 3


def test_our_own_overview_picture_is_one(tmp_path: Path, moving: Moving) -> None:
    sheet = ContactSheet(tmp_path / "sheet.png", fps=16)
    sheet.write(moving(0, 12, 64, 48))
    sheet.close()
    assert VideoFile(tmp_path / "sheet.png").frames == 1


@pytest.mark.parametrize(("rotation", "turns"), [(90, 1), (-90, -1), (180, 2)])
def test_frames_are_upright(clip: Path, monkeypatch: pytest.MonkeyPatch, rotation: int, turns: int) -> None:
    """A phone's portrait video is a landscape one with a note that says how to turn it."""
    plain = np.concatenate(list(VideoFile(clip)))

    class Turned:
        def __init__(self, frame: av.VideoFrame) -> None:
            self._frame, self.rotation = frame, rotation

        def to_ndarray(self, **options: str) -> NDArray[np.uint8]:
            return self._frame.to_ndarray(**options)

    decoded = VideoFile._decoded
    monkeypatch.setattr(VideoFile, "_decoded", lambda self: map(Turned, decoded(self)))
    assert np.array_equal(np.concatenate(list(VideoFile(clip))), np.rot90(plain, turns, axes=(1, 2)))


def test_files_that_are_none(tmp_path: Path, clip: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video at all\n" * 100)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "short.mp4").write_bytes(clip.read_bytes()[:300])
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    for name, words in (
        ("absent.mp4", "cannot read it: No such file or directory"),
        ("", "cannot read it: "),
        ("text.mp4", "cannot read it: "),
        ("empty.mp4", "cannot read it: "),
        ("short.mp4", "short.mp4: expected a video or a picture, "),
        ("sound.wav", "got a file without either"),
    ):
        with pytest.raises(ConfigError, match=words) as error:
            VideoFile(tmp_path / name)
        assert "\n" not in str(error.value) and str(error.value).startswith(str(tmp_path / name))


def test_too_many_frames(clip: Path) -> None:
    assert VideoFile(clip, most=12).frames == 12
    with pytest.raises(ConfigError, match="expected a video of 11 frames at most, got more"):
        VideoFile(clip, most=11)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("files")
    image = np.zeros((32, 48, 3), np.uint8)
    with VideoWriter(folder / "a.mp4", 48, 32, 16) as writer:
        writer.write(np.stack([image, image + 9]))
    with VideoWriter(folder / "fragmented.mp4", 48, 32, 16, fragmented=True) as writer:
        writer.write(np.stack([image, image + 9]))
    for name in ("a.png", "a.jpg"):
        picture(folder / name, image)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("name", ["a.mp4", "fragmented.mp4", "a.png", "a.jpg"])
@given(data=st.data())
def test_whatever_is_in_the_file(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], name: str, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("damaged") / name
    path.write_bytes(data.draw(damaged(files[name]) | st.binary(max_size=100)))
    try:
        video = VideoFile(path, most=1000)
        assert sum(len(piece) for piece in video) == video.frames
    except ConfigError as error:
        one_line(error)
