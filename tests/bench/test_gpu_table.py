"""The table of a GPU check: figures where steps left them, goals, and what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gpu_table import FIGURES, Results, main, page
from speed import block_table, schedule_table

GPU = {"name": "G", "driver": "1", "sm_clock_mhz": 1980}
HEADER = {"date": "d", "commit": "c", "torch": "2", "cuda": "13", "cudnn": 9, "echo_rt": "0", "gpu": GPU}
BLOCK = [("whole block, one at a time", 410.0, 412.0), ("whole block, 1 begun ahead", 390.0, 400.0)]
BLOCK += [("transformer, all passes", 280.0, 281.0), ("VAE decode", 110.0, 111.0)]


def parts(variant: str, scale: float = 1.0) -> list[dict[str, Any]]:
    return [
        {"variant": variant, "part": part, "ms": scale * ms, "p99_ms": scale * p99, "fps": 12e3 / ms}
        for part, ms, p99 in BLOCK
    ]


def variant(name: str, **changes: Any) -> dict[str, Any]:
    return {"variant": name, "verdict": "right, measured", "graphs": True, **changes}


def block(*rows: dict[str, Any], variants: list[dict[str, Any]], **facts: Any) -> dict[str, Any]:
    return {"environment": HEADER, "tables": {"Block": [*rows], "Variants": variants}, **facts}


def kernel(op: str, **facts: Any) -> dict[str, Any]:
    row = {"op": op, "variant": "", "limit": "memory", "share": 0.9, "problems": [], "calls": 1, "flops": 0}
    return row | {"median_us": 1.0} | facts


def whole() -> dict[str, Any]:
    """What each step of a check writes, as file -> content."""
    rates = {"a": 500.0, "b": 600.0, "c": None}
    attention: list[dict[str, Any]] = [{"name": n, "dtype": "bfloat16", "tflops": rate} for n, rate in rates.items()]
    attention += [{"name": n, "dtype": "float8_e4m3fn", "tflops": 1000.0} for n in ("cudnn-float8", "sage-attention")]
    kernels = [kernel("reanchor"), kernel("advance", share=None, limit="neither")]
    kernels += [
        kernel("causal_conv_hopper", limit="arithmetic", calls=2, flops=4 * 10**11, median_us=1e3),
        kernel("causal_conv_hopper", limit="arithmetic", calls=1, flops=2 * 10**11, median_us=1e3),
    ]
    ceilings = [{"unit": "GB/s", "value": 4300.0}, {"unit": "TFLOP/s", "value": 790.0}]
    bundle = {"bundle": "vae", "backend": "cuda", "dtype": "float8", "ok": True, "note": "", "error": 1e-3}
    off = block(*parts("evolve"), *parts("off", 0.9), variants=[variant("evolve"), variant("off")])
    resources = {"growth": 0, "peak": 11_400_000_000}
    return {
        "machine/environment": HEADER,
        "block/block": block(*parts("evolve"), variants=[variant("evolve")], resources=resources),
        "float8/block": block(*parts("evolve", 0.8), variants=[variant("evolve")]),
        "memory/block": off,
        "vae/vae": {"tables": {"Decoders": [{"decoder": "echo-rt", "ms": 105.0}]}},
        "kernels/kernel_times": {"tables": {"Kernels": kernels, "Ceilings": ceilings}},
        "attention/attention": {"tables": {"Attention": attention}},
        "profile/block_profile": {"idle": 0.015},
        "golden/golden": {"tables": {"Bundles": [bundle]}},
    }


def write(folder: Path, files: dict[str, Any], **states: str) -> Path:
    lines = ["step\tstate\tseconds\tlimit\texit code\tnote"]
    for step in dict.fromkeys(["machine", *(figure.step for figure in FIGURES)]):
        lines.append(f"{step}\t{states.get(step, 'passed')}\t1\t2\t0\t")
    (folder / "steps.tsv").write_text("\n".join(lines) + "\n")
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def rows(text: str) -> dict[str, list[str]]:
    """The cells of the first table by their first."""
    table = text.partition("## Figures\n")[2].partition("## Steps")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if "|" in line]
    return {first: rest for first, *rest in lines}


def test_a_whole_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write(tmp_path, whole()))]) == 0
    text = capsys.readouterr().out
    measured = {name: cells[0] for name, cells in rows(text).items()}
    assert measured["whole block, bfloat16"] == "390 ms" and measured["p99 over median"] == "1.026"
    assert measured["whole block, float8"] == "312 ms" and measured["memory against no memory"] == "11.11 % more"
    assert measured["3x3 convolutions, our kernel"] == "333.3 TFLOP/s", "calls and times of a whole block"
    assert measured["attention over the cache, best"] == "600 TFLOP/s"
    assert measured["attention over the cache, float8"] == "1000 TFLOP/s"
    assert measured["memory-bound kernels, the slowest"] == "90 % of a copy"
    assert measured["peak of device memory"] == "11.4 GB" and measured["GPU idle in a replayed block"] == "1.5 %"
    verdicts = {name: cells[2] for name, cells in rows(text).items()}
    assert verdicts["VAE decode, alone"] == "unmet"
    assert verdicts["whole block, bfloat16"] == "met" and verdicts["memory against no memory"] == "unmet"
    assert "sm_clock_mhz 1980" in text and "Missing" not in text and "rehearsal" not in text


def test_predictions_are_those_of_the_page() -> None:
    """docs/speed.md has these tables."""
    block = {row["line"]: row for row in block_table()}
    lanes = {
        row["transformer"]: row["whole"] for row in reversed(schedule_table()) if row["first"] == "the transformer"
    }
    decoder = block["**decoder**"]["now"]

    def rate(line: str, column: str = "now") -> float:
        return float(1e3 * block[line]["tflop"] / block[line][column])

    expected = {
        "whole block, bfloat16": lanes["as now"],
        "video frames a second": 12e3 / lanes["as now"],
        "transformer, all passes": block["**transformer and memory**"]["now"],
        "VAE decode, in the block": decoder,
        "VAE decode, alone": decoder,
        "whole block, float8": lanes["float8"],
        "attention over the cache, best": rate("self-attention"),
        "attention over the cache, float8": rate("self-attention", "float8"),
        "3x3 convolutions, our kernel": rate("causal_conv_hopper"),
    }
    predicted = {figure.what: figure.predicted for figure in FIGURES}
    assert {name: predicted[name] for name in expected} == {name: f"{value:.0f}" for name, value in expected.items()}


@pytest.mark.parametrize("gone", whole())
def test_what_is_missing_is_named(tmp_path: Path, gone: str) -> None:
    files = whole()
    del files[gone]
    step = gone.partition("/")[0]
    text, complete = page(Results(write(tmp_path, files, **{step: "timed out"})))
    assert not complete and f"- step {step} timed out" in text
    for figure in FIGURES:
        assert (f"- {figure.what}: step {step} timed out" in text) == (figure.step == step)


def test_what_a_number_does_not_say_is_said(tmp_path: Path) -> None:
    files = whole()
    verdict = "right, measured without graphs, which failed"
    files["block/block"]["tables"]["Variants"] = [variant("evolve", graphs=False, verdict=verdict)]
    files["golden/golden"]["tables"]["Bundles"][0] |= {"ok": False}
    files["kernels/kernel_times"]["tables"]["Kernels"][0] |= {"problems": ["off by 1"]}
    text, _ = page(Results(write(tmp_path, files, block="failed")))
    assert f"- block, evolve: {verdict}; without graphs" in text and "- reanchor : off by 1" in text
    assert "- vae (cuda, float8) is off" in text and rows(text)["golden bundles as expected"][0] == "0 %"


def test_a_part_of_the_bundles_is_not_all_of_them(tmp_path: Path) -> None:
    text, _ = page(Results(write(tmp_path, whole(), golden="timed out")))
    assert rows(text)["golden bundles as expected"][0] == "missing" and "1 of 1 runs so far as expected" in text


def test_a_rehearsal_judges_nothing(tmp_path: Path) -> None:
    files = whole()
    host = {"gpu": None, "host": {"processor": "p", "cores": 2}}
    files["block/block"]["environment"] = files["machine/environment"] = HEADER | host
    text, _ = page(Results(write(tmp_path, files)))
    assert "A rehearsal without a GPU" in text and {cells[2] for cells in rows(text).values()} <= {
        "",
        "verdict",
        "---",
        "-------",
    }


@pytest.mark.parametrize("argument", ["absent", "", "."])
def test_a_folder_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argument: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([argument] if argument else []) == 2
    assert "expected one folder with a steps.tsv" in capsys.readouterr().err
