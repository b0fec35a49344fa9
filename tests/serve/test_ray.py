"""Runs ``on_ray.py``, on a cluster that nobody else can reach; whole with ``ECHO_RT_LONG_SERVE``."""

from __future__ import annotations

import os

import pytest
from alone import run_alone

pytest.importorskip("ray", reason="the extra ray is not installed")
pytest.importorskip("ray.serve", reason="the extra ray is not installed without [serve]")


@pytest.mark.slow
def test_on_a_cluster() -> None:
    run_alone("on_ray.py", *([] if "ECHO_RT_LONG_SERVE" in os.environ else ["-k", "killed"]))
