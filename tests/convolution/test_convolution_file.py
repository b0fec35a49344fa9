"""The folder that remembers convolutions: what is in it, and what damages it. The rest is attention's, tested there."""

from __future__ import annotations

import json
import logging

import pytest

from echo_rt.autotune.cache import Case, Entry
from echo_rt.convolution import CACHE, ConvolutionShape, cache_folder

CAUSAL = ConvolutionShape(14, 60, 104, 384, 384, (3, 3, 3))
GROWING = ConvolutionShape(12, 60, 104, 384, 192, (1, 3, 3), enlarge=True)


def entry(shape: ConvolutionShape = CAUSAL, winner: str = "conv3d") -> Entry[ConvolutionShape]:
    case = Case({"gpu": "Imaginary 9000", "kinds": {"conv3d": None, "kernel": "cuda"}}, "bfloat16", shape)
    return Entry(case, winner, {"conv3d": 1.5, "three-products": 2.0}, {"kernel": "it is gone"})


def test_both_families_there_and_back(tmp_path, caplog):
    for each in (entry(), entry(GROWING, "phases"), entry(winner="three-products")):
        CACHE.remember(tmp_path, each)
    for each in (entry(GROWING, "phases"), entry(winner="three-products")):
        assert CACHE.recall(tmp_path, each.case) == each
    assert len(CACHE.entries(tmp_path)) == 2, "one for each case"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert all("convolution" in json.loads(path.read_text()) for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kernel", [3, 3]),
        ("kernel", 3),
        ("kernel", [3, 3, "3"]),
        ("frames", "14"),
        ("height", 1.5),
        ("enlarge", 1),
        ("enlarge", None),
        ("surplus", 1),
    ],
)
def test_a_wrong_shape_is_damage(tmp_path, caplog, field, value):
    CACHE.remember(tmp_path, entry())
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    content["case"]["shapes"][field] = value
    path.write_text(json.dumps(content))
    assert CACHE.entries(tmp_path) == []
    (warning,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    assert warning.name == "echo_rt.convolution" and "\n" not in warning.getMessage()
    assert "damaged" in warning.getMessage() and warning.getMessage().endswith("convolution is measured anew")
    CACHE.remember(tmp_path, entry())
    assert CACHE.entries(tmp_path) == [entry()]


def test_another_subjects_file_is_damage(tmp_path, caplog):
    CACHE.remember(tmp_path, entry())
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text().replace('"convolution":', '"attention":'))
    assert CACHE.entries(tmp_path) == [] and "damaged" in caplog.text


def test_where_the_folder_is(monkeypatch, tmp_path):
    monkeypatch.setenv("ECHO_RT_CACHE_DIR", str(tmp_path))
    assert cache_folder() == tmp_path / "convolution"
