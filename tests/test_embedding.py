"""Streams in programs of their users: threads, event loops, several runtimes, child processes, memory that runs out."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forking
import pytest
import torch
from streaming import PROMPT, Gate, embeds, load, same, small_model_in, take, video, within
from torch import Tensor

import echo_rt
import echo_rt.decoding
import echo_rt.model.text
import echo_rt.prompts
import echo_rt.rollout
import echo_rt.runtime
from echo_rt.errors import BackendError
from echo_rt.model.memory import MemoryEncoder
from echo_rt.model.transformer import Transformer
from echo_rt.model.vae_decoder import VaeDecoder
from echo_rt.tiny import CHECKPOINT_FILE

LONG = 60.0  # seconds; only a deadlock takes that long


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model_in(tmp_path_factory)


@pytest.fixture(scope="module")
def runtime(small_model: Path) -> Iterator[echo_rt.Runtime]:
    with load(small_model) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def expected(runtime: echo_rt.Runtime) -> list[echo_rt.Chunk]:
    return video(runtime, 6)


# ---------------------------------------------------------------- threads


def test_threads_that_share_a_stream_get_each_block_once(
    runtime: echo_rt.Runtime, expected: list[echo_rt.Chunk]
) -> None:
    taken: list[echo_rt.Chunk] = []
    with runtime.stream(prompt_embeds=embeds(runtime)) as stream:
        threads = [threading.Thread(target=lambda: taken.extend(take(stream, 2)), daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG)
            assert not thread.is_alive()
    assert same(sorted(taken, key=lambda chunk: chunk.index), expected)


def test_a_stream_is_handed_from_thread_to_thread(runtime: echo_rt.Runtime, expected: list[echo_rt.Chunk]) -> None:
    made = []
    stream = within(LONG, lambda: runtime.stream(prompt_embeds=embeds(runtime)))
    for _ in range(3):
        made += within(LONG, lambda: take(stream, 1))  # a new thread each time
        made += take(stream, 1)
    within(LONG, stream.close)
    assert same(made, expected)


def torch_settings() -> dict[str, Any]:
    """Everything of torch that belongs to the whole process or to the calling thread."""
    return {
        "rng": torch.random.get_rng_state().tolist(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic),
        "benchmark": torch.backends.cudnn.benchmark,
        "precision": torch.get_float32_matmul_precision(),
        "convolutions": torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        "products": torch.backends.cuda.matmul.fp32_precision,
        "attention": [
            getattr(torch.backends.cuda, f"{kind}_sdp_enabled")()
            for kind in ("flash", "math", "cudnn", "mem_efficient")
        ],
        "denormals": float(torch.tensor([1e-40], dtype=torch.float32) * 1.0),
    }


def test_two_runtimes_in_two_threads_do_not_know_of_each_other(
    small_model: Path, expected: list[echo_rt.Chunk]
) -> None:
    """Other sizes, precision and prompts: what each makes alone."""

    def alone(options: dict[str, Any], prompt: int) -> list[echo_rt.Chunk]:
        with load(small_model, **options) as runtime:
            return video(runtime, 5, prompt=prompt)

    cases = [({}, 0), ({"dtype": "bfloat16", "memory": "off", "overrides": {"local_frames": 6}}, 1)]
    before = torch_settings()
    one_by_one = [alone(*case) for case in cases]
    made: dict[int, list[echo_rt.Chunk]] = {}
    settings: list[dict[str, Any]] = []
    barrier = threading.Barrier(len(cases))

    def run(index: int) -> None:
        barrier.wait(LONG)
        made[index] = alone(*cases[index])
        settings.append(torch_settings())

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
        assert not thread.is_alive()
    assert all(same(made[index], one_by_one[index]) for index in range(len(cases)))
    assert same(made[0], expected[:5]) and not same(made[0], made[1])
    assert torch_settings() == before
    assert all(found == before for found in settings)


# ---------------------------------------------------------------- asyncio


def test_async_for(runtime: echo_rt.Runtime, expected: list[echo_rt.Chunk]) -> None:
    async def consume(stream: echo_rt.Stream) -> list[echo_rt.Chunk]:
        made = []
        async for chunk in stream:
            made.append(chunk)
            if len(made) == 3:
                break
        with pytest.raises(ZeroDivisionError):
            async for chunk in stream:
                made.append(chunk)
                raise ZeroDivisionError
        return made

    with runtime.stream(prompt_embeds=embeds(runtime)) as stream:
        made = asyncio.run(asyncio.wait_for(consume(stream), LONG))
        made += take(stream, 1)  # by another way, after the loop has gone
    assert same(made, expected[:5])
    with pytest.raises(echo_rt.StreamError, match="the stream is closed"):
        asyncio.run(consume(stream))


@pytest.mark.parametrize("then", ["next", "snapshot", "async for"])
@pytest.mark.parametrize("opened", ["before the cancel", "after it"])
def test_a_cancelled_wait_loses_no_block(
    runtime: echo_rt.Runtime,
    expected: list[echo_rt.Chunk],
    monkeypatch: pytest.MonkeyPatch,
    then: str,
    opened: str,
) -> None:
    """Whether the block is made before the wait is cancelled or after it, it comes next, whichever way is taken."""

    async def first(stream: echo_rt.Stream) -> echo_rt.Chunk:
        async for chunk in stream:
            return chunk
        raise AssertionError("the stream ended")

    async def scene(stream: echo_rt.Stream, gate: Gate) -> list[echo_rt.Chunk]:
        wait = asyncio.create_task(first(stream))
        await asyncio.to_thread(gate.reached.wait, LONG)
        if opened == "before the cancel":
            gate.open()
            end = time.monotonic() + LONG
            while stream.next_block == 1 and time.monotonic() < end:
                time.sleep(0.001)  # the block is made while the loop does not run
            wait.cancel()
        else:
            wait.cancel()
            gate.open(after=0.1)
        with pytest.raises(asyncio.CancelledError):
            await wait
        if then == "async for":
            return [await first(stream)]
        if then == "snapshot":
            snapshot = stream.snapshot()
            assert snapshot.next_block == 1
            stream.close()
            with runtime.resume(snapshot) as resumed:
                return take(resumed, 1)
        return take(stream, 1)

    with runtime.stream(prompt_embeds=embeds(runtime)) as stream:
        made = take(stream, 1)
        with monkeypatch.context() as patch:
            made += asyncio.run(asyncio.wait_for(scene(stream, Gate(stream, patch)), LONG))
    assert same(made, expected[:2])


def test_timeouts_lose_no_block(runtime: echo_rt.Runtime, expected: list[echo_rt.Chunk]) -> None:
    async def consume(stream: echo_rt.Stream) -> list[echo_rt.Chunk]:
        made: list[echo_rt.Chunk] = []
        timeouts = 0

        async def collect() -> None:
            async for chunk in stream:
                made.append(chunk)

        while len(made) < 5:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(collect(), 0.02)
            timeouts += 1
        assert timeouts > 1
        return made[:5]

    with runtime.stream(prompt_embeds=embeds(runtime)) as stream:
        assert same(asyncio.run(asyncio.wait_for(consume(stream), LONG)), expected[:5])


def test_two_streams_of_two_runtimes_in_one_loop(
    small_model: Path, runtime: echo_rt.Runtime, expected: list[echo_rt.Chunk]
) -> None:
    order: list[str] = []

    async def consume(name: str, stream: echo_rt.Stream) -> list[echo_rt.Chunk]:
        made = []
        async for chunk in stream:
            order.append(name)
            made.append(chunk)
            if len(made) == 4:
                break
        return made

    async def both(a: echo_rt.Stream, b: echo_rt.Stream) -> list[list[echo_rt.Chunk]]:
        return await asyncio.wait_for(asyncio.gather(consume("a", a), consume("b", b)), LONG)

    with load(small_model) as other:
        plain = video(other, 4, seed=1, prompt=1)
        with (
            runtime.stream(prompt_embeds=embeds(runtime)) as a,
            other.stream(prompt_embeds=embeds(other, 1), seed=1) as b,
        ):
            made = asyncio.run(both(a, b))
    assert same(made[0], expected[:4]) and same(made[1], plain)
    assert set(order[:-4]) == {"a", "b"}, f"one after the other: {order}"


# ---------------------------------------------------------------- processes


@pytest.fixture(scope="module")
def children(small_model: Path) -> dict[str, str]:
    """What came of each use in a child process; see ``forking.py``."""
    done = subprocess.run(
        [sys.executable, forking.__file__, small_model, small_model / CHECKPOINT_FILE],
        capture_output=True,
        text=True,
        timeout=3 * LONG,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(echo_rt.__file__).parent.parent),
            "OMP_NUM_THREADS": "2",
            "OMP_WAIT_POLICY": "passive",  # or two threads on a busy core would spin at each other
        },
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_a_runtime_can_be_loaded_in_a_child(children: dict[str, str]) -> None:
    here = children["here"]
    assert len(here) == 64
    for where in ("loaded in a fork", "spawned", "here, after all that"):
        assert children[where] == here, where


def test_where_torch_would_hang_in_a_fork_loading_is_refused(children: dict[str, str]) -> None:
    refused = children["loaded in a fork of one that has loaded"]
    assert refused.startswith("BackendError: this process was forked from one that has loaded a runtime")
    assert "'spawn', or call torch.set_num_threads(1)" in refused and "\n" not in refused
    assert len(children["the same with one thread"]) == 64


def test_a_runtime_stays_with_its_process(children: dict[str, str]) -> None:
    for use in ("next", "snapshot", "set_prompt", "encode_prompt", "runtime.stream", "a loop that goes on"):
        assert children[use].startswith("StreamError: the "), (use, children[use])
        assert "a fork of it: load a runtime in the process that uses it" in children[use]
    assert children["close"] == "(None, None)"


@pytest.mark.parametrize("device", [None, "cuda", "cuda:0"])
def test_a_fork_of_a_process_that_uses_cuda_is_told_so(
    small_model: Path, device: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not that there is no GPU; and the CPU is not taken in its place."""
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with pytest.raises(BackendError, match=r"forked from one that uses CUDA, .*'spawn'$") as error:
        load(small_model, device=device)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- memory


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
    "load: transformer": (echo_rt.runtime, "Transformer", 0),
    "load: memory": (echo_rt.runtime, "MemoryEncoder", 0),
    "load: decoder": (echo_rt.decoding, "VaeDecoder", 0),
    "load: buffers": (echo_rt.rollout, "RolloutState", 0),
    "load: slots": (echo_rt.runtime, "Pipeline", 0),
    "start: text encoder": (echo_rt.prompts, "TextEncoder", 0),
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
