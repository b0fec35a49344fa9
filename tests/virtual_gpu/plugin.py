"""pytest on the virtual GPU: which tests cannot be, and that nothing was used wrongly in those that can."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch  # noqa: F401 - at the end of its import, modules of this package are imported: it comes before them

from virtual_gpu.device import device
from virtual_gpu.names import POLICY, SEED

# Tests of what only a GPU has.
ONLY_ON_A_GPU = {
    "tests/bench/test_block_bench.py::test_a_gpu_is_measured_by_its_own_clock": "NVML knows nothing of it",
    "tests/bench/test_timing.py::test_a_gpu_is_timed": "its clock is the host's",
    "tests/soak/test_soak_gpu.py::test_on_a_gpu": "NVML knows nothing of it",
}


def pytest_report_header() -> str:
    return f"virtual GPU: {POLICY}={os.environ[POLICY]} {SEED}={os.environ[SEED]}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        reason = ONLY_ON_A_GPU.get(item.nodeid)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=f"not on the virtual GPU: {reason}"))


@pytest.fixture(autouse=True)
def nothing_is_used_wrongly() -> Iterator[None]:
    """A test may expect an error of CUDA. That a wrong use stays unnoticed, nobody expects: it takes the complaints."""
    device().take_complaints()
    yield
    complaints = device().take_complaints()
    assert not complaints, complaints
