"""A runtime for the tests of feeds, the video that a feed must hand out, and a stream to feed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from streaming import embeds, load, video

import echo_rt


@pytest.fixture(scope="module")
def runtime(small_model: Path) -> Iterator[echo_rt.Runtime]:
    with load(small_model) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def expected(runtime: echo_rt.Runtime) -> list[echo_rt.Chunk]:
    return video(runtime, 6)


@pytest.fixture
def stream(runtime: echo_rt.Runtime) -> Iterator[echo_rt.Stream]:
    with runtime.stream(prompt_embeds=embeds(runtime)) as stream:
        yield stream
