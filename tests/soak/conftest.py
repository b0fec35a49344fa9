"""Fixtures of the tests of soaks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from soaking import write_smallest


@pytest.fixture(scope="session")
def smallest_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tests must not change it."""
    return write_smallest(tmp_path_factory.mktemp("models") / "smallest")
