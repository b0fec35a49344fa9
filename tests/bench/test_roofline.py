"""Bytes, operations and sizes of the benchmarks are those of docs/kernels.md, number by number."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from op_inputs import OPS, variants
from roofline import memory_update_work, work_of

from echo_rt.bench.settings import RELEASED
from echo_rt.errors import ConfigError

PAGE = (Path(__file__).parent.parent.parent / "docs" / "kernels.md").read_text(encoding="utf-8")
META = torch.device("meta")


def rows_of(heading: str) -> list[list[str]]:
    """Cells of the tables below a heading."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]


def works(op: str) -> dict[str, tuple[int, int, int]]:
    """Variant -> calls a block, bytes and operations of a call, at the released sizes in 16 bits."""
    found = {}
    for variant in variants(op, RELEASED):
        work = work_of(op, variant.arguments(torch.bfloat16, META))
        found[variant.name] = (variant.calls, work.bytes, work.flops)
    return found


def documented_calls() -> dict[tuple[str, str], list[str]]:
    """(op, variant) -> its row of the page; a row that begins with dots goes on with the op before."""
    rows, op = {}, ""
    for cells in rows_of("Bytes of a call"):
        if name := re.match(r"`(\w+)`(?:, (.+))?", cells[0]):
            op, variant = name[1], name[2] or ""
        elif cells[0].startswith("..."):
            variant = cells[0].removeprefix("...").strip()
        else:
            continue
        rows[op, variant] = cells
    return rows


def test_every_operation_has_a_formula_and_inputs() -> None:
    for op in OPS:
        assert all(moved > 0 for _, moved, _ in works(op).values()) and works(op)
    with pytest.raises(ConfigError, match="dream has no formula"):
        work_of("dream", ())


@pytest.mark.parametrize(("op", "variant"), [key for key in documented_calls() if key[0] != "rms_silu_window"])
def test_bytes_of_a_call(op: str, variant: str) -> None:
    cells = documented_calls()[op, variant]
    megabytes = float(re.fullmatch(r"([\d.]+) MB|(\d+) MB", cells[4])[0].split()[0])
    assert works(op)[variant][1] / 1e6 == pytest.approx(megabytes, abs=0.51 if megabytes > 200 else 0.051)
    if operations := re.match(r"([\d.]+) GFLOP", cells[5]):
        assert works(op)[variant][2] / 1e9 == pytest.approx(float(operations[1]), abs=0.051)


def test_levels_of_the_decoder() -> None:
    by_height: dict[int, float] = {}
    for variant in variants("rms_silu_window", RELEASED):
        moved = work_of(variant.op, variant.arguments(torch.bfloat16, META)).bytes
        height = variant.sizes.vae[1]
        by_height[height] = by_height.get(height, 0.0) + variant.calls * moved / 1e9
    documented = [float(cells[4].split()[0]) for cells in rows_of("Bytes of a call") if cells[4].endswith("GB")]
    assert list(by_height.values()) == pytest.approx(documented, abs=0.0051)


def test_norms_are_those_of_the_decoder() -> None:
    norms = variants("rms_silu_window", RELEASED)
    levels = {norm.sizes.vae[1]: norm.sizes.vae[0] for norm in norms}
    assert levels == {60: 3, 120: 6, 240: 6, 480: 3}
    # Two a residual block and one of the head; all but the head's first keep their sum, or have none to keep.
    assert sum(norm.calls for norm in norms) == 2 * (2 + 3 + 3 + 2 * 3) + 4 * (2 * 3 + 1)
    residual, keep = ({norm.name: place not in norm.without for norm in norms} for place in (2, 6))
    assert sum(norm.calls for norm in norms if residual[norm.name] and not keep[norm.name]) == 4
    assert sum(norm.calls for norm in norms if keep[norm.name]) == (2 + 3 + 3 + 2 * 3) + 4 * 3


def test_operations_of_the_convolutions() -> None:
    documented, total = {}, 0.0
    for pixels, channels, kernel, calls, each, block in (
        row for row in rows_of("The decoder's convolutions") if re.fullmatch(r"\d+-\d+", row[1])
    ):
        documented[f"{pixels} {channels} {kernel}"] = (int(calls), float(each.split()[0]), float(block.split()[0]))
    for op in ("causal_conv", "upsample_conv"):
        for name, (calls, _, flops) in works(op).items():
            assert documented.pop(name) == (
                calls,
                pytest.approx(flops / 1e9, abs=0.051),
                pytest.approx(calls * flops / 1e12, abs=0.0051),
            )
            total += calls * flops / 1e12
    assert not documented
    assert f"{total:.1f} TFLOP in all" in PAGE
    # What the specification counts, but for the pixels of the enlarged picture, and for what is no convolution there.
    enlarged = sum(calls * flops for calls, _, flops in works("upsample_conv").values()) / 1e12
    assert total + enlarged * (9 / 4 - 1) == pytest.approx(39.6, rel=0.03)


def test_hopper_takes_all_but_the_narrow_ones_and_those_in_time() -> None:
    """By far the most of the decoder's arithmetic, in the same calls."""
    ordinary, hopper = works("causal_conv"), works("causal_conv_hopper")
    assert hopper == {name: ordinary[name] for name in hopper}
    share = sum(calls * flops for calls, _, flops in hopper.values()) / 1e12
    assert share == pytest.approx(36.67, abs=0.01)


def test_the_memory_update_is_what_the_specification_counts() -> None:
    work = memory_update_work(RELEASED.config, RELEASED.config.tokens_per_block, 2)
    assert work.flops / 1e12 == pytest.approx(0.84, abs=0.005)
    assert work.limit == "arithmetic"


def test_released_sizes() -> None:
    config = RELEASED.config
    assert (config.tokens_per_frame, config.memory_tokens, config.transformer.head_dim) == (1560, 4680, 128)
