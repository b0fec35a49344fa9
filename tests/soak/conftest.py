"""Fixtures of the tests of soaks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from lives import Lives
from soaking import write_smallest


@pytest.fixture(scope="session")
def smallest_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tests must not change it."""
    return write_smallest(tmp_path_factory.mktemp("models") / "smallest")


@pytest.fixture(scope="session")
def begins_lives(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lives]:
    with Lives(tmp_path_factory.mktemp("lives")) as made:
        yield made


@pytest.fixture
def lives(begins_lives: Lives) -> Iterator[Lives]:
    """Begins processes; none of them outlives the test."""
    yield begins_lives
    begins_lives.kill()
