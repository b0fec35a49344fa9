"""Fixtures shared by all tests."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import echo_rt  # imports torch, which not every test has

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS))  # lets every test import closeness, naive_rollout, ... by name

import fuzzing  # noqa: E402 - which sets how many examples hypothesis tries


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle", type=int, metavar="SEED", help="run the tests in another order, which SEED fixes")
    parser.addoption("--long", action="store_true", help="run the longer variants too, which are marked so")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="takes longer: --long"))
    seed = config.getoption("--shuffle")
    if seed is not None:
        random.Random(seed).shuffle(items)
    # Those of most of a minute come first, so that no worker is left alone with one in the end.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Have a test of hypothesis go on for the seconds that it is asked for."""
    if not fuzzing.SECONDS or not getattr(pyfuncitem.obj, "is_hypothesis_test", False):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    fuzzing.for_seconds(pyfuncitem.obj)(**{name: pyfuncitem.funcargs[name] for name in names})
    return True


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a test run measures is not what the user's programs should remember."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ECHO_RT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The small golden bundles that live in this repository."""
    return TESTS / "golden"


@pytest.fixture(scope="session")
def shared_golden() -> Path:
    """All golden bundles, where they are laid beside the checkout."""
    folder = TESTS.parent.parent / "shared" / "golden"
    if not folder.is_dir():
        pytest.skip("the large golden bundles are not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as ``echo-rt tiny`` writes it; tests must not change it."""
    from echo_rt.weights.tiny_model import write_tiny_model

    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_tiny_model(folder, width=64, height=48)
    return folder


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest one that ``tiny`` writes: its blocks take a tenth of a second. Tests must not change it."""
    from echo_rt.weights.tiny_model import write_tiny_model

    folder = tmp_path_factory.mktemp("models") / "small"
    write_tiny_model(folder, width=32, height=32)
    return folder


@pytest.fixture(scope="module")
def runtime(small_model: Path) -> Iterator[echo_rt.Runtime]:
    """The smallest model; modules that need another define a fixture of this name."""
    from streaming import load

    with load(small_model) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def expected(runtime: echo_rt.Runtime) -> list[echo_rt.Chunk]:
    """The beginning of its video, taken from a stream without more ado."""
    from streaming import video

    return video(runtime, 6)
