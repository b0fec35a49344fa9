"""The count of a block: its tables on docs/speed.md, and the model of two lanes that share the multiprocessors."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from op_inputs import variants
from roofline import Work, work_of
from speed import (
    CALLS,
    DIM,
    GAP,
    INTO8,
    PAGE,
    PRODUCTS,
    SMS,
    TOKENS,
    Kernel,
    attention,
    block_table,
    decoder_lines,
    kernel,
    main,
    product_table,
    put,
    tables,
    together,
    transformer_lines,
)

from echo_rt.bench.settings import RELEASED
from echo_rt.bench.tables import markdown

BLOCK = {row["line"]: row for row in block_table()}


def test_the_page_has_these_tables() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name, table in tables().items():
        assert put(page, name, markdown(*table)) == page, "python bench/speed.py --write"
    assert put(page, "block", "another") != page
    assert "measured |" not in page


def test_a_gpu_has_a_column_more(capsys: pytest.CaptureFixture[str]) -> None:
    assert tables(gpu=True)["block"][1][-1].heading == "measured"
    assert main([]) == 0 and "**block, all in turn**" in capsys.readouterr().out


@pytest.mark.parametrize("op", [name for name in BLOCK if name.isidentifier() and "conv" not in name])
def test_lines_of_kernels_are_the_calls_of_the_model(op: str) -> None:
    ways = [each for each in variants(op, RELEASED) if INTO8 not in each.name]
    calls = [(each.calls, each.arguments(torch.bfloat16, torch.device("meta"))) for each in ways]
    assert BLOCK[op]["calls"] == sum(count for count, _ in calls)
    assert BLOCK[op]["gb"] == pytest.approx(sum(count * work_of(op, args).bytes for count, args in calls) / 1e9)


def test_a_call_into_float8_takes_the_place_of_its_counterpart(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = variants("qkv_norm_rope_store", RELEASED)[:2]
    small = dataclasses.replace(one, name=f"{one.name}, {INTO8}".removeprefix(", "))
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
    out = {product.name: product.line() for product in PRODUCTS}["self_out"]
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


def test_prose_has_the_numbers_of_the_tables() -> None:
    page = PAGE.read_text(encoding="utf-8")
    block = BLOCK["**block, all in turn**"]
    assert f"| {block['now']:.0f} in turn; " in page and f"| {block['float8']:.0f} in turn, " in page
    schedules = [row for row in tables()["schedules"][0] if row["first"] == "the transformer"]
    low, high = (pick(row["whole"] for row in schedules) for pick in (min, max))
    assert re.search(rf"{low:.0f} to {high:.0f} with", page)
