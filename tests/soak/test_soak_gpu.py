"""What the driver tells of a GPU, by a stand-in for its binding."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from echo_rt.soak.probes import GpuHealth, device_memory, gpu_health, host_memory


class FakeNvml:
    """Two boards; that with the asked-for identity counts no ECC errors and no energy."""

    NVML_TEMPERATURE_GPU, NVML_CLOCK_SM, NVML_CLOCK_MEM = 0, 1, 2
    NVML_MEMORY_ERROR_TYPE_CORRECTED, NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC = 0, 1, 0

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.open = 0

    def nvmlInit(self) -> None:  # noqa: N802
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid != "GPU-the-second":
            raise self.NVMLError("Not Found")
        return "handle"

    def __getattr__(self, name: str) -> Any:
        answers = {
            "nvmlDeviceGetTemperature": {("handle", 0): 61},
            "nvmlDeviceGetClockInfo": {("handle", 1): 1980, ("handle", 2): 3201},
            "nvmlDeviceGetCurrentClocksEventReasons": {("handle",): 4},
            "nvmlDeviceGetPowerUsage": {("handle",): 651_000},
            "nvmlDeviceGetTotalEccErrors": {("handle", 0, 0): 5, ("handle", 1, 0): 0},
        }
        if name == "nvmlDeviceGetTotalEnergyConsumption":

            def refuse(handle: str) -> int:
                raise self.NVMLError("Not Supported")

            return refuse
        if name not in answers:
            raise AttributeError(name)
        return lambda *arguments: answers[name][arguments]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(uuid=f"the-{['first', 'second'][device.index]}"),
    )
    return fake


def test_figures_of_the_device_that_is_used(nvml: FakeNvml) -> None:
    health = gpu_health(torch.device("cuda", 1))
    assert health is not None
    assert health.read() == {
        "temperature_c": 61,
        "sm_clock_mhz": 1980,
        "memory_clock_mhz": 3201,
        "clock_limits": 4,
        "power_mw": 651_000,
        "energy_mj": None,
        "ecc_corrected": 5,
        "ecc_uncorrected": 0,
    }
    health.close()
    assert nvml.open == 0


def test_a_driver_that_does_not_know_the_device(nvml: FakeNvml) -> None:
    with pytest.warns(RuntimeWarning, match="cuda:0: .*Not Found; its figures are left out"):
        assert gpu_health(torch.device("cuda", 0)) is None
    assert nvml.open == 0


def test_without_the_binding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it fails
    with pytest.warns(RuntimeWarning, match="needs nvidia-ml-py.*; its figures are left out"):
        assert gpu_health(torch.device("cuda", 0)) is None


def test_a_part_of_a_board(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def handle(uuid: str) -> str:
        asked.append(uuid)
        if not uuid.startswith("MIG-"):
            raise nvml.NVMLError("Not Found")
        return "handle"

    monkeypatch.setattr(nvml, "nvmlDeviceGetHandleByUUID", handle)
    GpuHealth(nvml, torch.device("cuda", 1)).close()
    assert asked == ["GPU-the-second", "MIG-the-second"]


def test_the_binding_has_these_names() -> None:
    import pynvml

    for name in dir(FakeNvml):
        assert name.startswith("_") or hasattr(pynvml, name)
    for name in ("Temperature", "ClockInfo", "CurrentClocksEventReasons", "PowerUsage", "TotalEccErrors"):
        assert callable(getattr(pynvml, f"nvmlDeviceGet{name}"))
    assert callable(pynvml.nvmlDeviceGetTotalEnergyConsumption)


def test_a_cpu_has_none() -> None:
    assert gpu_health(torch.device("cpu")) is None and device_memory(torch.device("cpu")) is None


def test_the_hosts_memory_is_this_processes() -> None:
    before = host_memory()
    held = torch.ones(64 * 2**20, dtype=torch.uint8)
    after = host_memory()
    assert before["rss"] is not None and after["rss"] is not None and after["peak"] is not None
    assert 60 * 2**20 < after["rss"] - before["rss"] < 80 * 2**20
    assert after["peak"] >= after["rss"] - 2**20 and held.numel()


@pytest.mark.cuda
def test_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    pytest.importorskip("pynvml")
    device = torch.device("cuda", 0)
    held = torch.ones(2**20, device=device)
    memory = device_memory(device)
    assert memory is not None and memory["allocated"] >= held.numel() * 4 and memory["reserved"] >= memory["allocated"]
    health = gpu_health(device)
    assert health is not None
    figures = health.read()
    health.close()
    assert figures["temperature_c"] is not None and 0 < figures["temperature_c"] < 120
