"""Operators on the virtual GPU compute what they do on the CPU, and none is left that computes nothing."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from virtual_gpu.conftest import Told
from virtual_gpu.device import Device
from virtual_gpu.names import ROOT
from virtual_gpu.plugin import ONLY_ON_A_GPU
from virtual_gpu.runtime_calls import SUCCESS, call

on_the_virtual_gpu = pytest.mark.cuda


def written(x: Tensor) -> Tensor:
    out = torch.empty(0, dtype=x.dtype, device=x.device)
    torch.add(x, 1, out=out)
    return out


def strided(x: Tensor) -> Tensor:
    x = x.clone()
    x.t()[1:, ::2].mul_(3)
    return x.t()[::2]


CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "new": lambda x: torch.nn.functional.silu(x) @ x.t(),
    "in place": lambda x: x.clone().sub_(2).clamp_(min=0),
    "out": written,
    "strided": strided,
    "several": lambda x: torch.cat(torch.sort(x, dim=1)[:1] + torch.topk(x, 2)[:1], dim=1),
    "list": lambda x: torch.stack([x, x + 1]),
    "cast": lambda x: x.to(torch.float64).to(torch.int32),
    "nonzero": lambda x: (x > 0).nonzero(),
    "masked": lambda x: x[x > 0],
    "indexed": lambda x: x[torch.tensor([2, 0], device=x.device)],
    "empty": lambda x: x[:0] + 1,
    "scalar of the host": lambda x: x * torch.tensor(3.0),
    "number": lambda x: (x % 2) + (x.int() & 3),
    "convolution": lambda x: torch.nn.functional.conv2d(x[None, None], x[None, None, :2, :2], padding=1),
    "norm": lambda x: torch.nn.functional.layer_norm(x, x.shape[1:]),
}


@on_the_virtual_gpu
@pytest.mark.parametrize("name", CALLS)
def test_an_operator_computes_what_the_cpu_does(gpu: Device, name: str) -> None:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    expected, found = CALLS[name](x), CALLS[name](x.to("cuda"))
    assert found.is_cuda and found.dtype == expected.dtype and found.stride() == expected.stride()
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=1e-6)


@on_the_virtual_gpu
@pytest.mark.parametrize("policy", ["eager", "lazy"])
def test_random_numbers_are_of_the_seed_and_of_the_device(gpu: Device, policy: str) -> None:
    gpu.choose_policy(policy)
    torch.cuda.manual_seed(4)
    of_the_host = torch.get_rng_state()
    first = [torch.randn(3, device="cuda") for _ in range(2)]
    torch.cuda.manual_seed(4)
    again = [torch.randn(3, device="cuda") for _ in range(2)]
    assert all(map(torch.equal, first, again)) and not torch.equal(*first)
    assert torch.equal(torch.get_rng_state(), of_the_host)


@on_the_virtual_gpu
def test_a_kernel_that_nothing_computes_is_an_error(told: Told) -> None:
    with pytest.raises(torch.AcceleratorError, match="no kernel image is available"):
        torch._C._cuda_sleep(1)  # of which torch.cuda._sleep is another name elsewhere
    assert told()[0].startswith("nothing computes what is launched: ")


@on_the_virtual_gpu
def test_a_call_that_is_not_virtual_is_an_error(gpu: Device) -> None:
    """It gets to CUDA's own library, which finds no driver."""
    x = torch.zeros(1, device="cuda")
    assert call("cudaMemset", ctypes.c_void_p(x.data_ptr()), 0, ctypes.c_size_t(4)) != SUCCESS


@on_the_virtual_gpu
def test_the_kernels_of_echo_rt_are_launched_and_computed(gpu: Device) -> None:
    from echo_rt.ops.backends import load_ops

    sample, flow = torch.randn(2, 4, 8, 8, device="cuda"), torch.randn(2, 4, 8, 8, device="cuda")
    sigmas = torch.tensor([0.5, 0.25], dtype=torch.float64, device="cuda")
    results = {}
    for backend in ("torch", "cuda"):
        results[backend] = sample.clone()
        before = gpu.launches
        load_ops(backend).flow_step(results[backend], flow, sigmas, None)
        assert gpu.launches - before == (backend == "cuda")
    torch.testing.assert_close(results["cuda"], results["torch"])


@pytest.mark.parametrize("test", ONLY_ON_A_GPU)
def test_what_is_left_out_is_there(test: str) -> None:
    path, _, name = test.partition("::")
    assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_a_torch_without_cuda_is_refused_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "virtual_gpu.build"]
    done = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert f"torch {torch.__version__}" in line and "with CUDA 13, and nvcc" in line


@on_the_virtual_gpu
def test_a_pause_keeps_its_stream_busy(gpu: Device) -> None:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    torch.cuda._sleep(20_000_000)
    stop.record()
    stop.synchronize()
    assert start.elapsed_time(stop) >= 20
