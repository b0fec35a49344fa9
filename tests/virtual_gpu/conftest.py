"""Fixtures for the tests of the virtual GPU itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from virtual_gpu.device import Device, device
from virtual_gpu.names import POLICY, SEED, active

Told = Callable[[], list[str]]  # takes what was complained of since it was last called


@pytest.fixture
def gpu() -> Iterator[Device]:
    """The virtual GPU, whose policy a test may choose."""
    if not active():
        pytest.skip("needs the virtual GPU: make test-virtual-gpu PYTHON=...")
    yield device()
    device().choose_policy(os.environ[POLICY], int(os.environ[SEED]))


@pytest.fixture
def told(gpu: Device) -> Told:
    return gpu.take_complaints
