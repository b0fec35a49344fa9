"""Runs tests in a network namespace of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_MOST_SECONDS = 1800

# WebRTC skips 127.0.0.1 and needs an address with a route.
NETWORK = """
ip link set lo up && ip link add v0 type veth peer name v1 && ip addr add 10.99.0.1/24 dev v0 &&
ip link set v0 up && ip link set v1 up && ip route add default via 10.99.0.2 dev v0 && exec "$@"
"""


def run_alone(cases: str, *options: str) -> None:
    """Run the tests of a file, with pytest's ``options``, in a network that has nobody else in it, or skip."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        pytest.skip("unshare and ip, which make a network namespace, are not installed")
    trial = _in_namespace("true")
    if trial.returncode:
        pytest.skip(f"no network namespace can be made here: {trial.stdout.strip()}")
    words = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = _in_namespace(*words, str(Path(__file__).parent / cases), *options)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-8000:]


def _in_namespace(*command: str) -> subprocess.CompletedProcess[str]:
    # Of processes too: whatever the tests leave running ends with them.
    words = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    words += ["bash", "-c", NETWORK, "network", *command]
    try:
        return subprocess.run(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ, timeout=_MOST_SECONDS
        )
    except subprocess.TimeoutExpired as late:  # a browser may hang
        pytest.fail(f"no end after {_MOST_SECONDS} s:\n{(late.stdout or b'').decode()[-8000:]}")
