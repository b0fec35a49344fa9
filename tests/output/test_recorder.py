"""What records a stream, used without the command line: a limit amid a block, a ``with``, an error on the way."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from echo_rt.chunk import Chunk, ChunkStats, Vitals
from echo_rt.errors import ConfigError, OutputError
from echo_rt.output import Recorder, SegmentedWriter, SegmentRecorder, VideoWriter

pytest.importorskip("av")

WIDTH, HEIGHT, FPS = 32, 16, 16
LATENT_SHAPE = (4, 2, 4)
STATS = ChunkStats(0.0, 0.0, 0, 0, False, Vitals(0.0, 1.0, 0, -1.0, 1.0, 0, None, None))


def block(index: int, frames: int = 12) -> Chunk:
    video = torch.full((frames, HEIGHT, WIDTH, 3), 10 * index, dtype=torch.uint8)
    return Chunk(index, video, frames * index, torch.full((3, *LATENT_SHAPE), float(index)), STATS)


def recorder(folder: Path, **options: Any) -> Recorder:
    return Recorder(folder / "v.mp4", frame_size=(WIDTH, HEIGHT), fps=FPS, **options)


def test_frames_alone_are_refused(tmp_path: Path) -> None:
    with recorder(tmp_path) as one, pytest.raises(ConfigError, match="got a ndarray"):
        one.write(np.zeros((1, HEIGHT, WIDTH, 3), np.uint8))  # type: ignore[arg-type]


def test_a_limit_amid_a_block(tmp_path: Path, read_video: Any) -> None:
    files = {"latents": tmp_path / "l.safetensors", "contact_sheet": tmp_path / "s.png"}
    with recorder(tmp_path, **files, latent_shape=LATENT_SHAPE, frame_limit=30) as made:
        for index in range(3):
            assert not made.full and made.frames == 12 * index
            made.write(block(index))
        assert made.full
    expected = {"video": str(tmp_path / "v.mp4")} | {name: str(path) for name, path in files.items()}
    report = made.report()
    assert report.pop("held_up_seconds") >= 0
    assert report == {
        "frames": 30,
        "seconds": 30 / FPS,
        "size": [WIDTH, HEIGHT],
        "video_fps": float(FPS),
        "latent_frames": 9,
        "files": expected,
    }
    assert len(read_video(tmp_path / "v.mp4").luma) == 30
    assert load_file(files["latents"])["latents"][:, 0, 0, 0].tolist() == [0.0] * 3 + [1.0] * 3 + [2.0] * 3


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"video": "a.avi"}, "video: expected a name that ends in .mp4, got 'a.avi'"),
        ({"video": 3}, "video: expected the path of a file, got 3"),
        ({"latents": "a.pt"}, "latents: expected a name that ends in .safetensors, got 'a.pt'"),
        ({"contact_sheet": ".png"}, "contact_sheet: expected a name before .png, got '.png'"),
    ],
)
def test_names_with_another_ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: Any, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"^{re.escape(words)}$"):
        Recorder(**{"video": "v.mp4", **files}, frame_size=(WIDTH, HEIGHT), fps=FPS, latent_shape=LATENT_SHAPE)
    assert list(tmp_path.iterdir()) == []


def test_segments_have_the_same_interface(tmp_path: Path) -> None:
    writer = SegmentedWriter(tmp_path / "v", WIDTH, HEIGHT, FPS, seconds=1.0)
    with SegmentRecorder(writer, frame_limit=30) as made:
        while not made.full:
            made.write(block(0))
    report = made.report()
    assert (report["frames"], report["segments"], report["latent_frames"]) == (30, 2, 0)


def test_an_error_on_the_way_leaves_the_frames_and_stays_the_error(
    tmp_path: Path, read_video: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> list[Exception]:
        close()
        return [OutputError("full")]

    with pytest.raises(KeyError, match="mine"), recorder(tmp_path) as made:
        close = made.close
        monkeypatch.setattr(made, "close", fails)
        made.write(block(0))
        raise KeyError("mine")
    assert len(read_video(tmp_path / "v.mp4").luma) == 12
    with pytest.raises(OutputError, match="full"), recorder(tmp_path) as made:
        close = made.close
        monkeypatch.setattr(made, "close", fails)


def test_latents_need_their_shape(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\(channels, height, width\), got \(\)"):
        recorder(tmp_path, latents=tmp_path / "l.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_stream_goes_on_while_blocks_are_encoded(
    tmp_path: Path, read_video: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four blocks wait for the encoder without holding up the fifth's maker; the fifth waits until one is done."""
    clock, calls, gate = [0.0], [0], threading.Event()
    write = VideoWriter.write

    def slow(writer: VideoWriter, frames: Any) -> None:
        gate.wait(60)  # at most: a test that fails ends
        write(writer, frames)
        clock[0] += 10

    def now() -> float:
        calls[0] += 1
        if calls[0] == 9:  # the fifth has begun to wait
            gate.set()
        return clock[0] if calls[0] != 9 else 0.0

    monkeypatch.setattr(VideoWriter, "write", slow)
    monkeypatch.setattr("echo_rt.output.recorder.time.monotonic", now)
    with recorder(tmp_path) as made:
        for index in range(4):
            made.write(block(index))
        assert (made.frames, made.held_up, clock) == (48, 0.0, [0.0])
        made.write(block(4))
        assert made.held_up >= 10
    assert len(read_video(tmp_path / "v.mp4").luma) == made.report()["frames"] == 60
    assert made.report()["held_up_seconds"] == made.held_up


def test_an_error_of_the_encoder_is_raised_once(
    tmp_path: Path, read_video: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = VideoWriter.write

    def fails(writer: VideoWriter, frames: Any) -> None:
        if frames[0, 0, 0, 0] == 10:
            raise OutputError("full")
        write(writer, frames)

    monkeypatch.setattr(VideoWriter, "write", fails)
    made = recorder(tmp_path)
    made.write(block(0))
    made.write(block(1))
    with pytest.raises(OutputError, match="full"):
        made.drain()
    assert made.close() == []
    assert len(read_video(tmp_path / "v.mp4").luma) == 12
    with pytest.raises(OutputError, match="closed"):
        made.write(block(3))

    made = recorder(tmp_path)
    made.write(block(1))
    (error,) = made.close()
    assert str(error) == "full"


def test_a_snapshot_waits_for_the_blocks_before_it(tmp_path: Path) -> None:
    writer = SegmentedWriter(tmp_path / "v", WIDTH, HEIGHT, FPS, seconds=100)
    with SegmentRecorder(writer) as made:
        for index in range(3):
            made.write(block(index))
        made.cut()
        assert writer.frames_on_disk == 36
