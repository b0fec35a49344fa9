"""One server for the tests of a module that leave it as it was."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))

if TYPE_CHECKING:
    from serving import Served

for needed in ("fastapi", "uvicorn", "websockets", "httpx", "aiortc", "prometheus_client"):
    pytest.importorskip(needed)


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """A frame rate at which no test waits for frames."""
    from serving import QUICK

    from echo_rt.runtime import Runtime

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runtime, "fps", QUICK)
        yield


@pytest.fixture(scope="module")
def server(small_model: Path, tmp_path_factory: pytest.TempPathFactory, quick: None) -> Iterator[Served]:
    from serving import served

    with served(small_model, tmp_path_factory.mktemp("live") / "out") as found:
        yield found
