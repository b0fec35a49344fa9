"""Runs ``on_ray.py``, on a cluster that nobody else can reach."""

from __future__ import annotations

import pytest
from alone import run_alone

pytest.importorskip("ray", reason="the extra ray is not installed")
pytest.importorskip("ray.serve", reason="the extra ray is not installed without [serve]")


@pytest.mark.slow
def test_on_a_cluster() -> None:
    run_alone("on_ray.py")
