"""Device memory: what there is of it, what is in it, and that nobody uses what was given back."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from virtual_gpu.conftest import Told
from virtual_gpu.device import Device

pytestmark = pytest.mark.cuda


def failing(program: str) -> str:
    """What a program prints on a virtual GPU of its own; it must end by itself."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_is_so_much_of_it(gpu: Device) -> None:
    free, total = torch.cuda.mem_get_info()
    assert 0 < free <= total
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(total + 1, dtype=torch.uint8, device="cuda")


def test_what_is_new_holds_no_number(gpu: Device) -> None:
    """A program that counts on zeros is found out."""
    torch.cuda.empty_cache()
    more_than_one_block = 2**22
    assert torch.empty(more_than_one_block, device="cuda").isnan().all()


def test_memory_that_is_freed_is_not_used_by_a_graph(gpu: Device) -> None:
    """A capture does not keep what it was given: its caller must. And a device that has failed stays so."""
    printed = failing(
        """
import torch
from virtual_gpu.device import device

x = torch.zeros(2**22, device="cuda")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    x.add_(1)
graph.replay()
torch.cuda.synchronize()
del x
torch.cuda.empty_cache()
graph.replay()
for _ in range(2):
    try:
        torch.cuda.synchronize()
    except torch.AcceleratorError as error:
        print(str(error).splitlines()[0])
print(*device().take_complaints(), sep="\\n")
"""
    )
    error = "CUDA error: an illegal memory access was encountered"
    assert printed.splitlines() == [error, error, "aten::add_ uses memory that was freed"]


def test_work_that_fails_fails_the_device(gpu: Device) -> None:
    printed = failing(
        """
import torch

x = torch.zeros(4, device="cuda")
torch.cuda.synchronize()
try:
    x[torch.tensor([9], device="cuda")].cpu()
except torch.AcceleratorError as error:
    print(str(error).splitlines()[0])
"""
    )
    assert printed.splitlines() == ["CUDA error: unspecified launch failure"]


def test_what_is_not_allocated_is_not_freed(told: Told) -> None:
    from virtual_gpu.runtime_calls import call

    invalid_value = 1
    assert call("cudaFree", 4096) == invalid_value
    assert told() == ["memory is freed that is not allocated"]
