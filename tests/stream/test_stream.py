"""The embedded interface, on the tiny model: what a stream yields, how it ends, what it refuses."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from closeness import relative_error
from streaming import OTHER, PROMPT, amid_blocks, load, same, take

import echo_rt
from echo_rt.errors import ConfigError, NumericalError, PromptError, StreamError, WeightsError


@pytest.fixture(scope="module")
def runtime(tiny_model: Path) -> Iterator[echo_rt.Runtime]:
    with load(tiny_model) as runtime:
        yield runtime


def test_what_a_stream_yields(runtime: echo_rt.Runtime) -> None:
    width, height = runtime.frame_size
    config = runtime.config
    assert runtime.fps == 16
    with runtime.stream(PROMPT, seed=7) as stream:
        seen = 0
        for index, chunk in zip(range(9), stream, strict=False):
            frames = runtime.vae_config.temporal_stride * config.window.frames_per_block - (3 if index == 0 else 0)
            assert chunk.index == index and chunk.first_frame == seen
            assert chunk.frames.dtype == torch.uint8 and chunk.frames.shape == (frames, height, width, 3)
            assert chunk.latents.dtype == torch.float32
            assert chunk.latents.shape == (config.window.frames_per_block, *config.latent_shape)
            assert chunk.frames.float().std() > 5, "a blank picture"
            seen += frames
            assert stream.video_frames == seen and stream.next_block == index + 1
            last = config.window.frames_per_block * (index + 1) - 1
            assert chunk.stats.newest_temporal_id == min(last, config.window.max_temporal_id)
            assert chunk.stats.shift == last - chunk.stats.newest_temporal_id
            assert chunk.stats.memory_attended == (index >= 4)
            assert chunk.stats.generate_seconds > 0 and chunk.stats.decode_seconds > 0


def test_seed_and_prompt_make_the_video(runtime: echo_rt.Runtime) -> None:
    def video(prompt: str, seed: int) -> list[echo_rt.Chunk]:
        with runtime.stream(prompt, seed=seed) as stream:
            return take(stream, 2)

    first = video(PROMPT, 1)
    assert same(first, video(PROMPT, 1))
    assert not same(first, video(PROMPT, 2))
    assert not same(first, video(OTHER, 1))
    with runtime.stream(prompt_embeds=runtime.encode_prompt(PROMPT), seed=1) as stream:
        assert same(first, take(stream, 2))


def test_consumption_does_not_change_the_video(runtime: echo_rt.Runtime) -> None:
    """From another thread, one at a time or in a loop, with snapshots in between: the same chunks."""
    with runtime.stream(PROMPT, seed=3) as stream:
        expected = take(stream, 6)
    made: list[echo_rt.Chunk] = []
    with runtime.stream(PROMPT, seed=3) as stream:
        made.append(next(stream))
        stream.snapshot()
        thread = threading.Thread(target=lambda: made.extend(take(stream, 3)))
        thread.start()
        thread.join()
        for chunk in stream:
            made.append(chunk)
            if len(made) == 6:
                break
    assert same(made, expected)


def test_prompt_switch_takes_effect_at_the_next_block_and_not_before(runtime: echo_rt.Runtime) -> None:
    with runtime.stream(PROMPT, seed=3) as stream:
        plain = take(stream, 7)
    with runtime.stream(PROMPT, seed=3) as stream:
        switched = take(stream, 5)
        stream.set_prompt("never shown")
        stream.set_prompt(OTHER)  # the last one counts
        switched += take(stream, 2)
    with runtime.stream(PROMPT, seed=3) as stream:
        again = take(stream, 5)
        stream.set_prompt(prompt_embeds=runtime.encode_prompt(OTHER))
        again += take(stream, 2)
    assert same(plain[:5], switched[:5])
    assert not torch.equal(plain[5].latents, switched[5].latents)
    assert same(switched, again)


@pytest.mark.parametrize("memory", ["evolve", "prior", "off"])
def test_memory_modes_differ_only_once_the_memory_is_attended_to(tiny_model: Path, memory: str) -> None:
    with load(tiny_model, memory=memory) as runtime, runtime.stream(PROMPT) as stream:
        chunks = take(stream, 6)
    assert runtime.memory.value == memory
    with load(tiny_model, memory="off") as runtime, runtime.stream(PROMPT) as stream:
        without = take(stream, 6)
    assert same(chunks[:4], without[:4])
    assert same(chunks[4:], without[4:]) == (memory == "off")
    assert [chunk.stats.memory_attended for chunk in chunks] == [False] * 4 + [memory != "off"] * 2


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 4e-2), ("float16", 5e-3)])
def test_low_precision_streams_follow_float32(
    tiny_model: Path, runtime: echo_rt.Runtime, dtype: str, bound: float
) -> None:
    """The first block; later ones build on it, and the tiny model's sharp attention lets a rounding error grow."""
    with load(tiny_model, dtype=dtype) as low, low.stream(PROMPT) as stream:
        latents = next(stream).latents
        for _ in range(5):
            assert torch.isfinite(next(stream).latents).all()
    with runtime.stream(PROMPT) as stream:
        assert 0 < relative_error(latents, next(stream).latents) < bound


# ---------------------------------------------------------------- snapshot


@pytest.mark.parametrize("at", [0, 1, 4, 9])
def test_resume_goes_on_bit_for_bit(tiny_model: Path, runtime: echo_rt.Runtime, at: int) -> None:
    with runtime.stream(PROMPT, seed=11) as stream:
        take(stream, at)
        stream.set_prompt(OTHER)
        snapshot = stream.snapshot()
        expected = take(stream, 3)
    with runtime.stream("something else", seed=1) as stream:
        take(stream, 2)
    with runtime.resume(snapshot) as stream:
        assert stream.next_block == at
        assert same(take(stream, 3), expected)
    with load(tiny_model) as another, another.resume(snapshot) as stream:
        assert same(take(stream, 3), expected)


def test_a_snapshot_of_another_model_is_refused(tiny_model: Path, runtime: echo_rt.Runtime) -> None:
    with runtime.stream(PROMPT) as stream:
        snapshot = stream.snapshot()
    with (
        load(tiny_model, overrides={"local_frames": 6}) as other,
        pytest.raises(StreamError, match="local_frames is 9 in the snapshot and 6 here"),
    ):
        other.resume(snapshot)
    with load(tiny_model, memory="prior") as other, pytest.raises(StreamError, match="memory is 'evolve'"):
        other.resume(snapshot)
    with load(tiny_model, ema=True) as other, pytest.raises(StreamError, match="weights of the transf"):
        other.resume(snapshot)
    others = {name: tensor for name, tensor in snapshot.tensors.items() if name != "rollout.kv.ring"}
    broken = dataclasses.replace(snapshot, tensors=others)
    with pytest.raises(StreamError, match=r"rollout\.kv\.ring: expected .* found nothing"):
        runtime.resume(broken)
    with runtime.stream(PROMPT) as stream:
        take(stream, 1)


# ---------------------------------------------------------------- life


def test_a_second_live_stream_is_refused(runtime: echo_rt.Runtime) -> None:
    with runtime.stream(PROMPT) as stream:
        next(stream)
        with pytest.raises(StreamError, match="has a live stream, at block 1; close it first"):
            runtime.stream(OTHER)
        snapshot = stream.snapshot()
        with pytest.raises(StreamError, match="has a live stream"):
            runtime.resume(snapshot)
        next(stream)
    runtime.stream(OTHER).close()


def test_a_forgotten_stream_does_not_block_the_runtime(runtime: echo_rt.Runtime) -> None:
    stream = runtime.stream(PROMPT)
    next(stream)
    del stream
    gc.collect()
    with runtime.stream(PROMPT) as stream:
        next(stream)


def test_use_after_close_is_an_error(tiny_model: Path) -> None:
    runtime = load(tiny_model)
    stream = runtime.stream(PROMPT)
    stream.close()
    stream.close()
    for use in (lambda: next(stream), lambda: stream.set_prompt(OTHER), stream.snapshot, lambda: list(stream)):
        with pytest.raises(StreamError, match="the stream is closed"):
            use()
    live = runtime.stream(PROMPT)
    runtime.close()
    runtime.close()
    assert live.closed
    for use in (lambda: runtime.stream(PROMPT), lambda: runtime.encode_prompt(PROMPT)):
        with pytest.raises(StreamError, match="the runtime is closed"):
            use()


def test_closing_from_inside_or_outside_ends_the_loop(runtime: echo_rt.Runtime) -> None:
    stream = runtime.stream(PROMPT)
    for count, _ in enumerate(stream, start=1):
        if count == 2:
            stream.close()
    assert count == 2

    stream = runtime.stream(PROMPT)
    begun, made = threading.Event(), []

    def loop() -> None:
        for chunk in stream:
            made.append(chunk)
            begun.set()

    thread = threading.Thread(target=loop)
    thread.start()
    assert begun.wait(60)
    stream.close()
    thread.join(60)
    assert not thread.is_alive() and made
    with runtime.stream(PROMPT) as after:
        next(after)


def test_an_exception_in_the_callers_loop_leaves_the_stream_alone(runtime: echo_rt.Runtime) -> None:
    with runtime.stream(PROMPT, seed=3) as stream:
        expected = take(stream, 3)
    with runtime.stream(PROMPT, seed=3) as stream:
        made = []
        with pytest.raises(ZeroDivisionError):
            for chunk in stream:
                made.append(chunk)
                raise ZeroDivisionError
        made += take(stream, 2)
    assert same(made, expected)


def test_not_a_number_ends_the_stream_and_not_the_runtime(
    runtime: echo_rt.Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = runtime.stream(PROMPT)
    next(stream)

    def poisoned(block: int, step: int) -> None:
        runtime._engine.rollout.state.x.fill_(float("nan"))

    with monkeypatch.context() as patch:
        amid_blocks(stream, poisoned, patch)
        with pytest.raises(NumericalError, match=r"block 1: latent: \d+ of \d+ values are NaN or infinite"):
            next(stream)
    for use in (lambda: next(stream), stream.snapshot, lambda: stream.set_prompt(OTHER)):
        with pytest.raises(StreamError, match="block 1 failed"):
            use()
    # Nobody needs to close it: a traceback may be all that still holds a stream that failed.
    with runtime.stream(PROMPT) as after:
        assert torch.isfinite(next(after).latents).all()


# ---------------------------------------------------------------- bad input


def test_bad_prompts_leave_the_old_one(runtime: echo_rt.Runtime) -> None:
    width = runtime.config.transformer.text_dim
    bad = [
        ({"prompt": ""}, "empty"),
        ({"prompt": " \n\t "}, "empty"),
        ({}, "got neither"),
        ({"prompt": PROMPT, "prompt_embeds": torch.zeros(1, width)}, "got both"),
        ({"prompt_embeds": torch.zeros(1, width + 1)}, f"{width + 1} wide"),
        ({"prompt_embeds": torch.zeros(runtime.config.transformer.text_len + 1, width)}, "at most"),
        ({"prompt_embeds": torch.full((1, width), float("nan"))}, "NaN"),
        ({"prompt_embeds": torch.zeros(width)}, "length, width"),
    ]
    with runtime.stream(PROMPT, seed=3) as stream:
        expected = take(stream, 2)
    with runtime.stream(PROMPT, seed=3) as stream:
        made = take(stream, 1)
        for options, words in bad:
            with pytest.raises(PromptError, match=words):
                stream.set_prompt(**options)  # type: ignore[arg-type]
        made += take(stream, 1)
    assert same(made, expected)
    for options, words in bad:
        with pytest.raises(PromptError, match=words):
            runtime.stream(**options)  # type: ignore[arg-type]


def test_a_long_prompt_is_cut_with_a_warning(runtime: echo_rt.Runtime) -> None:
    limit = runtime.config.transformer.text_len
    with pytest.warns(UserWarning, match=rf"the model takes {limit}"):
        embeds = runtime.encode_prompt("fox " * 10_000)
    assert embeds.shape[0] == limit


BAD_OPTIONS = [
    ({"width": 100}, ConfigError, r"width must be a positive multiple of 16 pixels, got 100"),
    ({"height": 0}, ConfigError, r"height must be a positive multiple of 16 pixels, got 0"),
    (
        {"width": 32, "height": 32},
        ConfigError,
        r"this model makes videos of 64x48 pixels, as its memory has a fixed number of tokens \(36\): .*, got 32x32",
    ),
    ({"memory": "always"}, ConfigError, r"evolve, prior, off; got 'always'"),
    ({"dtype": "int8"}, ConfigError, r"float32, bfloat16, float16, float8, fp32, .* fp8; got 'int8'"),
    ({"dtype": "torch.bfloat16"}, ConfigError, r"got 'torch.bfloat16' \(did you mean 'bfloat16'\?\)"),
    ({"memory": "envolve"}, ConfigError, r"got 'envolve' \(did you mean 'evolve'\?\)"),
    ({"attention": "spda"}, echo_rt.BackendError, r"got 'spda' \(did you mean 'sdpa'\?\)"),
    ({"overrides": {"sink_frame": 3}}, ConfigError, r"got sink_frame \(did you mean 'sink_frames'\?\)"),
    ({"device": "tpu"}, ConfigError, r"'cpu', 'cuda' or 'cuda:N'; got 'tpu'"),
    ({"overrides": {"sink": 3}}, ConfigError, r"overrides may name frames_per_block, .*; got sink"),
    ({"overrides": {"width": 64}}, ConfigError, r"got width"),
    ({"overrides": {"local_frames": 18}}, ConfigError, r"24 temporal ids, but max_temporal_id 20"),
    ({"overrides": {"frames_per_block": 2}}, ConfigError, r"multiple of frames_per_block 2"),
    ({"backend": "opencl"}, echo_rt.BackendError, r"got 'opencl'"),
    ({"backend": "cudda"}, echo_rt.BackendError, r"got 'cudda' \(did you mean 'cuda'\?\)"),
    ({"checkpoint": None, "memory": "evolve"}, ConfigError, r"needs a memory encoder"),
    ({"checkpoint": "missing.pt"}, WeightsError, r"missing\.pt"),
    ({"lora": "missing.safetensors"}, WeightsError, r"missing\.safetensors"),
]


@pytest.mark.parametrize(("options", "kind", "words"), BAD_OPTIONS, ids=lambda value: str(value)[:50])
def test_bad_options_are_refused(
    tiny_model: Path, options: dict[str, object], kind: type[Exception], words: str
) -> None:
    arguments = {"checkpoint": tiny_model / "echo_infinity.pt", "device": "cpu"} | options
    with pytest.raises(kind, match=words) as error:
        echo_rt.Runtime.from_pretrained(tiny_model, **arguments)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_a_fact_in_the_folder_that_is_none_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["echo_rt"]["sink_frame"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"echo_rt in config\.json may name .*; got sink_frame"):
        load(folder)


def test_overrides_change_the_rollout(tiny_model: Path) -> None:
    with load(tiny_model, overrides={"local_frames": 6, "denoising_steps": [1000, 500]}) as runtime:
        assert runtime.config.window.local_frames == 6
        assert runtime.config.sampler.denoising_steps == (1000, 500)
        with runtime.stream(PROMPT) as stream:
            # A shorter window makes room for the memory a block earlier.
            assert [chunk.stats.memory_attended for chunk in take(stream, 5)] == [False] * 3 + [True] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_asking_for_a_gpu_that_is_not_there_is_an_error(tiny_model: Path) -> None:
    with pytest.raises(echo_rt.BackendError, match="device 'cuda' was asked for"):
        echo_rt.Runtime.from_pretrained(tiny_model, device="cuda")


@pytest.mark.parametrize("room", [True, False])
def test_text_encoder_is_kept_for_a_live_stream_where_there_is_room(
    small_model: Path, room: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(echo_rt.engine.prompts, "has_room", lambda device: room)
    with load(small_model) as runtime:
        runtime.encode_prompt(PROMPT)
        assert not runtime.text_encoder_loaded
        with runtime.stream(PROMPT) as stream:
            assert runtime.text_encoder_loaded == room
            with pytest.raises(StreamError, match="live stream"):
                runtime.stream(OTHER)
            runtime.encode_prompt(OTHER)
            stream.set_prompt(OTHER)
            assert runtime.text_encoder_loaded == room
        assert not runtime.text_encoder_loaded
        with pytest.raises(ConfigError, match="expected initial latents"):
            runtime.stream(PROMPT, initial_latents=torch.zeros(1))
        assert not runtime.text_encoder_loaded
        forgotten = runtime.stream(PROMPT)
        next(forgotten)
        del forgotten
        gc.collect()
        runtime.encode_prompt(OTHER)
        assert not runtime.text_encoder_loaded


def test_text_encoder_is_released_or_kept_as_asked(tiny_model: Path) -> None:
    with load(tiny_model, keep_text_encoder=False) as runtime, runtime.stream(PROMPT) as stream:
        stream.set_prompt(OTHER)
        assert not runtime.text_encoder_loaded
    with load(tiny_model, keep_text_encoder=True) as runtime:
        runtime.encode_prompt(PROMPT)
        assert runtime.text_encoder_loaded
        runtime.encode_prompt(OTHER)
        assert runtime.text_encoder_loaded
    assert not runtime.text_encoder_loaded


def test_runs_without_a_checkpoint_or_memory_encoder(tiny_model: Path) -> None:
    with echo_rt.Runtime.from_pretrained(tiny_model, device="cpu") as runtime:
        assert runtime.memory is echo_rt.MemoryMode.OFF
        with runtime.stream(PROMPT) as stream:
            take(stream, 6)
