"""``generate --segments --snapshot-every --resume``: a video that a kill cannot spoil.

``ECHO_RT_KILLS``: how often the one test with real kills kills (4).
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from echo_rt.engine.prompts import save_prompt_embeds
from echo_rt.output import SegmentRecorder
from echo_rt.snapshot.snapshot import Snapshot
from echo_rt.snapshot.store import snapshot_files

PROMPT = ("--model", "folder", "--prompt", "1")
KILLS = int(os.environ.get("ECHO_RT_KILLS", "4"))
FRAMES = max(249, 90 * KILLS)
LASTING = ("--segments", 2, "--snapshot-every", 2)  # a segment would have three blocks if no snapshot ended it


@pytest.fixture(scope="module")
def prompts(small_model, tmp_path_factory):
    """Embeddings in files, which are quicker than prompts; the second begins with block 4."""
    folder = tmp_path_factory.mktemp("prompts")
    width = json.loads((small_model / "config.json").read_text())["text_dim"]
    for number in (1, 2):
        values = torch.randn(5, width, generator=torch.Generator().manual_seed(number))
        save_prompt_embeds(folder / f"{number}.safetensors", values)
    return ("--prompt-embeds", folder / "1.safetensors", "--prompt-embeds", f"2.5:{folder / '2.safetensors'}")


@pytest.fixture(scope="module")
def model(small_model, prompts):
    checkpoint = small_model / "echo_infinity.pt"
    return ("generate", "--model", small_model, "--checkpoint", checkpoint, "--device", "cpu", "--quiet", *prompts)


@pytest.fixture(scope="module")
def unbroken(model, tmp_path_factory):
    """The latents of a video that is one file, made in one go without snapshots."""
    from echo_rt.cli.main import main

    folder = tmp_path_factory.mktemp("unbroken")
    arguments = (*model, "-o", folder / "v.mp4", "--latents", folder / "l.safetensors", "--frames", FRAMES)
    assert main([str(argument) for argument in arguments]) == 0
    return load_file(folder / "l.safetensors")["latents"]


def recorded(folder: Path) -> torch.Tensor:
    return torch.cat([load_file(file)["latents"] for file in sorted(folder.glob("latents-*.safetensors"))])


LIVES = """
    import os, random, signal, sys
    import echo_rt.cli.generation
    from echo_rt.cli.main import main
    from echo_rt.runtime import Runtime
    from echo_rt.stream import Stream
    from echo_rt.utils.atomic_file import Log, PartFile

    def killed_at(step):
        # kill -9 at this step of loading, generating or writing, whichever thread takes it.
        left = [step]
        def counted(function):
            def act(*given, **named):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*given, **named)
            return act
        for home, name in ((Runtime, "stream"), (Runtime, "resume"), (Stream, "__next__"), (Stream, "snapshot"),
                           (Log, "append"), (PartFile, "append"), (PartFile, "commit")):
            setattr(home, name, counted(getattr(home, name)))

    kills, dice = int(sys.argv[1]), random.Random(4)
    # A process for each life, without importing everything once more.
    for life in range(kills + 1):
        step = 1 if life == 0 else dice.randint(100, 300)
        child = os.fork()
        if child == 0:
            if life < kills:
                killed_at(step)
            os._exit(main(sys.argv[2:]))
        status = os.waitpid(child, 0)[1]
        assert status == (signal.SIGKILL if life < kills else 0), (life, status)
"""


def test_killed_and_resumed_is_the_unbroken_video(model, tmp_path, unbroken, frame_count):
    """One command, killed at random steps until it gets to the end: while it loads, generates, writes."""
    folder = tmp_path / "day"
    arguments = (*model, "-o", folder, "--resume", folder, *LASTING, "--latents", "--frames", FRAMES, "--json")
    command = [sys.executable, "-B", "-c", textwrap.dedent(LIVES), str(KILLS), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    lives = subprocess.run(command, capture_output=True, text=True, env=environment)
    out, err = lives.stdout, lives.stderr
    assert lives.returncode == 0 and "error" not in err, err
    report = json.loads(out.splitlines()[-1])
    assert (report["frames"], report["exit_reason"]) == (FRAMES, "complete")
    assert 0 < report["resumed_at_frame"] < FRAMES
    assert report["latent_frames"] == len(unbroken)
    assert torch.equal(recorded(folder), unbroken)
    assert frame_count(folder / "video.m3u8") == FRAMES
    assert sum(frame_count(file) for file in folder.glob("video-*.mp4")) == FRAMES
    assert not list(folder.glob(".*.part")) and not list(folder.glob("snapshots/.*.part"))
    assert len(snapshot_files(folder / "snapshots")) == 3


def test_stopped_and_resumed(echo_rt, model, tmp_path, unbroken, monkeypatch, frame_count):
    """Ctrl-C takes a snapshot of where the video is, so that nothing has to be made again."""
    folder, count = tmp_path / "day", []
    write = SegmentRecorder.write

    def stop_at_the_fourth(self, chunk, prompt):
        count.append(len(chunk.frames))
        if len(count) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        write(self, chunk, prompt)

    monkeypatch.setattr(SegmentRecorder, "write", stop_at_the_fourth)
    lasting = ("--segments", 100, "--snapshot-every", 3, "--latents", "--frames", 90, "--json")
    outcome = echo_rt(*model, "-o", folder, *lasting)
    assert (outcome.code, outcome.json["exit_reason"]) == (130, "interrupted")
    assert (outcome.json["frames"], outcome.json["segments"]) == (45, 2)
    assert outcome.json["snapshots"] == {"written": 3, "skipped": 0}
    assert outcome.json["files"] == {"video": str(folder / "video.m3u8")}
    outcome = echo_rt(*model, "--resume", folder, "-o", folder, *lasting)
    assert outcome.code == 0, outcome.err
    assert (outcome.json["resumed_at_frame"], outcome.json["blocks"], len(count)) == (45, 4, 8)
    assert [shown["frame"] for shown in outcome.json["prompts"]] == [45]
    assert torch.equal(recorded(folder), unbroken[:24])
    assert frame_count(folder / "video.m3u8") == outcome.json["frames"] == 90
    # Complete, and the same again: the last block, which the end cut short, comes out the same.
    again = echo_rt(*model, "--resume", folder, *lasting)
    assert (again.code, again.json["frames"], again.json["exit_reason"]) == (0, 90, "complete")
    # What is complete can be made longer.
    longer = echo_rt(*model, "--resume", folder, *lasting, "--frames", 120)
    assert longer.code == 0, longer.err
    assert longer.json["resumed_at_frame"] >= 69
    assert torch.equal(recorded(folder), unbroken[:33])


def test_a_folder_that_is_not_there(echo_rt, model, tmp_path):
    """A mistyped one is an error; where ``-o`` names it too, the same command begins the video."""
    folder = tmp_path / "dya"
    lasting = ("--segments", 2, "--snapshot-every", 2, "--frames", 9, "--json")
    outcome = echo_rt(*model, "--resume", folder, *lasting)
    assert outcome.code == 2 and not folder.exists()
    assert outcome.error.startswith(f"--resume: {folder}: ") and "with -o" in outcome.error
    outcome = echo_rt(*model, "--resume", folder, "-o", folder, *lasting)
    assert (outcome.code, outcome.json["frames"]) == (0, 9), outcome.err
    assert outcome.json["warnings"][0] == f"{folder}: nothing to resume there, a new video begins"


KILLED_AMID_ITS_FIRST_SNAPSHOT = """
    import os, signal, sys
    from echo_rt.cli.main import main
    from echo_rt.utils.atomic_file import PartFile
    append = PartFile.append

    def torn(self, data):
        append(self, data)
        if self.path.name.startswith("block-"):
            os.kill(os.getpid(), signal.SIGKILL)

    PartFile.append = torn
    main(sys.argv[1:])
"""


def test_killed_before_it_has_made_anything(echo_rt, model, tmp_path, unbroken):
    """It begins anew, as the same video: a request of another one is refused here too."""
    folder = tmp_path / "day"
    lasting = (*LASTING, "--latents", "--frames", 21)
    command = [sys.executable, "-B", "-c", textwrap.dedent(KILLED_AMID_ITS_FIRST_SNAPSHOT)]
    killed = subprocess.run([*command, *map(str, (*model, "-o", folder, *lasting))])
    assert killed.returncode == -signal.SIGKILL
    assert list(folder.glob("snapshots/.block-*.part")) and not snapshot_files(folder / "snapshots")
    before = state(folder)
    for other, message in (
        (("--seed", 5, "--latents"), "--seed: the video was begun with 0, got 5"),
        ((), "--latents: the recording has some so far"),
    ):
        outcome = echo_rt(*model, "--resume", folder, *LASTING, "--frames", 21, *other)
        assert outcome.code == 2 and message in outcome.error and state(folder) == before
    outcome = echo_rt(*model, "--resume", folder, *lasting, "--json")
    assert (outcome.code, outcome.json["frames"]) == (0, 21), outcome.err
    assert outcome.json["warnings"][0] == f"{folder}: nothing to resume there, a new video begins"
    assert torch.equal(recorded(folder), unbroken[:6]) and not list(folder.glob("snapshots/.block-*.part"))


@pytest.fixture(scope="module")
def made(small_model, model, tmp_path_factory):
    """A video with snapshots at blocks 2, 4 and 6, its end, at frames 21, 45 and 69."""
    from echo_rt.cli.main import main

    folder = tmp_path_factory.mktemp("made") / "day"
    arguments = (*model, "-o", folder, *LASTING, "--latents", "--frames", 69)
    assert main([str(argument) for argument in arguments]) == 0
    return folder


@pytest.fixture
def day(made, tmp_path):
    """A copy of it, for this test alone."""
    return Path(shutil.copytree(made, tmp_path / "day"))


def state(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.filterwarnings("default::RuntimeWarning")
def test_a_damaged_snapshot_is_passed_over(echo_rt, model, day, unbroken):
    newest, older, _ = snapshot_files(day / "snapshots")
    newest.write_bytes(newest.read_bytes()[:-1])
    outcome = echo_rt(*model, "--resume", day, *LASTING, "--latents", "--frames", 93, "--json")
    assert outcome.code == 0, outcome.err
    (warning,) = outcome.json["warnings"]
    assert warning.startswith(f"passed over: {newest}: the snapshot is damaged")
    assert outcome.json["resumed_at_frame"] == 45
    assert torch.equal(recorded(day), unbroken[:24])
    assert older in snapshot_files(day / "snapshots")


def test_it_goes_on_by_what_its_snapshot_names(echo_rt, model, tmp_path, unbroken):
    """Whatever a trial, or here the CPU's default, would choose now."""
    ways, until = ("--attention", "sdpa-math"), ("--latents", "--json", "--frames")
    lasting = ("--segments", 2, "--snapshot-every", 2)
    whole = echo_rt(*model, "-o", tmp_path / "whole", *lasting, *ways, *until, 45)
    begun = echo_rt(*model, "-o", tmp_path / "day", *lasting, *ways, *until, 21)
    resumed = echo_rt(*model, "--resume", tmp_path / "day", *lasting, *until, 45)
    assert whole.code == begun.code == resumed.code == 0, resumed.err
    assert resumed.json["resumed_at_frame"] == 21
    assert torch.equal(recorded(tmp_path / "day"), recorded(tmp_path / "whole"))
    assert not torch.equal(recorded(tmp_path / "day"), unbroken[:12])


def test_it_goes_on_by_the_backend_of_its_snapshot(echo_rt, model, day, unbroken, monkeypatch):
    """And says so; where that is not to be had, what to do. One of before backends were kept is torch's."""
    until = (*LASTING, "--latents", "--json", "--frames", 93)
    newest = snapshot_files(day / "snapshots")[0]
    made = Snapshot.load(newest)
    for name in ("cuda", None):
        ways = {label: way for label, way in made.model["computed_by"].items() if label != "backend"}
        ways |= {} if name is None else {"backend": name}
        dataclasses.replace(made, model={**made.model, "computed_by": ways}).save(newest)
        if name is not None:
            refused = echo_rt(*model, "--resume", day, *until)
            assert refused.code == 2 and refused.error.startswith("backend 'cuda' ")
            assert refused.error.endswith("name another with backend= (--backend) to go on, rounded otherwise")
    monkeypatch.setenv("ECHO_RT_BACKEND", "opencl")  # would be an error, were it asked
    resumed = echo_rt(*model, "--resume", day, *until)
    assert resumed.code == 0, resumed.err
    assert (resumed.json["backend"], resumed.json["backend_reason"]) == ("torch", "as in the snapshot")
    assert resumed.json["resumed_at_frame"] == 69 and torch.equal(recorded(day), unbroken[:24])


@pytest.mark.filterwarnings("default::RuntimeWarning")
@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (None, ("--seed", 5), "--seed: the video was begun with 0, got 5"),
        (None, ("--frames", 60), "--frames: expected a video of 69 frames or more, which are recorded, got one of 60"),
        ("newest", ("--frames", 60), "--frames: expected a video of 69 frames or more, which are recorded"),
        (None, ("--set", "sink_frames=6"), "the snapshot is of another model: sink_frames is 3 in the snapshot"),
        ("size", (), "the recording is 64x32 at 16 fps, the model makes 32x32 at 16"),
        ("script", (), "--prompt: expected the prompts of the 6 blocks made so far: "),
        ("nan", (), "recording.json: expected the index of a recording in segments, found another or a damaged file"),
        ("notes", (), "recording.json: the notes are damaged: "),
        ("latents", (), "--latents: the recording has none so far"),
        (
            "snapshots",
            (),
            "expected snapshots to resume from (--snapshot-every makes them), found a recording of 69 f",
        ),
        ("damage", (), "3 damaged ones"),
        ("foreign", (), "expected a snapshot of the video with seed 0, found one of 1"),
        ("segment", (), "video-00001.mp4: expected"),
        ("index", (), "expected a recording in segments, found no recording.json"),
    ],
)
def test_what_cannot_be_resumed_stays_as_it_is(echo_rt, model, day, change, arguments, message):
    index = day / "recording.json"
    if change == "script":
        index.write_text(index.read_text().replace("1.safetensors", "3.safetensors"))
    elif change == "nan":
        index.write_text(index.read_text().replace('"seconds":2.5', '"seconds":NaN'))
    elif change == "notes":
        index.write_text(index.read_text().replace('"seconds":2.5', '"seconds":[2.5]'))
    elif change == "size":
        index.write_text(index.read_text().replace('"width":32', '"width":64'))
    elif change == "latents":
        head, *segments = map(json.loads, index.read_text().splitlines())
        segments = [segment | {"latents_file": None, "latent_frames": 0, "latents_size": 0} for segment in segments]
        lines = [head | {"latent_shape": None}, *segments]
        index.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    elif change == "snapshots":
        shutil.rmtree(day / "snapshots")
    elif change == "newest":
        snapshot_files(day / "snapshots")[0].unlink()
    elif change == "damage":
        for file in snapshot_files(day / "snapshots"):
            file.write_bytes(b"damage")
    elif change == "foreign":
        newest = snapshot_files(day / "snapshots")[0]
        dataclasses.replace(Snapshot.load(newest), seed=1).save(newest)
    elif change == "segment":
        (day / "video-00001.mp4").unlink()
    elif change == "index":
        index.unlink()
    before = state(day)
    outcome = echo_rt(*model, "--resume", day, *LASTING, "--latents", "--frames", 93, *arguments)
    assert outcome.code == 2 and message in outcome.error
    assert state(day) == before


def test_a_new_video_has_a_place_of_its_own(echo_rt, fake_runtime, day):
    before = state(day)
    outcome = echo_rt("generate", *PROMPT, "-o", day, *LASTING)
    assert outcome.code == 2 and "a recording of 69 frames; resume it" in outcome.error
    assert fake_runtime.loaded_with == {} and state(day) == before


def test_a_snapshot_that_cannot_be_written_ends_the_video(echo_rt, model, tmp_path, monkeypatch, frame_count):
    """At once where it is the first, which is waited for; later with the next that is due."""
    save = Snapshot.save

    def fail_after(good: int):
        def act(self: Snapshot, path: Path) -> None:
            if self.next_block > good:
                save_file({"x": torch.zeros(1)}, tmp_path / "absent" / "x")
            save(self, path)

        return act

    monkeypatch.setattr(Snapshot, "save", fail_after(2))
    outcome = echo_rt(*model, "-o", tmp_path / "day", *LASTING, "--frames", 400, "--json")
    assert outcome.code == 1 and "No such file" in outcome.error
    assert 45 <= outcome.json["frames"] < 400 and outcome.json["exit_reason"] == "error"
    assert outcome.json["snapshots"]["written"] == 2
    assert frame_count(tmp_path / "day" / "video.m3u8") == outcome.json["frames"]
