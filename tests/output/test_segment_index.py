"""The index of a recording: what a piece costs, recordings of earlier versions, what others put into the folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzing import one_line
from hypothesis import example, given
from hypothesis import strategies as st

from echo_rt.cli.generation import Notes
from echo_rt.errors import OutputError, TargetError
from echo_rt.output.segments import RecordingIndex, SegmentedWriter
from echo_rt.output.video import VideoWriter
from echo_rt.utils.checked_json import convert

av = pytest.importorskip("av")

SIZE = (64, 48)


def block(number: int) -> np.ndarray:
    return np.full((12, SIZE[1], SIZE[0], 3), 10 * number % 256, np.uint8)


def frames_of(folder: Path, playlist: str = "video.m3u8") -> list[float]:
    with av.open(str(folder / playlist)) as container:
        return [frame.time for frame in container.decode(video=0)]


def begin(folder: Path, **options: Any) -> SegmentedWriter:
    return SegmentedWriter(folder, *SIZE, 16, seconds=0.75, **options)


def of_an_earlier_version(folder: Path, pieces: int) -> None:
    """Version 1: the index is one object, each file begins at 0 seconds, and the list is FFmpeg's own."""
    folder.mkdir()
    segments = []
    for number in range(pieces):
        with VideoWriter(folder / f"video-{number:05}.mp4", *SIZE, 16, fragmented=True) as writer:
            writer.write(block(number))
        entry = {"file": writer.path.name, "first_frame": 12 * number, "frames": 12, "size": writer.size}
        segments.append(entry | {"latents_file": None, "latent_frames": 0, "latents_size": 0})
    head = {"format": "echo-rt recording", "version": 1, "width": SIZE[0], "height": SIZE[1], "fps": "16"}
    content = head | {"latent_shape": None, "notes": {"seed": 3}, "segments": segments}
    (folder / "recording.json").write_text(json.dumps(content))
    (folder / "video.ffconcat").write_text("ffconcat version 1.0\n")


def test_a_recording_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    of_an_earlier_version(folder, 3)
    assert RecordingIndex.read(folder).frames == 36
    with SegmentedWriter.resume(folder, 24, seconds=0.75) as writer:
        assert isinstance(writer, SegmentedWriter) and writer.notes == {"seed": 3}
        for number in range(2, 5):
            writer.write(block(number))
    assert [segment.frames for segment in RecordingIndex.read(folder).segments] == [12] * 5
    assert writer.playlist == folder / "video.ffconcat", "the list that goes with such segments"
    assert frames_of(folder, writer.playlist.name) == pytest.approx([number / 16 for number in range(60)], abs=1e-4)
    with SegmentedWriter.resume(folder, 0, seconds=0.75) as writer:
        assert isinstance(writer, SegmentedWriter)
        writer.write(block(0))
    assert len(frames_of(folder)) == 12 and not (folder / "video.ffconcat").exists()


def test_another_encoding_goes_on_too(tmp_path: Path) -> None:
    with begin(tmp_path / "r") as writer:
        writer.write(block(0))
    with SegmentedWriter.resume(tmp_path / "r", 12, seconds=0.75, codec="hevc") as writer:
        writer.write(block(1))
    with SegmentedWriter.resume(tmp_path / "r", 24, seconds=0.75) as writer:
        writer.write(block(2))
    lines = (tmp_path / "r" / "video.m3u8").read_text().splitlines()
    maps = [line for line in lines if line.startswith("#EXT-X-MAP")]
    assert len(maps) == 3 and maps[0] == maps[2] != maps[1] and lines.count("#EXT-X-DISCONTINUITY") == 2
    assert len(list((tmp_path / "r").glob("init-*.mp4"))) == 2


def test_the_playlist_grows_by_what_players_have_not_seen(tmp_path: Path) -> None:
    writer = begin(tmp_path / "r")
    seen = b""
    for number in range(3):
        writer.write(block(number))
        content = writer.playlist.read_bytes()
        assert content.startswith(seen) and b"ENDLIST" not in content
        seen = content
    writer.write(np.concatenate([block(0)] * 4))  # longer than the list has promised
    assert b"#EXT-X-TARGETDURATION:4\n" in writer.playlist.read_bytes()
    writer.close()
    assert writer.playlist.read_bytes().endswith(b"#EXT-X-ENDLIST\n")
    assert frames_of(tmp_path / "r") == pytest.approx([number / 16 for number in range(84)])


def test_notes_that_change_reach_the_disk(tmp_path: Path) -> None:
    writer = begin(tmp_path / "r", notes={"a": 1})
    writer.write(block(0))
    writer.notes["a"] = 2
    writer.write(block(1))
    writer.write(block(2))
    read = RecordingIndex.read(tmp_path / "r")
    assert read.notes == {"a": 2} and [segment.notes for segment in read.segments] == [None, {"a": 2}, None]
    writer.close()
    with SegmentedWriter.resume(tmp_path / "r", 36, seconds=1) as again:
        assert again.notes == {"a": 2}


def cost_of_a_piece(folder: Path, pieces: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Calls and bytes of one more piece of a recording that has ``pieces``, as the system counts them."""
    begin(folder).close()
    with (folder / "recording.json").open("ab") as index:
        for number in range(pieces):
            segment = {"file": f"video-{number:05}.mp4", "first_frame": 12 * number, "frames": 12, "size": 1000}
            index.write(json.dumps(segment | {"init": "init-00000000.mp4"}).encode() + b"\n")
    monkeypatch.setattr(RecordingIndex, "keep", lambda *_: None)
    writer = SegmentedWriter.resume(folder, 12 * pieces, seconds=0.75)
    writer.write(block(1))  # with the header of this process

    def counted() -> dict[str, int]:
        lines = Path("/proc/self/io").read_text().splitlines()
        return {name: int(value) for name, value in (line.split(":") for line in lines)}

    before = counted()
    writer.write(block(1))
    after = counted()
    writer.close()
    assert RecordingIndex.read(folder).frames == 12 * (pieces + 2)
    return {name: after[name] - before[name] for name in ("rchar", "wchar", "syscr", "syscw")}


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system does not count what a process reads")
def test_a_piece_costs_the_same_after_a_week(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cost_of_a_piece(tmp_path / "new", 10, monkeypatch)
    late = cost_of_a_piece(tmp_path / "old", 60_480, monkeypatch)
    assert (late["syscr"], late["syscw"]) == (first["syscr"], first["syscw"])
    assert abs(late["wchar"] - first["wchar"]) < 100 and abs(late["rchar"] - first["rchar"]) < 200
    assert late["wchar"] < 10_000


# ---- what others put into the folder


@pytest.mark.parametrize("name", ["recording.json", "video.m3u8", "video-00001.mp4", "init"])
@pytest.mark.parametrize("hard", [False, True], ids=["link", "hard link"])
def test_nothing_is_written_through_a_link(tmp_path: Path, name: str, hard: bool) -> None:
    folder, outside = tmp_path / "r", tmp_path / "outside"
    begin(folder).close()
    with begin(folder) as writer:
        writer.write(block(0))
    if name == "init":
        name = next(folder.glob("init-*.mp4")).name
    outside.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"of somebody else")
    before = outside.read_bytes()
    (folder / name).unlink(missing_ok=True)
    if hard:
        (folder / name).hardlink_to(outside)
    else:
        (folder / name).symlink_to(outside)
    try:
        with SegmentedWriter.resume(folder, 12, seconds=0.75) as writer:
            writer.write(block(1))
            writer.write(block(2))
    except TargetError as error:
        assert name == "recording.json" and "found a link" in str(error)
    else:
        assert len(frames_of(folder)) == 36
    assert outside.read_bytes() == before


@pytest.mark.parametrize("name", ["recording.json", "video-00000.mp4"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "r"
    with begin(folder) as writer:
        writer.write(block(0))
    (folder / name).unlink()
    os.mkfifo(folder / name)
    script = """
        import sys
        from echo_rt.errors import TargetError
        from echo_rt.output.segments import SegmentedWriter
        try:
            SegmentedWriter.resume(sys.argv[1], 12, seconds=1)
        except TargetError as error:
            print(error)
    """
    command = [sys.executable, "-B", "-c", textwrap.dedent(script), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "a pipe" in done.stdout and done.returncode == 0, done.stderr


def test_a_folder_that_is_moved_stays_its_own(tmp_path: Path) -> None:
    """Another one of its name is left alone; the recording is whole where it is."""
    folder, moved = tmp_path / "r", tmp_path / "r.old"
    writer = begin(folder)
    writer.write(block(0))
    folder.rename(moved)
    folder.mkdir()
    (folder / "recording.json").write_text("of somebody else")
    writer.write(block(1))
    writer.write(block(2)[:5])
    writer.close()
    assert [file.read_text() for file in folder.iterdir()] == ["of somebody else"]
    assert RecordingIndex.read(moved).frames == len(frames_of(moved)) == 29
    assert not list(moved.glob(".*"))


@pytest.mark.parametrize("name", ["recording.json", "video.m3u8"])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_list_that_is_removed_amid_the_recording_ends_it(tmp_path: Path, name: str, replaced: bool) -> None:
    writer = begin(tmp_path / "r")
    writer.write(block(0))
    (tmp_path / "r" / name).unlink()
    if replaced:
        (tmp_path / "r" / name).write_text("another")
    with pytest.raises(OutputError, match="cannot write: somebody removed, replaced or changed") as caught:
        writer.write(block(1))
    assert caught.value.exit_code == 1
    with pytest.raises(OutputError) if name == "video.m3u8" else nullcontext():
        writer.close()
    if replaced:
        assert (tmp_path / "r" / name).read_text() == "another"


def test_a_folder_that_is_gone_is_no_mistake_in_the_request(tmp_path: Path) -> None:
    writer = begin(tmp_path / "r")
    for file in (tmp_path / "r").iterdir():
        file.unlink()
    (tmp_path / "r").rmdir()
    with pytest.raises(OutputError) as caught:
        writer.write(block(0))
    assert caught.value.exit_code == 1


# ---- an index of any content


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "recording.json").read_text().splitlines()]


WORDS = st.sampled_from(
    [None, True, 0, -1, 1, 2**63, 10**40, 1.5, float("nan"), "", "16", "1/0", "video-00000.mp4", "../a", [], [[]], {}]
)
KEYS = ["format", "version", "width", "height", "fps", "latent_shape", "notes", "segments", "file", "first_frame"]
KEYS += ["frames", "size", "latents_file", "latent_frames", "latents_size", "init"]
NOTES = st.dictionaries(st.sampled_from(["script", "seed", "from", "hidden_frames"]), st.one_of(WORDS, st.lists(WORDS)))
EDITS = st.lists(st.tuples(st.integers(0, 2), st.sampled_from(KEYS), st.one_of(WORDS, NOTES)), max_size=3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("whole") / "r"
    with begin(folder, notes={"seed": 3}) as writer:
        writer.write(block(0))
        writer.write(block(1))
    return lines_of(folder)


def only_a_clear_error(folder: Path, content: bytes) -> None:
    (folder / "recording.json").write_bytes(content)
    try:
        index = RecordingIndex.read(folder)
    except TargetError as error:
        one_line(error)
        return
    assert index.frame_rate > 0 and index.frames == sum(segment.frames for segment in index.segments)
    assert b"".join(index.lines).count(b"\n") == 1 + len(index.segments)
    try:
        convert(index.notes, Notes, "notes", TargetError)
    except TargetError as error:
        one_line(error)


@pytest.fixture(scope="module")
def somewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("somewhere")


@given(edits=EDITS, torn=st.integers(0, 40))
def test_changed_fields(somewhere: Path, whole: list[dict[str, Any]], edits: list[Any], torn: int) -> None:
    lines = [dict(line) for line in whole]
    for number, key, value in edits:
        lines[number][key] = value
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    only_a_clear_error(somewhere, content[: len(content) - torn])


@given(content=st.binary(max_size=200))
def test_any_bytes(somewhere: Path, whole: list[dict[str, Any]], content: bytes) -> None:
    only_a_clear_error(somewhere, content)
    only_a_clear_error(somewhere, json.dumps(whole[0]).encode() + b"\n" + content)


@given(depth=st.integers(0, 3000))
@example(depth=100_000)
def test_any_depth(somewhere: Path, whole: list[dict[str, Any]], depth: int) -> None:
    head = json.dumps(whole[0] | {"notes": {"a": "DEEP"}}).replace('"DEEP"', "[" * depth + "]" * depth)
    only_a_clear_error(somewhere, head.encode() + b"\n")
