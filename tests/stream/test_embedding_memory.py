"""Memory given back to the byte by closing, and memory that runs out."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from streaming import PROMPT, embeds, load, same, take, video
from torch import Tensor

import echo_rt
import echo_rt.engine.build
import echo_rt.engine.engine
import echo_rt.engine.prompts
import echo_rt.engine.rollout
from echo_rt.errors import EchoError
from echo_rt.model.memory import MemoryEncoder
from echo_rt.model.transformer import Transformer
from echo_rt.model.vae_decoder import VaeDecoder


def live_bytes() -> int:
    """Bytes of all tensors that are alive, reachable or not."""
    kinds = (Tensor, torch.nn.Parameter)
    storages = [thing.untyped_storage() for thing in gc.get_objects() if type(thing) in kinds]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@contextlib.contextmanager
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.fixture(scope="module")
def everything_cached(small_model: Path) -> None:
    """What torch and the libraries keep after their first use is not ours."""
    with load(small_model) as runtime, runtime.stream(PROMPT) as stream:
        take(stream, 5)
        stream.set_prompt(prompt_embeds=embeds(runtime))
        take(stream, 1)


@pytest.mark.usefixtures("everything_cached")
def test_close_gives_every_byte_back(small_model: Path) -> None:
    with no_collector():
        before = live_bytes()
        runtime = load(small_model)
        stream = runtime.stream(PROMPT)
        take(stream, 5)
        stream.set_prompt(PROMPT)
        take(stream, 1)
        assert live_bytes() > before
        runtime.close()
        assert live_bytes() == before
        assert stream.next_block == 6


# What runs out of memory where: the attribute that is replaced, and how often it still works.
PLACES: dict[str, tuple[object, str, int]] = {
    "load: transformer": (echo_rt.engine.build, "Transformer", 0),
    "load: memory": (echo_rt.engine.build, "MemoryEncoder", 0),
    "load: decoder": (echo_rt.engine.build, "VaeDecoder", 0),
    "load: buffers": (echo_rt.engine.rollout, "RolloutState", 0),
    "load: slots": (echo_rt.engine.engine, "Pipeline", 0),
    "start: text encoder": (echo_rt.engine.prompts, "TextEncoder", 0),
    "start: text keys": (Transformer, "encode_text", 0),
    "block: attention": (Transformer, "flow", 9),
    "block: memory": (MemoryEncoder, "update", 1),
    "block: frames": (VaeDecoder, "decode_next", 2),
}
SHORTAGES: list[Callable[[], BaseException]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    lambda: MemoryError(),
]


@pytest.mark.usefixtures("everything_cached")
@pytest.mark.parametrize("place", PLACES)
def test_when_memory_runs_out_a_smaller_model_can_be_loaded(
    small_model: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the very ``except`` clause, where the exception still holds every frame that it came through."""
    where, name, works = PLACES[place]
    shortage = SHORTAGES[list(PLACES).index(place) % len(SHORTAGES)]
    whole = getattr(where, name)
    calls = []

    def short(*arguments: Any, **options: Any) -> Any:
        calls.append(place)
        made = whole(*arguments, **options)  # the failure strikes with all of this in hand
        if len(calls) > works:
            raise shortage()
        return made

    with no_collector():
        before = live_bytes()
        runtime: echo_rt.Runtime | None = None
        given: Tensor | None = None
        made = 0
        try:
            with monkeypatch.context() as patch:
                patch.setattr(where, name, short)
                runtime = load(small_model)
                prompt = PROMPT if "text encoder" in place else None
                given = embeds(runtime) if prompt is None else None
                for chunk in runtime.stream(prompt, prompt_embeds=given):
                    made = chunk.index + 1
                    del chunk
                    assert made < 8
        except type(shortage()):
            given = None
            if runtime is not None:
                runtime.close()
            assert (runtime is None) == place.startswith("load") and (made > 0) == place.startswith("block")
            assert live_bytes() == before
            with load(small_model, memory="off") as smaller:
                assert len(video(smaller, 1)) == 1
            assert live_bytes() == before
        else:
            raise AssertionError("memory did not run out")


@pytest.mark.usefixtures("everything_cached")
@pytest.mark.parametrize("options", [{"convolution": "kernel"}, {"lookahead": -1}, {"vae_tiles": 1000}], ids=str)
def test_a_model_that_is_refused_holds_nothing(small_model: Path, options: dict[str, Any]) -> None:
    """Or the next one, loaded with other options in the ``except`` clause, has half the device to fit into."""
    with no_collector():
        before = live_bytes()
        try:
            load(small_model, **options)
        except EchoError:
            assert live_bytes() == before
        else:
            raise AssertionError("it was not refused")


@pytest.mark.usefixtures("everything_cached")
def test_a_stream_that_ran_out_of_memory_leaves_its_runtime_usable(
    runtime: echo_rt.Runtime, expected: list[echo_rt.Chunk], monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*arguments: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    for where, name in ((Transformer, "encode_text"), (Transformer, "flow"), (VaeDecoder, "decode_next")):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, short)
            with pytest.raises(torch.OutOfMemoryError, match=r"2\.00 GiB") as error:
                next(runtime.stream(prompt_embeds=embeds(runtime)))
        assert same(video(runtime, 2), expected[:2])
        assert error.traceback[-1].name == "short", "the lines that say where are kept"
