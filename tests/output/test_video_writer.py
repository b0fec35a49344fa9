"""The MP4 writer: round trip, interruption, full disk, constant memory."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from echo_rt.errors import ConfigError, OutputError, TargetError
from echo_rt.output.video import VideoWriter
from echo_rt.utils.atomic_file import check_writable

SIZE = (64, 48)


def leftovers(folder: Path, *names: str) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.name not in names)


def test_round_trip(tmp_path, moving, read_video, luma):
    frames = moving(0, 57, *SIZE)
    path = tmp_path / "out.mp4"
    with VideoWriter(path, *SIZE, 16, crf=4) as writer:
        for start in range(0, 57, 12):  # blocks of 12 and a rest of 9
            writer.write(torch.from_numpy(frames[start : start + 12]))
        assert not path.exists(), "the name is taken only when the file is whole"
    assert writer.frames_on_disk == writer.frames_encoded == 57

    video = read_video(path)
    assert video.luma.shape == frames.shape[:3]
    assert video.size == SIZE and video.rate == 16 and video.codec == "h264" and video.pixel_format == "yuv420p"
    assert video.colours == (1, 1), "tagged as BT.709"
    assert video.seconds == pytest.approx(57 / 16, abs=1e-3)
    assert video.times == pytest.approx([n / 16 for n in range(57)], abs=1e-3)
    expected = luma(frames)
    assert np.abs(video.luma - expected).mean() < 1.5
    assert np.abs(video.luma[1:] - expected[:-1]).mean() > 2.5, "the frame before is another one"
    assert leftovers(tmp_path, "out.mp4") == []


def test_the_same_frames_are_the_same_file(tmp_path):
    """Whatever lies in memory: on a processor with AVX-512, libx264 would read some that was never written."""
    time, y, x = (each.astype(np.float32) for each in np.mgrid[:64, :64, :112])
    waves = (np.sin(x / 13 + time / 27) * np.cos(y / 9), np.sin(y / 30 + time / 8), np.cos(x / 20 - time / 8))
    frames = (128 + 100 * np.stack(waves, -1)).astype(np.uint8)
    files = set()
    for _ in range(12):
        with VideoWriter(tmp_path / "out.mp4", 112, 64, 16) as writer:
            writer.write(frames)
        files.add((tmp_path / "out.mp4").read_bytes())
    assert len(files) == 1


@pytest.mark.parametrize("channel", [0, 1, 2])
def test_colours_are_bt709(tmp_path, read_video, luma, channel):
    frames = np.zeros((4, 48, 64, 3), np.uint8)
    frames[..., channel] = 255
    with VideoWriter(tmp_path / "flat.mp4", *SIZE, 16) as writer:
        writer.write(frames)
    assert np.abs(read_video(tmp_path / "flat.mp4").luma - luma(frames)).max() < 2


def test_a_key_frame_every_two_seconds_at_least(tmp_path, moving, read_video):
    with VideoWriter(tmp_path / "out.mp4", *SIZE, 16) as writer:
        writer.write(moving(0, 100, *SIZE))
    keys = read_video(tmp_path / "out.mp4").key_frames
    assert keys[0] == 0
    assert max(np.diff([*keys, 100])) <= 32


def test_closing_in_the_middle_keeps_every_frame(tmp_path, moving, read_video):
    path = tmp_path / "out.mp4"
    with pytest.raises(RuntimeError, match="stop here"), VideoWriter(path, *SIZE, 16) as writer:
        writer.write(moving(0, 21, *SIZE))
        raise RuntimeError("stop here")
    assert len(read_video(path).luma) == 21


def test_the_part_of_a_killed_process_plays(tmp_path, moving, read_video):
    writer = VideoWriter(tmp_path / "out.mp4", *SIZE, 16)
    writer.write(moving(0, 200, *SIZE))
    (part,) = tmp_path.iterdir()
    assert part.name.startswith(".out.mp4.") and part.name.endswith(".part")
    luma = read_video(part).luma
    assert len(luma) == writer.frames_on_disk >= 200 - 32 - 60, "all but the last two seconds and the look-ahead"
    writer.close()
    assert len(read_video(tmp_path / "out.mp4").luma) == 200


def test_nothing_written_leaves_what_is_there(tmp_path):
    path = tmp_path / "out.mp4"
    path.write_bytes(b"good")
    with VideoWriter(path, *SIZE, 16):
        pass
    assert path.read_bytes() == b"good"
    assert leftovers(tmp_path, "out.mp4") == []


def test_an_existing_file_is_replaced_at_the_end(tmp_path, moving, read_video):
    path = tmp_path / "out.mp4"
    path.write_bytes(b"old")
    with VideoWriter(path, *SIZE, 16) as writer:
        writer.write(moving(0, 3, *SIZE))
        assert path.read_bytes() == b"old"
    assert len(read_video(path).luma) == 3


def test_a_link_is_followed(tmp_path, moving, read_video):
    (tmp_path / "link.mp4").symlink_to(tmp_path / "real.mp4")
    with VideoWriter(tmp_path / "link.mp4", *SIZE, 16) as writer:
        writer.write(moving(0, 2, *SIZE))
    assert (tmp_path / "link.mp4").is_symlink()
    assert len(read_video(tmp_path / "real.mp4").luma) == 2


@pytest.mark.parametrize("size", [(63, 48), (64, 47), (0, 48), (64, -2)])
def test_odd_sizes_are_refused_by_name(tmp_path, size):
    with pytest.raises(ConfigError, match=f"even width and height, got {size[0]}x{size[1]}"):
        VideoWriter(tmp_path / "out.mp4", *size, 16)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    "frames",
    [np.zeros((2, 48, 64, 3), np.float32), np.zeros((2, 64, 48, 3), np.uint8), np.zeros((48, 64, 3), np.uint8)],
    ids=["dtype", "shape", "rank"],
)
def test_other_frames_are_refused(tmp_path, frames):
    with VideoWriter(tmp_path / "out.mp4", *SIZE, 16) as writer, pytest.raises(ConfigError, match=r"\[T, 48, 64, 3\]"):
        writer.write(frames)


def test_use_after_close(tmp_path, moving):
    writer = VideoWriter(tmp_path / "out.mp4", *SIZE, 16)
    writer.close()
    writer.close()
    with pytest.raises(OutputError, match="closed"):
        writer.write(moving(0, 1, *SIZE))


def test_places_that_cannot_be_written(tmp_path):
    with pytest.raises(OutputError, match="found a folder"):
        check_writable(tmp_path)
    with pytest.raises(OutputError, match="there is no folder"):
        check_writable(tmp_path / "absent" / "out.mp4")
    with pytest.raises(OutputError, match="device"):
        check_writable("/dev/null")
    with pytest.raises(TargetError, match=r"cannot write: File name too long"):
        check_writable(tmp_path / ("x" * 252 + ".mp4"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="there is no folder"):
        check_writable(tmp_path / "file" / "out.mp4")
    check_writable(tmp_path / "fine.mp4")
    assert leftovers(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(OutputError, match="Permission denied"):
        check_writable(tmp_path / "out.mp4")


def limited(script: str, limit: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script that cannot write a file of more than ``limit`` bytes: a full disk for one process."""

    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    # Python ignores SIGXFSZ, so a write beyond the limit fails with EFBIG as it fails with ENOSPC on a full disk.
    return subprocess.run(
        [sys.executable, "-B", "-c", textwrap.dedent(script), *map(str, arguments)],
        preexec_fn=limit_file_size,
        capture_output=True,
        text=True,
    )


FILL_DISK = """
    import sys
    import numpy as np
    from echo_rt.errors import OutputError
    from echo_rt.output.video import VideoWriter
    noise = np.random.default_rng(0)
    writer = VideoWriter(sys.argv[1], 64, 48, 16)
    try:
        for _ in range(int(sys.argv[2])):
            writer.write(noise.integers(0, 256, (12, 48, 64, 3), np.uint8))
        writer.close()
    except OutputError as error:
        print(error)
        writer.close()
    print(writer.frames_on_disk)
"""


def test_a_full_disk_keeps_what_fits(tmp_path, read_video):
    path = tmp_path / "out.mp4"
    done = limited(FILL_DISK, 600_000, path, 40)
    assert done.returncode == 0, done.stderr
    message, frames = done.stdout.splitlines()
    assert str(path) in message and "File too large" in message and f"first {frames} frames are kept" in message
    assert int(frames) >= 32
    assert len(read_video(path).luma) == int(frames)
    assert leftovers(tmp_path, "out.mp4") == []


def test_a_disk_that_fills_up_at_the_end(tmp_path, read_video):
    """The last fragment is written by close: its failure is told, and the fragments before it stay."""
    path = tmp_path / "out.mp4"
    done = limited(FILL_DISK, 100_000, path, 5)  # 60 frames: the first 31 fit, the rest comes with close
    assert done.returncode == 0, done.stderr
    message, frames = done.stdout.splitlines()
    assert "File too large" in message
    assert 0 < int(frames) < 60
    assert len(read_video(path).luma) == int(frames)


def test_a_disk_without_room_for_one_fragment(tmp_path):
    path = tmp_path / "out.mp4"
    path.write_bytes(b"good")
    done = limited(FILL_DISK, 2_000, path, 10)
    assert done.returncode == 0, done.stderr
    assert "it is not kept" in done.stdout
    assert path.read_bytes() == b"good"
    assert leftovers(tmp_path, "out.mp4") == []


MANY_FRAMES = """
    import sys
    from pathlib import Path

    import numpy as np
    from echo_rt.output.contact_sheet import ContactSheet
    from echo_rt.output.latents import LatentsWriter
    from echo_rt.output.video import VideoWriter

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def written():
        return sum(file.stat().st_size for file in folder.iterdir())

    noise = np.random.default_rng(0)
    folder = Path(sys.argv[1])
    with (
        VideoWriter(folder / "v.mp4", 64, 48, 16) as video,
        LatentsWriter(folder / "l.safetensors", (16, 6, 8)) as latents,
        ContactSheet(folder / "s.png", fps=16) as sheet,
    ):
        for block in range(192):
            if block == 96:  # the sheet holds as many pictures after twice as many frames
                before = resident(), written()
            frames = noise.integers(0, 256, (20, 48, 64, 3), np.uint8)
            video.write(frames)
            latents.write(np.zeros((5, 16, 6, 8), np.float32))
            sheet.write(frames)
        print(resident() - before[0], written() - before[1])
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory in use from /proc")
def test_memory_does_not_grow_with_length(tmp_path):
    done = subprocess.run(
        [sys.executable, "-B", "-c", textwrap.dedent(MANY_FRAMES), str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    growth, written = map(int, done.stdout.split())
    assert written > 3_000_000, "enough for something that is kept to show"
    assert growth < written / 4
