"""Runs ``in_browser.py`` in a network namespace of its own, with a real Chromium."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("playwright")
CASES = Path(__file__).parent / "in_browser.py"
# WebRTC skips 127.0.0.1 and needs an address with a route.
NETWORK = """
ip link set lo up && ip link add v0 type veth peer name v1 && ip addr add 10.99.0.1/24 dev v0 &&
ip link set v0 up && ip link set v1 up && ip route add default via 10.99.0.2 dev v0 && exec "$@"
"""


def in_namespace(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command with a network that has nobody else in it."""
    words = ["unshare", "--net", "bash", "-c", NETWORK, "network", *command]
    return subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ)


@pytest.mark.slow
def test_in_a_browser() -> None:
    chromium = os.environ.get("ECHO_RT_CHROMIUM", "/usr/bin/chromium")
    if not Path(chromium).exists():
        pytest.skip(f"there is no {chromium}: install Chromium, or name it in ECHO_RT_CHROMIUM")
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        pytest.skip("unshare and ip, which make a network namespace, are not installed")
    trial = in_namespace("true")
    if trial.returncode:
        pytest.skip(f"no network namespace can be made here: {trial.stdout.strip()}")
    words = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", str(CASES)]
    done = in_namespace(*words)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-8000:]
