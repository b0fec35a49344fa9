"""The file that remembers convolutions: what is in it, and what damages it. The rest is attention's, tested there."""

from __future__ import annotations

import json
import logging

import pytest

from echo_rt.autotune.cache import Case, Entry
from echo_rt.convolution import CACHE, ConvolutionShape, cache_file

CAUSAL = ConvolutionShape(14, 60, 104, 384, 384, (3, 3, 3))
GROWING = ConvolutionShape(12, 60, 104, 384, 192, (1, 3, 3), enlarge=True)


def entry(shape: ConvolutionShape = CAUSAL, winner: str = "conv3d") -> Entry[ConvolutionShape]:
    case = Case({"gpu": "Imaginary 9000", "kinds": {"conv3d": None, "kernel": "cuda"}}, "bfloat16", shape)
    return Entry(case, winner, {"conv3d": 1.5, "three-products": 2.0}, {"kernel": "it is gone"})


def test_both_families_there_and_back(tmp_path, caplog):
    path = tmp_path / "convolution.json"
    for each in (entry(), entry(GROWING, "phases"), entry(winner="three-products")):
        CACHE.remember(path, each)
    assert CACHE.entries(path) == [entry(GROWING, "phases"), entry(winner="three-products")], "one for each case"
    assert CACHE.recall(path, entry(GROWING).case) == entry(GROWING, "phases")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert json.loads(path.read_text())["entries"][0]["convolution"] == "phases"


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
    path = tmp_path / "convolution.json"
    CACHE.remember(path, entry())
    content = json.loads(path.read_text())
    content["entries"][0]["case"]["shapes"][field] = value
    path.write_text(json.dumps(content))
    assert CACHE.entries(path) == []
    (warning,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    assert warning.name == "echo_rt.convolution" and "\n" not in warning.getMessage()
    assert "is damaged" in warning.getMessage() and warning.getMessage().endswith("convolution is measured anew")
    CACHE.remember(path, entry(GROWING))
    assert CACHE.entries(path) == [entry(GROWING)]


def test_another_subjects_file_is_damage(tmp_path, caplog):
    path = tmp_path / "convolution.json"
    CACHE.remember(path, entry())
    path.write_text(path.read_text().replace('"convolution":', '"attention":'))
    assert CACHE.entries(path) == [] and "is damaged" in caplog.text


def test_where_the_file_is(monkeypatch, tmp_path):
    monkeypatch.setenv("ECHO_RT_CACHE_DIR", str(tmp_path))
    assert cache_file() == tmp_path / "convolution.json"
