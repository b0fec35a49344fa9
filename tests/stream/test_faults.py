"""What a stream's owner sees when the machine fails under it: the first error, and a way to go on."""

from __future__ import annotations

import gc
import json
import logging
import resource
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from faults import ILLEGAL, LostDevice, file_system_of, fill, nan_in
from safetensors.torch import load_file
from streaming import embeds, load, same, take, video, within

import echo_rt
from echo_rt import Guard, NumericalError, Snapshot, StallError, StreamError
from echo_rt.cli.main import main
from echo_rt.engine.executor import CudaExecutor, Event, Executor, Queue
from echo_rt.engine.prompts import save_prompt_embeds
from echo_rt.weights.tiny_model import CHECKPOINT_FILE

FEW_STEPS = {"denoising_steps": (1000, 500)}


@pytest.fixture(params=[0, 1])
def lookahead(request: pytest.FixtureRequest) -> int:
    assert isinstance(request.param, int)
    return request.param


# -------------------------------------------------------------------- a device that is lost


def test_a_lost_device_fails_the_stream_with_the_first_error(
    lookahead: int,
    small_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    runtime = load(small_model, lookahead=lookahead, overrides=FEW_STEPS)
    kv = weakref.ref(runtime._engine.rollout.state.kv)  # type: ignore[union-attr]
    with monkeypatch.context() as patch:
        stream = runtime.stream(prompt_embeds=embeds(runtime))
        with pytest.raises(RuntimeError, match=rf"{ILLEGAL} \(number 1\)"), runtime, stream:
            made = take(stream, 2)
            stream.snapshot(tmp_path / "s.safetensors")
            lost = LostDevice(patch, 4)
            take(stream, 10)
        assert stream.failure is not None and "(number 1)" in stream.failure
        for use in (lambda: next(stream), stream.snapshot, lambda: runtime.stream(prompt_embeds=torch.ones(2, 32))):
            with pytest.raises(StreamError):
                use()
        assert lost.errors == 2, "the device was asked again after the runtime was closed"
        runtime.close()
        assert lost.errors == 2
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING and "closing the runtime: CUDA error" in warning.getMessage()
    assert "\n" not in warning.getMessage()

    gc.collect()
    assert kv() is None, "a buffer is held by a runtime that is closed"
    with load(small_model, lookahead=lookahead, overrides=FEW_STEPS) as another:
        expected = video(another, 5)
        with another.resume(Snapshot.load(tmp_path / "s.safetensors")) as again:
            assert same(made + take(again, 3), expected)


def test_a_device_that_is_lost_while_evidence_is_kept(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was found in the block is told, and not what was met on the way to its evidence."""
    with load(small_model, overrides=FEW_STEPS) as runtime, monkeypatch.context() as patch:
        stream = runtime.stream(prompt_embeds=embeds(runtime), guard=Guard(evidence=tmp_path))
        nan_in(patch, 1)
        next(stream)
        lost = LostDevice(patch, 2)
        finish = type(stream._engine.pipeline).finish  # type: ignore[union-attr]

        def finish_and_lose(*arguments: Any) -> Any:
            made = finish(*arguments)
            lost.errors += 1
            return made

        patch.setattr(type(stream._engine.pipeline), "finish", finish_and_lose)  # type: ignore[union-attr]
        with pytest.raises(NumericalError, match=rf"block 1: latent: .*; no evidence: {ILLEGAL}") as error:
            next(stream)
        assert "\n" not in str(error.value)


# -------------------------------------------------------------------- a block without an end


def test_closing_does_not_wait_for_a_block_that_never_comes(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given_up: list[float] = []

    def synchronize(executor: Executor) -> None:
        if not given_up:
            threading.Event().wait()  # as the driver does
        raise StallError("the device is still busy")

    runtime = load(small_model, lookahead=1, overrides=FEW_STEPS)
    stream = runtime.stream(prompt_embeds=embeds(runtime), guard=Guard(block_seconds=30.0))
    next(stream)
    with monkeypatch.context() as patch:
        patch.setattr(Event, "wait", lambda event, seconds=None: seconds is None and synchronize(Executor()))
        patch.setattr(Executor, "synchronize", synchronize)
        patch.setattr(Executor, "close", synchronize)
        patch.setattr(Executor, "give_up", lambda executor, seconds: given_up.append(seconds))
        with pytest.raises(StallError, match="block 1 is not there; a block may take 30 s"):
            within(120, lambda: next(stream))
        with pytest.raises(StallError, match="still busy"):
            within(120, lambda: runtime.stream(prompt_embeds=embeds(runtime)))
        within(120, runtime.close)
    assert given_up == [30.0] and "closing the runtime: the device is still busy" in caplog.text


def test_a_gpu_that_was_given_up_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The executor of GPUs, without one: its queues are never idle, and then they are."""
    synchronized: list[str] = []
    caller: Any = SimpleNamespace(synchronize=lambda: synchronized.append("caller"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: caller)
    executor, idle = object.__new__(CudaExecutor), [False]
    executor._device, executor._patience = torch.device("cuda", 0), None
    executor._graphs, executor._events = {1: 1}, {1: 1}  # type: ignore[dict-item]
    queue: Any = SimpleNamespace(query=lambda: idle[0], synchronize=lambda: synchronized.append("queue"))
    executor._streams = {Queue.MAIN: queue}
    executor.synchronize()
    assert synchronized == ["caller", "queue"], "without give_up it waits as ever"
    executor.give_up(0.05)
    with pytest.raises(StallError, match=r"cuda:0 is still busy after 0\.05 s more"):
        within(120, executor.synchronize)
    with pytest.raises(StallError):
        executor.close()
    assert len(synchronized) == 2 and executor._graphs and executor._events, "they may be running"
    threading.Timer(0.1, lambda: idle.__setitem__(0, True)).start()
    executor.give_up(10.0)
    executor.synchronize()
    assert len(synchronized) == 4 and executor._patience is None
    executor.close()
    assert not (executor._graphs or executor._events)


# -------------------------------------------------------------------- consumers


def test_a_consumer_that_dies_leaves_the_stream_to_others(small_model: Path) -> None:
    """Its thread ends with an exception between two blocks, the stream in its hands."""
    with load(small_model, overrides=FEW_STEPS) as runtime:
        expected = video(runtime, 4)
        stream = runtime.stream(prompt_embeds=embeds(runtime))
        made: list[echo_rt.Chunk] = []

        def consume() -> None:
            for chunk in stream:
                made.append(chunk)
                if len(made) == 2:
                    raise OSError("the socket is gone")

        with pytest.raises(OSError, match="the socket is gone"):
            within(60, consume)
        assert stream.failure is None and same(made + within(60, lambda: take(stream, 2)), expected)


# -------------------------------------------------------------------- a full disk


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may be longer than 4096 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("policy", ["stop", "roll_back"])
def test_no_room_for_evidence(
    policy: str,
    small_model: Path,
    tmp_path: Path,
    small_files: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    guard = Guard(policy, evidence=tmp_path / "evidence")
    with load(small_model, overrides=FEW_STEPS) as runtime, monkeypatch.context() as patch:
        nan_in(patch, 2)
        stream = runtime.stream(prompt_embeds=embeds(runtime), guard=guard)
        if policy == "stop":
            with pytest.raises(NumericalError, match=r"block 2: latent: .*; no evidence: .*File too large"):
                take(stream, 3)
        else:
            assert all(torch.isfinite(chunk.latents).all() for chunk in take(stream, 4)) and stream.rollbacks == 1
            assert "no evidence" in caplog.text and "File too large" in caplog.text
    assert not list(tmp_path.glob("evidence/*")), "half a file is no evidence"


# -------------------------------------------------------------------- generate


@pytest.fixture
def command(small_model: Path, tmp_path: Path) -> list[object]:
    width = json.loads((small_model / "config.json").read_text())["text_dim"]
    save_prompt_embeds(tmp_path / "p.safetensors", torch.ones(4, width))
    model = ["--model", small_model, "--checkpoint", small_model / CHECKPOINT_FILE, "--device", "cpu"]
    prompt = ["--prompt-embeds", tmp_path / "p.safetensors", "--set", "denoising_steps=1000"]
    return ["generate", *model, *prompt, "--quiet", "--json", "--segments", 2, "--latents"]


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any], str]:
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, json.loads(out), err


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with file_system_of(8 * 2**20, tmp_path / "disk") as folder:
        yield folder


def recorded(folder: Path) -> torch.Tensor:
    return torch.cat([load_file(file)["latents"] for file in sorted(folder.glob("latents-*.safetensors"))])


def frames(blocks: int) -> int:
    return 9 + 12 * (blocks - 1)


def begun_or_not(folder: Path) -> list[object]:
    """The options by which one command begins a video and goes on with it."""
    return ["-o", folder, "--resume", folder]


def test_a_recording_goes_on_behind_a_rollback(
    command: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The snapshot's seed is another one then, and its blocks' numbers are behind the video's."""
    guarded = [*command, "--snapshot-every", 4, "--roll-back", "--evidence", tmp_path / "evidence"]
    for name, lengths in (("whole", [9]), ("broken", [6, 9])):
        folder = tmp_path / name
        with monkeypatch.context() as patch:
            nan_in(patch, 5)
            for length in lengths:
                code, report, _ = call(capsys, *guarded, *begun_or_not(folder), "--frames", frames(length))
                assert (code, report["frames"], report["exit_reason"]) == (0, frames(length), "complete")
                assert report["rollbacks"] == (length == lengths[0])
    found = Snapshot.load(tmp_path / "broken" / "snapshots" / "block-0000000009.safetensors")
    assert found.offset > 0 and found.seed != 0
    assert torch.equal(recorded(tmp_path / "broken"), recorded(tmp_path / "whole"))
    assert torch.isfinite(recorded(tmp_path / "whole")).all() and len(recorded(tmp_path / "whole")) == 27
    names = sorted(file.name for file in (tmp_path / "evidence").iterdir())
    told = [f"block-00000005{time}{kind}" for time in ("", "-2") for kind in (".json", ".safetensors")]
    before = [f"block-00000005{time}-before.safetensors" for time in ("", "-2")]
    assert names == sorted(told + before), "of both times that the block went wrong"
    code, report, _ = call(capsys, *guarded, "--resume", folder, "--frames", frames(12), "--seed", found.seed)
    assert code == 2 and report["error"] == f"--seed: the video was begun with 0, got {found.seed}"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--block-seconds", 1e-9), "StallError|block 0 took .* s; a block may take 1e-09 s"),
        (("--block-seconds", 0), "--block-seconds: expected a number above 0, got '0'"),
    ],
)
def test_a_recording_with_a_bound(
    options: tuple[object, ...],
    words: str,
    command: list[object],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, report, err = call(capsys, *command, "-o", tmp_path / "day", "--frames", 9, *options)
    assert code == (2 if options[1] == 0 else 1) and "Traceback" not in err
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(report["error"])


@pytest.mark.parametrize("leave", [0, 150_000])
def test_a_disk_fills_up_under_a_recording(
    leave: int,
    small_disk: Path,
    command: list[object],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from echo_rt.cli.progress import ProgressReport

    lasting = [*command, "--snapshot-every", 2, *begun_or_not(small_disk / "day"), "--frames", frames(12)]
    count = ProgressReport.block_done

    def filling(report: ProgressReport, *arguments: Any) -> None:
        count(report, *arguments)
        if report.blocks == 4:
            fill(small_disk, leave)

    with monkeypatch.context() as patch:
        patch.setattr(ProgressReport, "block_done", filling)
        code, report, err = call(capsys, *lasting)
    assert code == 1 and "No space left on device" in report["error"] and "Traceback" not in err, report
    (small_disk / "filler").unlink()
    code, report, _ = call(capsys, *lasting)
    assert (code, report["frames"]) == (0, frames(12)), report
    assert report["resumed_at_frame"] > 0 and torch.isfinite(recorded(small_disk / "day")).all()
    whole = small_disk / "whole"
    assert call(capsys, *command, "-o", whole, "--frames", frames(12))[0] == 0
    assert torch.equal(recorded(small_disk / "day"), recorded(whole))
