"""Streams in programs of several threads, and several runtimes in one of them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from streaming import embeds, load, same, take, video, within

import echo_rt

LONG = 60.0  # seconds; only a deadlock takes that long


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
