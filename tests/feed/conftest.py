"""A stream to feed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from streaming import embeds

import echo_rt


@pytest.fixture
def stream(runtime: echo_rt.Runtime) -> Iterator[echo_rt.Stream]:
    with runtime.stream(prompt_embeds=embeds(runtime)) as stream:
        yield stream
