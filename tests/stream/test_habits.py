"""What newcomers try first: other libraries' arguments, ``anext``, pictures, reprs, and what loading says."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from streaming import PROMPT, embeds, load, same

import echo_rt
from echo_rt import BackendError, ConfigError, StreamError

FEW = {"denoising_steps": (1000, 500)}


@pytest.mark.parametrize(
    ("options", "dtype", "vae_dtype"),
    [
        ({"dtype": None, "torch_dtype": torch.bfloat16}, torch.bfloat16, torch.bfloat16),
        ({"dtype": "bf16", "vae_dtype": "fp32"}, torch.bfloat16, torch.float32),
        ({"dtype": None, "torch_dtype": "fp16"}, torch.float16, torch.float16),
    ],
)
def test_dtypes_by_their_other_names(small_model: Path, options: Any, dtype: torch.dtype, vae_dtype: Any) -> None:
    with load(small_model, **options) as runtime:
        assert (runtime.dtype, runtime.vae_dtype) == (dtype, vae_dtype)


def test_two_dtypes_are_one_too_many(small_model: Path) -> None:
    with pytest.raises(ConfigError, match="torch_dtype is another name of dtype: expected one of them"):
        load(small_model, torch_dtype="bf16")  # beside its float32


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("num_frames", r"a stream has no end; .*itertools\.islice"),
        ("negative_prompt", "these models are distilled"),
        ("guidance_scale", "these models are distilled"),
        ("num_inference_steps", "denoising_steps"),
        ("generator", "give seed="),
        ("height", r"give width= and height= to Runtime\.from_pretrained"),
        ("output_type", r"chunk\.frames"),
        ("fps", r"runtime\.fps"),
        ("num_videos_per_prompt", "another seed="),
        ("image", "initial_video="),
    ],
)
def test_arguments_that_a_stream_has_not(runtime: Any, name: str, answer: str) -> None:
    with pytest.raises(ConfigError, match=f"^Runtime.stream has no {name}: .*{answer}"):
        runtime.stream(PROMPT, **{name: 1})
    refused = pytest.raises(ConfigError, match=f"^Stream.set_prompt has no {name}: .*{answer}")
    with runtime.stream(prompt_embeds=embeds(runtime)) as stream, refused:
        stream.set_prompt(PROMPT, **{name: 1})
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        runtime.stream(PROMPT, colour=1)
    with pytest.raises(TypeError, match=r"Runtime.stream\(\) .* argument 'sed' \(did you mean 'seed'\?\)"):
        runtime.stream(PROMPT, sed=1)


def test_arguments_that_loading_has_not(small_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"^Runtime.from_pretrained has no variant: .* dtype="):
        load(small_model, variant="fp16")
    with pytest.raises(TypeError, match=r"argument 'memmory' \(did you mean 'memory'\?\)"):
        load(small_model, memmory="off")
    with pytest.raises(echo_rt.WeightsError, match=r"does not exist \(did you mean 'demo'\?\)"):
        echo_rt.Runtime.from_pretrained("demoo")


def test_a_runtime_is_no_pipeline(runtime: Any) -> None:
    for wrong, answer in (
        (lambda: runtime.to("cuda"), "Runtime has no to: .* give device="),
        (lambda: runtime(PROMPT), r"Runtime has no __call__: .* runtime\.stream"),
        (lambda: runtime.enable_model_cpu_offload(), "Runtime has no enable_model_cpu_offload: .* vae_tiles="),
    ):
        with pytest.raises(ConfigError, match=answer):
            wrong()
    with pytest.raises(ConfigError, match=r"Runtime has no vae: .* chunk\.frames .* runtime\.decoder$"):
        runtime.vae.decode(None)
    assert runtime.decoder == "wan"
    assert not hasattr(runtime, "to") and not hasattr(runtime, "colour")
    with pytest.raises(AttributeError, match="'Runtime' object has no attribute 'colour'"):
        _ = runtime.colour


@pytest.mark.parametrize("given", [{}, {"model": "demo"}, {"prompt": PROMPT}])
@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        (echo_rt.Runtime, r"a Runtime is made by Runtime\.from_pretrained\(MODEL\)$"),
        (echo_rt.Stream, r"a Stream is made by runtime\.stream\(PROMPT\)$"),
        (echo_rt.Feed, r"a Feed is made by stream\.feed\("),
    ],
)
def test_classes_that_are_not_called(kind: Any, answer: str, given: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=f"^{answer}"):
        kind(**given)
    if kind is not echo_rt.Feed or not given:
        with pytest.raises(ConfigError, match=f"^{answer}"):
            kind(*given.values())


def test_a_feed_of_a_runtime_is_refused_at_once(runtime: Any) -> None:
    with pytest.raises(ConfigError, match=r"expected a Stream, which runtime\.stream\(\.\.\.\) makes, got a Runtime"):
        echo_rt.Feed(runtime)


def test_what_they_look_like(runtime: echo_rt.Runtime, small_model: Path) -> None:
    assert repr(runtime) == f"<Runtime of {small_model}, recipe echo-infinity-long, 32x32, float32 on cpu, open>"
    with runtime.stream(prompt_embeds=embeds(runtime), seed=3) as stream, stream.feed() as feed:
        next(feed)
        assert repr(feed).startswith("<Feed of <Stream None, seed 3, next block ") and "0 dropped" in repr(feed)
    assert repr(feed).endswith("closed>, closed>")


def test_await_anext(runtime: echo_rt.Runtime, expected: list[echo_rt.Chunk]) -> None:
    async def film(stream: echo_rt.Stream) -> list[echo_rt.Chunk]:
        made = [await anext(stream)]
        async with stream.feed() as feed:
            made += [await anext(feed), await anext(feed)]
        with pytest.raises(StreamError, match="the feed is closed"):
            await anext(feed)
        made.append(await anext(stream))
        stream.close()
        for ended in (stream, feed):
            with pytest.raises(StreamError, match="the stream is closed"):
                await anext(ended)
        return made

    with runtime.stream(prompt_embeds=embeds(runtime)) as stream:
        assert same(asyncio.run(film(stream)), expected[:4])


def test_pictures(expected: list[echo_rt.Chunk], monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = expected[1]
    array = chunk.numpy()
    assert array.dtype == np.uint8 and array.shape == (12, 32, 32, 3)
    assert array.ctypes.data == chunk.frames.data_ptr(), "it is no copy"
    pytest.importorskip("PIL")
    pictures = chunk.pil()
    assert len(pictures) == 12 and pictures[3].size == (32, 32)
    assert np.array_equal(np.asarray(pictures[3]), array[3])
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(BackendError, match=r"chunk\.pil\(\) needs the package pillow: .*\(pip install pillow\)"):
        chunk.pil()


def test_loading_says_one_line(small_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "echo_rt"), load(small_model):
        pass
    assert len(caplog.records) == 1 and caplog.records[0].getMessage().startswith("recipe echo-infinity-long ")


def test_warnings_name_the_callers_line(runtime: echo_rt.Runtime) -> None:
    with pytest.warns(UserWarning, match="has 10001 tokens") as caught:
        runtime.encode_prompt("fox " * 10_000)
    assert [warning.filename for warning in caught] == [__file__]
