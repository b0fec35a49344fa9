"""The files of ``generate``: where they may go, and what becomes of them on a full disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from echo_rt.errors import NumericalError, TargetError
from echo_rt.output import LatentsWriter, Recorder

PROMPT = ("--model", "folder", "--prompt", "1")


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize("option", ["-o", "--latents", "--contact-sheet", "--save-prompt-embeds"])
@pytest.mark.parametrize("place", ["absent/x", "folder"])
def test_places_are_checked_before_loading(echo_rt, fake_runtime, tmp_path, monkeypatch, option, place):
    monkeypatch.chdir(tmp_path)
    suffix = {"-o": ".mp4", "--contact-sheet": ".png"}.get(option, ".safetensors")
    Path("folder" + suffix).mkdir()
    outcome = echo_rt("generate", *PROMPT, "-o", "v.mp4", option, place + suffix)
    assert outcome.code == 2
    assert ("no folder absent" if "/" in place else "found a folder") in outcome.error
    assert fake_runtime.loaded_with == {} and files(tmp_path) == ["folder" + suffix]


def test_two_outputs_of_one_name(echo_rt, fake_runtime, tmp_path):
    path = tmp_path / "x.safetensors"
    arguments = ("-o", tmp_path / "v.mp4", "--latents", path, "--save-prompt-embeds", tmp_path / "." / "x.safetensors")
    outcome = echo_rt("generate", *PROMPT, *arguments)
    assert outcome.code == 2
    assert "--latents and --save-prompt-embeds" in outcome.error and "x.safetensors" in outcome.error


@pytest.mark.parametrize(
    ("given", "output", "value", "written"),
    [
        ("--checkpoint", "--latents", "c.safetensors", "c.safetensors"),
        ("--checkpoint", "--latents", "folder.d", "folder.d/model.safetensors"),
        ("--checkpoint", "--latents", "c.safetensors.index.json", "c-00001-of-00002.safetensors"),
        ("--checkpoint", "--latents", "c", "c.safetensors"),
        ("--lora", "--save-prompt-embeds", "c.safetensors", "c.safetensors"),
        ("--lora", "--save-prompt-embeds", "c.safetensors:0.5", "c.safetensors"),
        ("--prompt-embeds", "--latents", "9:c.safetensors", "c.safetensors"),
        ("--prompt-embeds", "--latents", "9:c.safetensors", "link.safetensors"),
        ("--lora", "--latents", "link.safetensors", "c.safetensors"),
    ],
)
def test_an_output_that_is_an_input(echo_rt, fake_runtime, tmp_path, monkeypatch, given, output, value, written):
    monkeypatch.chdir(tmp_path)
    Path("folder.d").mkdir()
    Path("c.safetensors").write_bytes(b"weights")
    Path("link.safetensors").symlink_to("c.safetensors")
    before = files(tmp_path)
    prompts = ("--prompt", "1") if output == "--latents" else PROMPT[2:]
    outcome = echo_rt("generate", "--model", "m", *prompts, "-o", "v.mp4", given, value, output, written)
    assert outcome.code == 2
    assert f"{output}: expected a file apart from what is read, got {written!r}" in outcome.error
    assert f"belongs to {given} {value.removeprefix('9:').removesuffix(':0.5')}" in outcome.error
    assert fake_runtime.loaded_with == {} and files(tmp_path) == before
    assert Path("c.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize("option", ["--model", "--checkpoint", "--lora", "--latents", "--evidence", "--output"])
def test_an_empty_path_is_not_the_folder_one_is_in(echo_rt, fake_runtime, option):
    """As of a shell's variable that is not set."""
    outcome = echo_rt("generate", *PROMPT, "-o", "v.mp4", f"{option}=")
    assert outcome.code == 2 and f"{option}: expected a path, got ''" in outcome.error


@pytest.mark.parametrize(
    ("option", "name", "expected"),
    [
        ("--output", ".mp4", "a name before .mp4, got '.mp4'"),
        ("--contact-sheet", ".PNG", "a name before .png, got '.PNG'"),
        ("--save-prompt-embeds", ".safetensors", "a name before .safetensors, got '.safetensors'"),
        ("--save-prompt-embeds", "/", "a name that ends in .safetensors, got '/'"),
    ],
)
def test_a_name_that_is_an_ending_alone(echo_rt, fake_runtime, option, name, expected):
    outcome = echo_rt("generate", *PROMPT, "--prompt", "9: 2", "-o", "v.mp4", option, name)
    assert outcome.code == 2 and f"{option}: expected {expected}" in outcome.error and fake_runtime.loaded_with == {}


def test_a_link_in_the_model_folder_is_followed(echo_rt, fake_runtime, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("weights.safetensors").write_bytes(b"weights")
    Path("folder/model.safetensors").symlink_to(tmp_path / "weights.safetensors")
    outcome = echo_rt("generate", *PROMPT, "-o", "v.mp4", "--frames", 9, "--latents", "weights.safetensors")
    assert outcome.code == 2 and "belongs to --model folder" in outcome.error
    assert echo_rt("generate", *PROMPT, "-o", "v.mp4", "--frames", 9, "--latents", "l.safetensors").code == 0


def test_outputs_beside_the_inputs_are_fine(echo_rt, fake_runtime, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    outputs = ("-o", "c-new.mp4", "--latents", "c-new.safetensors", "--contact-sheet", "folder.png")
    outcome = echo_rt("generate", *PROMPT, "--checkpoint", "c.safetensors", "--lora", "c.pt", *outputs, "--frames", 9)
    assert outcome.code == 0, outcome.err
    assert files(tmp_path) == ["c-new.mp4", "c-new.safetensors", "folder", "folder.png"]


def test_a_full_disk(echo_rt, fake_runtime, tmp_path, frame_count, monkeypatch):
    from echo_rt.utils.atomic_file import PartFile

    append = PartFile.append

    def append_to_small_disk(part: PartFile, data: bytes) -> None:
        if part.size + len(data) > 4_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(part, data)

    monkeypatch.setattr(PartFile, "append", append_to_small_disk)
    outcome = echo_rt("generate", *PROMPT, "-o", tmp_path / "v.mp4", "--frames", 1000, "--json")
    assert outcome.code == 1
    assert "No space left on device" in outcome.error and str(tmp_path / "v.mp4") in outcome.error
    assert 0 < outcome.json["frames"] < 1000
    assert frame_count(tmp_path / "v.mp4") == outcome.json["frames"]


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def all_outputs(tmp_path):
    outputs = ("-o", tmp_path / "v.mp4", "--latents", tmp_path / "l.safetensors", "--contact-sheet", tmp_path / "s.png")
    return ("generate", *PROMPT, *outputs, "--frames", 21, "--json")


def fill_disk_for(monkeypatch, *names: str) -> None:
    """At the end no more goes into these files: neither the sheet's picture nor the latents' header."""
    from echo_rt.utils.atomic_file import PartFile

    append, overwrite = PartFile.append, PartFile.overwrite
    monkeypatch.setattr(
        PartFile, "append", lambda part, data: (no_space if part.path.name in names[:1] else append)(part, data)
    )
    monkeypatch.setattr(
        PartFile,
        "overwrite",
        lambda part, at, data: (no_space if part.path.name in names else overwrite)(part, at, data),
    )


def test_a_sheet_that_was_not_written_is_not_listed(echo_rt, fake_runtime, tmp_path, monkeypatch, all_outputs):
    fill_disk_for(monkeypatch, "s.png")
    outcome = echo_rt(*all_outputs)
    assert outcome.code == 1
    assert outcome.error == f"{tmp_path / 's.png'}: cannot write: No space left on device"
    assert sorted(outcome.json["files"]) == ["latents", "video"]
    assert (outcome.json["frames"], outcome.json["exit_reason"]) == (21, "error")
    assert "warnings" not in outcome.json
    assert files(tmp_path) == ["l.safetensors", "v.mp4"]


def test_every_file_that_cannot_be_finished_is_named(echo_rt, fake_runtime, tmp_path, monkeypatch, all_outputs):
    fill_disk_for(monkeypatch, "s.png", "l.safetensors")
    outcome = echo_rt(*all_outputs)
    assert outcome.code == 1
    assert outcome.error == f"{tmp_path / 'l.safetensors'}: cannot write: No space left on device"
    assert outcome.json["warnings"] == [f"{tmp_path / 's.png'}: cannot write: No space left on device"]
    assert f"echo-rt: warning: {outcome.json['warnings'][0]}\n" in outcome.err
    assert (outcome.json["files"], outcome.json["latent_frames"]) == ({"video": str(tmp_path / "v.mp4")}, 0)
    assert files(tmp_path) == ["v.mp4"]


def test_an_error_at_the_end_does_not_hide_the_one_before(echo_rt, fake_runtime, tmp_path, monkeypatch, all_outputs):
    fill_disk_for(monkeypatch, "s.png")

    def fail(block: int) -> None:
        if block == 1:
            raise NumericalError("block 1: NaN")

    fake_runtime.before_block = fail
    outcome = echo_rt(*all_outputs)
    assert outcome.error == "block 1: NaN"
    assert outcome.json["warnings"] == [f"{tmp_path / 's.png'}: cannot write: No space left on device"]


def test_a_bug_in_one_writer_does_not_cost_the_next_file(echo_rt, fake_runtime, monkeypatch, all_outputs):
    def fail(writer: LatentsWriter) -> None:
        writer._part.discard()  # an open file would be found in another test
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(LatentsWriter, "close", fail)
    outcome = echo_rt(*all_outputs)
    assert outcome.code == 1 and "a bug" in outcome.error
    assert sorted(outcome.json["files"]) == ["contact_sheet", "video"]


@pytest.mark.parametrize("option", ["--checkpoint", "--lora", "--prompt-embeds", "-o", "--latents"])
def test_a_name_that_no_file_can_have(echo_rt, fake_runtime, tmp_path, monkeypatch, option):
    monkeypatch.chdir(tmp_path)
    name = "x" * 300 + (".mp4" if option == "-o" else ".safetensors")
    name = f"9:{name}" if option == "--prompt-embeds" else name
    outcome = echo_rt("generate", *PROMPT, "-o", "v.mp4", option, name, "--frames", 9)
    if option in ("--checkpoint", "--lora"):
        assert outcome.code == 0, "whether these can be read is for the runtime to say"
    else:
        expected = "cannot read prompt embeddings" if option == "--prompt-embeds" else "name too long"
        assert outcome.code == 2 and expected in outcome.error


def test_a_file_that_cannot_be_begun_leaves_no_other(tmp_path):
    with pytest.raises(TargetError, match="no folder"):
        Recorder(
            tmp_path / "v.mp4",
            tmp_path / "l.safetensors",
            tmp_path / "absent" / "s.png",
            frame_size=(16, 16),
            fps=16,
            latent_shape=(4, 2, 2),
        )
    assert files(tmp_path) == []


@pytest.mark.parametrize("option", ["-o", "--latents", "--contact-sheet", "--save-prompt-embeds"])
@pytest.mark.parametrize("content", [b"good", b""], ids=["file", "empty"])
def test_an_existing_file_is_replaced_on_request_only(echo_rt, fake_runtime, tmp_path, monkeypatch, option, content):
    monkeypatch.chdir(tmp_path)
    name = {"-o": "keep.mp4", "--contact-sheet": "keep.png"}.get(option, "keep.safetensors")
    Path(name).write_bytes(content)
    arguments = ("generate", *PROMPT, "--frames", 9, "-o", "v.mp4", option, name)
    outcome = echo_rt(*arguments)
    known = option.replace("-o", "--output")
    assert outcome.code == 2
    assert outcome.error == f"{known}: expected the name of a new file, {name} exists; --overwrite replaces it"
    assert fake_runtime.loaded_with == {} and files(tmp_path) == [name] and Path(name).read_bytes() == content
    assert echo_rt(*arguments, "--overwrite").code == 0 and Path(name).stat().st_size > 100


def test_the_encoding_of_the_video(echo_rt, fake_runtime, tmp_path):
    import av

    def made(name: str, *options: object) -> tuple[str, int, bytes]:
        outcome = echo_rt("generate", *PROMPT, "-o", tmp_path / name, "--frames", 30, *options)
        assert outcome.code == 0, outcome.err
        with av.open(str(tmp_path / name)) as container:
            codec = container.streams.video[0].codec_context.name
        content = (tmp_path / name).read_bytes()
        return codec, len(content), content

    codec, size, content = made("default.mp4")
    assert codec == "h264" and b"moof" not in content
    same = made("same.mp4", "--codec", "h264", "--preset", "veryfast", "--crf", "18")[2]
    assert content == same, "these are the defaults"
    assert made("worse.mp4", "--crf", 51)[1] < size
    assert made("slow.mp4", "--preset", "slow")[2] != content
    assert b"moof" in made("fragmented.mp4", "--fragmented")[2]
    assert made("hevc.mp4", "--codec", "hevc", "--preset", "ultrafast", "--crf", 30)[0] == "hevc"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--codec h263", "codec: expected one of h264, hevc, av1, h264_nvenc, hevc_nvenc, av1_nvenc, got 'h263' (did"),
        ("--codec h265", "(did you mean 'hevc'?)"),
        ("--preset verifast", "(did you mean 'veryfast'?)"),
        ("--preset quick", "preset of h264: expected one of ultrafast, superfast, "),
        ("--codec av1 --preset veryfast", "preset of av1: expected one of 0, 1, "),
        ("--crf 52", "crf of h264: expected 0 (best) to 51, got 52"),
        ("--codec av1 --crf 64", "crf of av1: expected 0 (best) to 63, got 64"),
        ("--crf -1", "--crf: expected a number of 0 or more"),
        ("--crf nan", "--crf: expected a number of 0 or more"),
        ("--fragmented --segments 1", "--fragmented: expected no --segments with it"),
    ],
)
def test_an_encoding_that_there_is_not(echo_rt, fake_runtime, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    outcome = echo_rt("generate", *PROMPT, "-o", "v.mp4", *options.split())
    assert outcome.code == 2 and message in outcome.error
    assert fake_runtime.loaded_with == {} and files(tmp_path) == []


def test_an_encoder_that_cannot_run_here(echo_rt, fake_runtime, tmp_path):
    import av

    try:
        with av.open(os.devnull, "w", format="null") as container:
            stream = container.add_stream("h264_nvenc", rate=16)
            stream.width = stream.height = 256
            stream.codec_context.open()
    except (av.FFmpegError, ValueError):
        outcome = echo_rt("generate", *PROMPT, "-o", tmp_path / "v.mp4", "--codec", "h264_nvenc")
        assert outcome.code == 2
        assert "h264_nvenc: needs an NVIDIA GPU" in outcome.error or "the encoder h264_nvenc of PyAV" in outcome.error
        assert fake_runtime.loaded_with == {} and files(tmp_path) == []
    else:
        pytest.skip("h264_nvenc works here")


def test_what_encoding_holds_up_is_told(echo_rt, fake_runtime, tmp_path, monkeypatch):
    def held_up(self: Recorder) -> None:
        self.held_up = 5.0

    monkeypatch.setattr(Recorder, "drain", held_up)
    outcome = echo_rt("generate", *PROMPT, "-o", tmp_path / "v.mp4", "--frames", 9, "--json")
    assert outcome.json["held_up_seconds"] == 5.0
    (warning,) = outcome.json["warnings"]
    assert warning.startswith("encoding the video held up its blocks for 5.0 of ") and "--preset" in warning
