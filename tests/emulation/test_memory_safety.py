"""Every kernel of the package under the sanitizers of addresses and undefined behaviour, with no byte to spare."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from cases import OPS
from host_compiler import ROOT, SANITIZERS, build, require_sanitizers


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_sanitizers(tmp_path_factory)
    listed = (ROOT / "csrc" / "sources.txt").read_text(encoding="utf-8")
    kernels = [ROOT / name for name in re.findall(r"^_ops (\S+\.cu)$", listed, re.MULTILINE)]
    sources = [*kernels, Path(__file__).parent / "memory_driver.cpp"]
    return build(tmp_path_factory, "memory", sources, "-O0", *SANITIZERS)


def run(driver: Path, *words: str) -> subprocess.CompletedProcess[str]:
    # Leak checks need rights that a container may not give.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([str(driver), *words], capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.parametrize("op", OPS)
def test_a_kernel_stays_within_its_tensors(driver: Path, op: str) -> None:
    done = run(driver, op)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("op", OPS)
def test_one_element_more_than_there_are_is_found(driver: Path, op: str) -> None:
    """What the test above looks with can see."""
    done = run(driver, op, "1")
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
