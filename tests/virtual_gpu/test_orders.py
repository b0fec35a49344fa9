"""What runs when: what CUDA promises holds under every policy, and a program that needs more is found out."""

from __future__ import annotations

import time

import pytest
import torch

from virtual_gpu.device import Device
from virtual_gpu.names import POLICIES

pytestmark = pytest.mark.cuda

SEEDS = range(20)
SIZE = 1000


@pytest.fixture(params=POLICIES)
def policy(gpu: Device, request: pytest.FixtureRequest) -> str:
    gpu.choose_policy(request.param, 5)
    return str(request.param)


Pair = tuple[torch.cuda.Stream, torch.cuda.Stream]


@pytest.fixture
def pair(gpu: Device) -> Pair:
    return torch.cuda.Stream(), torch.cuda.Stream()


def read_beside_a_write(pair: Pair, *, wait: bool) -> float:
    """What one stream reads of memory that another one writes: 1 once it has."""
    shared = torch.zeros(SIZE, device="cuda")
    torch.cuda.synchronize()
    writer, reader = pair
    with torch.cuda.stream(writer):
        shared.fill_(1)
        written = writer.record_event()
    with torch.cuda.stream(reader):
        if wait:
            reader.wait_event(written)
        read = shared * 1
    reader.synchronize()
    return float(read.sum().item()) / SIZE


def test_a_stream_keeps_its_order(policy: str) -> None:
    x = torch.zeros(SIZE, device="cuda")
    for step in range(1, 20):
        x.add_(1).mul_(step)
    expected = 0.0
    for step in range(1, 20):
        expected = torch.tensor((expected + 1) * step).item()
    assert x[0].item() == pytest.approx(expected)


def test_an_event_orders_streams(gpu: Device, pair: Pair, policy: str) -> None:
    for seed in SEEDS:
        gpu.choose_policy(policy, seed)
        assert read_beside_a_write(pair, wait=True) == 1


def test_a_missing_wait_is_seen(gpu: Device, pair: Pair) -> None:
    gpu.choose_policy("lazy")
    assert read_beside_a_write(pair, wait=False) == 0
    found = set()
    for seed in SEEDS:
        gpu.choose_policy("random", seed)
        found.add(read_beside_a_write(pair, wait=False))
    assert found == {0, 1}
    gpu.choose_policy("eager")
    assert read_beside_a_write(pair, wait=False) == 1, "the one that finds nothing"


def test_the_same_seed_is_the_same_order(gpu: Device, pair: Pair) -> None:
    def orders() -> list[float]:
        gpu.choose_policy("random", 3)
        return [read_beside_a_write(pair, wait=False) for _ in range(40)]

    first = orders()
    assert first == orders() and len(set(first)) == 2


def test_pinned_memory_read_too_early_is_seen(gpu: Device) -> None:
    gpu.choose_policy("lazy")
    target = torch.zeros(SIZE, pin_memory=True)
    target.copy_(torch.ones(SIZE, device="cuda"), non_blocking=True)
    assert target.sum().item() == 0
    torch.cuda.current_stream().synchronize()
    assert target.sum().item() == SIZE


def test_work_may_run_before_anybody_waits(gpu: Device) -> None:
    found = set()
    for seed in SEEDS:
        gpu.choose_policy("random", seed)
        target = torch.zeros(SIZE, pin_memory=True)
        target.copy_(torch.ones(SIZE, device="cuda"), non_blocking=True)
        found.add(target.sum().item())
        torch.cuda.synchronize()
    assert found == {0, SIZE}


def test_pinned_memory_written_too_early_is_seen(gpu: Device) -> None:
    gpu.choose_policy("lazy")
    source = torch.ones(SIZE, pin_memory=True)
    copied = source.to("cuda", non_blocking=True)
    source.fill_(2)
    assert copied.sum().item() == 2 * SIZE


def test_other_memory_of_the_host_is_copied_at_once(policy: str) -> None:
    source, target = torch.ones(SIZE), torch.zeros(SIZE)
    copied = source.to("cuda", non_blocking=True)
    source.fill_(2)
    target.copy_(copied, non_blocking=True)
    assert target.sum().item() == SIZE


@pytest.mark.parametrize("recorded", [True, False])
def test_memory_given_to_another_while_it_is_read_is_seen(gpu: Device, recorded: bool) -> None:
    """What ``record_stream`` is for: torch's allocator must know of streams that a tensor was not made on."""
    gpu.choose_policy("lazy")
    reader = torch.cuda.Stream()
    shared = torch.ones(SIZE, device="cuda")
    reader.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(reader):
        read = shared * 1
    if recorded:
        shared.record_stream(reader)
    address = shared.data_ptr()
    del shared
    other = torch.full((SIZE,), 7.0, device="cuda")
    torch.cuda.current_stream().synchronize()
    reader.synchronize()
    assert (other.data_ptr() == address) is not recorded
    with torch.cuda.stream(reader):
        assert read[0].item() == (1 if recorded else 7)


def test_asking_lets_time_pass(policy: str) -> None:
    torch.zeros(SIZE, device="cuda").add_(1)
    event = torch.cuda.current_stream().record_event()
    until = time.monotonic() + 20
    while not event.query():
        assert time.monotonic() < until, "never done"


def test_branches_of_a_graph_have_no_order(gpu: Device) -> None:
    main, side = torch.cuda.Stream(), torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    x = torch.zeros(SIZE, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=main):
        side.wait_stream(main)
        with torch.cuda.stream(side):
            x.add_(1)
        x.mul_(2)
        main.wait_stream(side)

    def replayed() -> float:
        x.fill_(1)
        graph.replay()
        return float(x[0].item())

    found = {}
    for policy, seed in [("eager", 0), ("lazy", 0), *(("random", seed) for seed in SEEDS)]:
        gpu.choose_policy(policy, seed)
        found.setdefault(policy, set()).add(replayed())
    assert found == {"eager": {4.0}, "lazy": {3.0}, "random": {3.0, 4.0}}


def test_who_waits_for_an_event_waits_for_the_record_of_then(gpu: Device, pair: Pair) -> None:
    """Recorded again, elsewhere, the event says nothing of the first place."""
    for policy, seed in [("lazy", 0), *(("random", seed) for seed in SEEDS)]:
        gpu.choose_policy(policy, seed)
        shared = torch.zeros(SIZE, device="cuda")
        torch.cuda.synchronize()
        writer, reader = pair
        event = torch.cuda.Event()
        with torch.cuda.stream(writer):
            shared.fill_(1)
            event.record()
        reader.wait_event(event)
        event.record(torch.cuda.current_stream())  # nothing is before it there
        event.synchronize()
        with torch.cuda.stream(reader):
            read = shared * 1
        reader.synchronize()
        assert read.sum().item() == SIZE
