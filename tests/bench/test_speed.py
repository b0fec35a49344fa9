"""The count of a block: its tables on docs/speed.md, and the model of two lanes that share the multiprocessors."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_table import Results
from op_inputs import IN8, variants
from roofline import Work, memory_update_work, work_of
from speed import (
    CALLS,
    CONFIG,
    DIM,
    GAP,
    KEYS,
    PAGE,
    PRODUCTS,
    SMS,
    TOKENS,
    Kernel,
    attention,
    block_table,
    decoder_kernels,
    decoder_lines,
    kernel,
    layer_kernels,
    main,
    memory_lines,
    product,
    product_table,
    put,
    schedule_table,
    tables,
    together,
    transformer_lines,
    update_table,
)

from echo_rt.bench.settings import RELEASED
from echo_rt.bench.tables import markdown

HEADER: dict[str, Any] = {"date": "d", "commit": "c", "torch": "2", "cuda": "13", "cudnn": 9, "echo_rt": "0"}
HEADER |= {"gpu": {"name": "G", "driver": "1"}}
BLOCK = {row["line"]: row for row in block_table()}


def test_the_page_has_these_tables() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name, table in tables().items():
        assert put(page, name, markdown(*table)) == page, "python bench/speed.py --write"
    assert put(page, "block", "another") != page
    assert "measured |" not in page


def check_of(folder: Path, us: float | None = 2.0) -> Results:
    """A check in which each call of a kernel took ``us`` microseconds, and half as many in float8."""
    rows = [
        {"op": op, "variant": each.name, "calls": each.calls, "median_us": us and us / (1 + (IN8 in each.name))}
        for op in BLOCK
        if op.isidentifier()
        for each in variants(op, RELEASED)
    ]
    rows += [{"op": "memory_update", "variant": "state, keys, values", "calls": 1, "median_us": 1500.0}]
    for name, calls, took in (("product q, k, v", 150, 100.0), (f"product q, k, v, {IN8}", 150, 60.0)):
        rows.append({"op": "library", "variant": name, "calls": calls, "median_us": took})
    rates = {
        "Attention": (("bfloat16", 600.0), ("float8_e4m3fn", 900.0)),
        "Attention over the text": (("bfloat16", 500.0),),
    }
    attentions = {place: [{"dtype": d, "tflops": rate} for d, rate in found] for place, found in rates.items()}
    parts = {"transformer, all passes": 290.0, "VAE decode": 85.0, "whole block, one at a time": 380.0}
    block = [{"variant": "evolve", "part": part, "ms": ms} for part, ms in parts.items()]
    files = {"kernels/kernel_times": {"Kernels": rows}, "attention/attention": attentions}
    for path, found in (files | {"block/block": {"Block": block}}).items():
        file = folder / f"{path}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"tables": found}))
    (folder / "steps.tsv").write_text("step\tstate\n")
    (folder / "machine").mkdir()
    (folder / "machine" / "environment.json").write_text(json.dumps(HEADER))
    return Results(folder)


def test_what_a_check_measured_stands_beside_what_is_predicted(tmp_path: Path) -> None:
    rows, headings = tables(check_of(tmp_path))["block"]
    assert [column.heading for column in headings[-2:]] == ["measured", "in float8"]
    found = {row["line"]: (row["measured"], row["measured8"]) for row in rows}
    # All calls of a line at 2 us, whichever sizes they have; causal_conv without those that another kernel takes.
    for op in ("gated_residual_norm", "qkv_norm_rope_store", "rms_silu_window", "causal_conv", "causal_conv_hopper"):
        assert found[op][0] == pytest.approx(2e-3 * BLOCK[op]["calls"]), op
    assert found["qkv_norm_rope_store"][1] == pytest.approx(1e-3 * (5 * 29 + 5 * 2)), "the last layer in 16 bits"
    assert found["gated_residual_norm"][1] is None and found["gelu_quantize"][0] is None and found["gelu_quantize"][1]
    assert found["product q, k, v"] == (pytest.approx(15.0), pytest.approx(9.0))
    assert found["product ffn_in"] == (None, None) and found["memory update"] == (1.5, 1.5)
    flops = BLOCK["self-attention"]["tflop"]
    assert found["self-attention"] == (pytest.approx(flops / 0.6), pytest.approx(flops / 0.9))
    assert found["text attention"][0] == pytest.approx(BLOCK["text attention"]["tflop"] / 0.5)
    assert found["**decoder**"] == (85.0, None) and found["**block, all in turn**"] == (380.0, None)


def test_what_a_check_lacks_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tables(check_of(tmp_path, us=None))["block"][0]
    assert {row["measured"] for row in rows if row["line"].isidentifier()} == {None}
    assert main(["--measured", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "| measured | in float8 |" in shown and "G, driver 1" in shown


def test_what_is_no_check_of_a_gpu_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_of(tmp_path)
    (tmp_path / "machine" / "environment.json").write_text(json.dumps(HEADER | {"gpu": None}))
    for folder, words in ((tmp_path / "none", "a folder with a steps.tsv"), (tmp_path, "the check of a GPU")):
        with pytest.raises(SystemExit) as ended:
            main(["--measured", str(folder)])
        assert ended.value.code == 2 and f"--measured: expected {words}, found" in capsys.readouterr().err


@pytest.mark.parametrize("op", [name for name in BLOCK if name.isidentifier() and "conv" not in name])
def test_lines_of_kernels_are_the_calls_of_the_model(op: str) -> None:
    ways = [each for each in variants(op, RELEASED) if IN8 not in each.name]
    calls = [(each.calls, each.arguments(torch.bfloat16, torch.device("meta"))) for each in ways]
    assert BLOCK[op]["calls"] == sum(count for count, _ in calls)
    assert BLOCK[op]["gb"] == pytest.approx(sum(count * work_of(op, args).bytes for count, args in calls) / 1e9)


def test_a_call_into_float8_takes_the_place_of_its_counterpart(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = variants("qkv_norm_rope_store", RELEASED)[:2]
    small = dataclasses.replace(one, name=f"{one.name}, {IN8}".removeprefix(", "))
    monkeypatch.setattr("speed.variants", lambda op, model: [one, two, small])
    monkeypatch.setattr("speed.work_of", lambda op, args: Work(args, 0, "memory"))
    bytes_of = {one.name: 60, two.name: 70, small.name: 45}
    monkeypatch.setattr(type(one), "arguments", lambda self, *_: bytes_of[self.name])
    line = kernel("qkv_norm_rope_store")
    assert line.calls == one.calls + two.calls
    assert line.float8 == pytest.approx((45 * one.calls + 70 * two.calls) / (60 * one.calls + 70 * two.calls))


@pytest.mark.parametrize("op", ["causal_conv", "causal_conv_hopper", "upsample_conv"])
def test_lines_of_convolutions_are_theirs(op: str) -> None:
    flops = sum(
        each.calls * work_of(op, each.arguments(torch.bfloat16, torch.device("meta"))).flops
        for each in variants(op, RELEASED)
    )
    # Every convolution is in one line, and causal_conv could do those of causal_conv_hopper as well.
    lines = [BLOCK[op]["tflop"]] + ([BLOCK["causal_conv_hopper"]["tflop"]] if op == "causal_conv" else [])
    assert sum(lines) == pytest.approx(flops / 1e12)


def test_sums() -> None:
    transformer, decoder, block = (BLOCK[name] for name in BLOCK if name.startswith("**"))
    for key in ("calls", "gb", "tflop", "before", "now", "float8"):
        assert block[key] == pytest.approx(transformer[key] + decoder[key])
    # What the specification of the model counts: products, both attentions, the memory, the decoder.
    assert transformer["tflop"] == pytest.approx(58.2 + 100.3 + 2.2 + 0.84, abs=0.1)
    assert decoder["tflop"] == pytest.approx(38.7, abs=0.1)
    assert transformer["now"] - transformer["float8"] > 80 and decoder["now"] == decoder["float8"] < decoder["before"]
    only8, only16 = BLOCK["gelu_quantize"], BLOCK["gated_residual_norm"]
    assert only8["now"] is None and only16["float8"] is None
    with_all = sum(line.calls for line in transformer_lines() if line.only != 8)
    assert transformer["calls"] == with_all and len(decoder_lines()) == 56 + 8 + 52 + 7


def test_whole_waves() -> None:
    out = {layer.name: product(layer) for layer in PRODUCTS}["self_out"]
    assert (out.calls, out.tiles) == (CALLS, 37 * 6) and out.flops == 2 * TOKENS * DIM * DIM
    assert out.full / out.best == pytest.approx(2 * SMS * 128 * 256 / (TOKENS * DIM))
    rows = {row["name"]: row for row in product_table()}
    assert all(row["ideal"] <= row["searched"] <= row["full"] for row in rows.values() if row["searched"])
    assert rows["ffn_out"]["stream"] < rows["ffn_out"]["full"] and rows["self_out"]["stream"] > rows["self_out"]["full"]
    assert attention("", 23400, pieces=2).full / attention("", 23400).full == pytest.approx(3.5 / 4)


def test_a_lane_alone() -> None:
    assert together((0, [Kernel(SMS + 1, 1.0), Kernel(1, 2.0)])) == [pytest.approx(4.0 + GAP)]


def test_a_lane_fills_the_last_wave_of_another() -> None:
    first = [Kernel(SMS + 2, 1.0)]
    assert together((0, first), (-1, [Kernel(SMS - 2, 1.0)])) == [2.0, 2.0]
    assert together((0, first), (-1, [Kernel(SMS - 1, 1.0)])) == [2.0, 3.0]
    assert together((0, first), (1, [Kernel(SMS - 2, 1.0)])) == [2.0, 1.0]


def test_a_block_of_threads_is_not_interrupted() -> None:
    late = [Kernel(1, 1.0), Kernel(SMS, 1.0)]
    whole, beside = together((1, late), (0, [Kernel(SMS - 1, 3.0)]))
    assert beside == 3.0 and whole == pytest.approx(4.0) and whole > together((1, late))[0]


def test_of_equal_lanes_the_kernel_that_came_first_goes_on() -> None:
    assert together((0, [Kernel(3 * SMS, 1.0)]), (0, [Kernel(SMS, 1.0)])) == [3.0, 4.0]


def test_a_pause_holds_nothing() -> None:
    assert together((0, [Kernel(0, 3.0), Kernel(1, 1.0)]), (-1, [Kernel(SMS, 2.0)])) == [pytest.approx(4.0), 2.0]


def test_the_update_of_the_memory_is_all_of_it() -> None:
    whole = memory_update_work(RELEASED.config, TOKENS, 2)
    assert sum(line.flops for line in memory_lines()) == whole.flops
    assert sum(line.moved for line in memory_lines()) > whole.bytes  # what is between its kernels too
    alone, *others = (
        sum(row["ended"] for row in update_table() if row["priority"] == p)
        for p in ("the transformer's", "the decoder's")
    )
    assert alone < min(others)


def test_a_block_has_every_kernel_of_its_layers() -> None:
    in16, in8, fitting = layer_kernels(), layer_kernels(float8=True), layer_kernels(fitting=True)
    assert (len(in16), len(in8), len(fitting)) == (13, 14, 15)
    alone = 1e3 * together((0, in16 * 30 * 5))[0]
    lines = [line.row()["now"] for line in transformer_lines() if line.calls > 100 and line.only != 8]
    assert alone == pytest.approx(sum(lines) * 150 / 149 + 1e3 * GAP * 13 * 150, rel=5e-3)


def memory_cost(column: str) -> float:
    """By which share the memory makes a block longer; 3 of 5 bytes that ``reanchor`` moves are the memory's."""
    whole, attends = BLOCK["**block, all in turn**"][column], BLOCK["self-attention"][column]
    part = attends * CONFIG.memory_tokens / KEYS + BLOCK["memory update"][column] + 0.6 * BLOCK["reanchor"][column]
    return float(part / (whole - part))


@cache
def said() -> dict[str, tuple[float, ...]]:
    """What the page says in words -> the numbers that it has there, in the order of the words."""
    block, schedules = BLOCK["**block, all in turn**"], schedule_table()

    def of(what: str, first: str = "the transformer", blocks: str = "one a multiprocessor") -> dict[str, float]:
        return next(r for r in schedules if (r["transformer"], r["first"], r["blocks"]) == (what, first, blocks))

    now, decoder, eight, fit = of("as now"), of("as now", "the decoder"), of("float8"), of("pieces and tiles that fit")
    turn, short = (
        of("pieces and tiles that fit", "one after the other"),
        of("pieces and tiles that fit", blocks="one a tile"),
    )
    products, attentions = product_table()[-2:]
    memory = [memory_cost(column) for column in ("now", "float8")]
    memory_ms = [share / (1 + share) * block[column] for share, column in zip(memory, ("now", "float8"), strict=True)]
    saved = [
        w["whole"] - of(n, blocks=b)["whole"]
        for b in ("one a tile", "one for 4 tiles")
        for n, w in (("as now", now), ("float8", eight))
    ]
    four = 1e3 * (together((0, decoder_kernels(4)))[0] - together((0, decoder_kernels()))[0])
    update = BLOCK["memory update"]
    return {
        "| {:.0f} ms in turn, {:.0f} with [both lanes]": (block["now"], now["whole"]),
        "| {:.0f} in turn, {:.0f} with both lanes, {:.0f} if convolutions have shorter blocks": (
            block["float8"], eight["whole"], of("float8", blocks="one a tile")["whole"],
        ),
        "| missed by {:.0f} ms, as built": (eight["whole"] - 270,),
        "| {:.0f}, and 4 to 14 for a tiny decoder": (BLOCK["**transformer and memory**"]["float8"],),
        "{:.0f} of {:.0f} ms, {:.1%} more | missed": (memory_ms[0], block["now"], memory[0]),
        "| {:.0f} of {:.0f} ms, {:.1%} more | missed": (memory_ms[1], block["float8"], memory[1]),
        "would take {:.0f} ms less and products in [tiles that fit](#linear-layers) {:.0f} ms: {:.0f} in turn": (
            (attentions["full"] - attentions["split"]) / 0.9,
            (products["full"] - products["searched"]) / 0.86,
            turn["whole"],
        ),
        "they reach {:.0f}, or {:.0f} with shorter blocks of threads in the convolutions, {:.0f} ms more than": (
            fit["whole"], short["whole"], short["whole"] - 324,
        ),
        "frames come later, by {:.0f} ms, where a block is shorter by {:.0f}.": (
            now["frames"] - decoder["frames"], decoder["whole"] - now["whole"],
        ),
        "on average {:.1f} ms.": (BLOCK["causal_conv_hopper"]["now"] / BLOCK["causal_conv_hopper"]["calls"],),
        "would save another {:.0f} ms in bf16 and {:.0f} in float8.": tuple(saved[:2]),
        "would save {:.0f} and {:.0f} ms, but a decoder that runs alone takes {:.0f} ms more": (*saved[2:], four),
        "{:.0f} kernels, {:.1f} ms of work beside a first pass of {:.0f} ms": (
            update["calls"], update["now"], BLOCK["**transformer and memory**"]["now"] / 5,
        ),
        "saves {:.1f} ms of {:.1f}, or": (products["full"] - products["searched"], products["full"]),
    }  # fmt: skip


@pytest.mark.parametrize("words", said())
def test_prose_has_the_numbers_of_the_tables(words: str) -> None:
    page = " ".join(PAGE.read_text(encoding="utf-8").replace(" %", "%").split())
    assert words.format(*said()[words]) in page


def test_a_decoder_that_begins_late_costs_the_block_nothing() -> None:
    late = next(row for row in schedule_table() if "begins after" in row["first"])
    now = next(row for row in schedule_table() if row["first"] == "the transformer")
    assert late["whole"] == pytest.approx(now["whole"], abs=0.1) and late["frames"] < late["whole"]
