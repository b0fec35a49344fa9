"""What travels to a GPU machine, and that it is not too much."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import travel
from travel import MIB

WHEELS = {"nvtx-1.0-cp312-cp312-any.whl": 3 * MIB, "nvidia_ml_py-2.0-py3-none-any.whl": MIB}
AV = {"av-19.0-cp312-abi3-any.whl": 40 * MIB}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout whose files take 2 MiB: one is tracked, one is new; what git ignores does not count."""
    root = tmp_path / "checkout"
    (root / "build").mkdir(parents=True)
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    for name in ("tracked", "new", "build/ignored"):
        (root / name).write_bytes(bytes(MIB))
    (root / "tracked").write_bytes(bytes(MIB - len("/build/\n")))
    (root / ".gitignore").write_text("/build/\n")
    (root / "gone").touch()
    subprocess.run(["git", "add", "tracked", "gone"], cwd=root, check=True)
    (root / "gone").unlink()
    return root


def gather(root: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    def fetch(requirements: list[str], folder: Path, python: str) -> None:
        assert python == "3.12" and requirements[-1].startswith("av>=")
        for name, size in (WHEELS | AV).items():
            (folder / name).write_bytes(bytes(size))

    monkeypatch.setattr(travel, "fetch", fetch)
    return travel.main(list(arguments), root)


def test_all_that_travels_is_counted(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "build" / "travel").mkdir()
    (root / "build" / "travel" / "old-1.0-py3-none-any.whl").write_bytes(bytes(90 * MIB))
    assert gather(root, monkeypatch) == 0
    rows = dict(re.findall(r"^ *([\d.]+) MiB  (\S+)", capsys.readouterr().out, re.MULTILINE))
    assert rows == {"2.00": "this", "40.00": next(iter(AV)), "3.00": "nvtx-1.0-cp312-cp312-any.whl"} | {
        "1.00": "nvidia_ml_py-2.0-py3-none-any.whl",
        "46.00": "all,",
    }
    assert {path.name for path in (root / "build" / "travel").iterdir()} == {*WHEELS, *AV}


@pytest.mark.parametrize(("limit", "code"), [("46", 0), ("45.9", 0), ("6", 0), ("5.9", 1)])
def test_too_much_fails_and_av_is_what_stays_behind(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], limit: str, code: int
) -> None:
    assert gather(root, monkeypatch, "--limit", limit) == code
    out, err = capsys.readouterr()
    assert ("left out, as it does not fit: av-19.0" in out) == (limit != "46")
    assert (f"6.00 MiB pass the limit of {limit} MiB" in err) == bool(code)


def test_a_wheel_that_cannot_be_had_fails(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fetch(*given: object) -> None:
        raise subprocess.CalledProcessError(1, "pip")

    monkeypatch.setattr(travel, "fetch", fetch)
    assert travel.main([], root) == 1 and "pip" in capsys.readouterr().err


def test_versions_are_those_of_the_package() -> None:
    assert travel.requirement("nvtx") == "nvtx>=0.2.8" and travel.requirement("nvidia-ml-py") == "nvidia-ml-py>=12.535"
    assert travel.requirement("wcwidth") == "wcwidth"
