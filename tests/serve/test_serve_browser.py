"""Runs ``in_browser.py`` in a network namespace of its own, with a real Chromium."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from alone import run_alone

pytest.importorskip("playwright")


@pytest.mark.slow
def test_in_a_browser() -> None:
    chromium = os.environ.get("ECHO_RT_CHROMIUM", "/usr/bin/chromium")
    if not Path(chromium).exists():
        pytest.skip(f"there is no {chromium}: install Chromium, or name it in ECHO_RT_CHROMIUM")
    run_alone("in_browser.py")
