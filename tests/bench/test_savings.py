"""The exact savings: what is counted follows from sizes, what is timed computes the same, and a rehearsal says so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import golden
import kernel_times
import pytest
import savings
import savings_probes
import torch
import vae
from savings_counts import H200, PRODUCTS, Counts, Limits
from savings_probes import COLLAPSED, CUT_SHORT, MERGED, log_sum_exp, merge_padding

from echo_rt.attention.backends import IMPLEMENTATIONS
from echo_rt.bench.settings import RELEASED

DOCS = Path(__file__).parent.parent.parent / "docs" / "savings.md"
COUNTS = Counts(RELEASED.config, H200)
ALL = [f"product {name}" for name in PRODUCTS] + ["attention to the text", "norms"]

# ---- counts


def test_the_transformers_count_is_the_sum_of_its_products() -> None:
    tokens, keys, dim, wide, layers = 4680, 23400, 1536, 8960, 30
    of_a_token = 2 * (6 * dim * dim + 2 * dim * wide)
    flops = 5 * layers * tokens * (of_a_token + 4 * dim * (keys + 512))
    assert COUNTS.transformer == pytest.approx(1e3 * flops / H200.flops)
    assert COUNTS.keys == keys and COUNTS.attentions == 5 * layers - 1


def test_only_whole_waves_are_counted() -> None:
    """4608 columns: 37 x 18 tiles are 6 waves of 132, 74 x 18 are 11. 1536 columns: 2 waves, and 4."""
    wave = 1e3 * 132 * 128 * 256 * 2 * 1536 / H200.flops
    stacked, plain = COUNTS.merged_product("qkv"), COUNTS.merged_product("self_out")
    assert (stacked.now, stacked.then) == (pytest.approx(30 * 12 * wave), pytest.approx(30 * 11 * wave))
    assert plain.now == plain.then == pytest.approx(29 * 4 * wave)
    assert COUNTS.wasted("self_out") == pytest.approx(29 * wave * (4 - 2 * 4680 / 128 * 6 / 132))
    fewer = Counts(RELEASED.config, replace(H200, multiprocessors=1))
    assert all(fewer.merged_product(name).saved >= 0 for name in PRODUCTS)


def test_collapsed_attention_is_bound_by_its_bytes_where_keys_are_few() -> None:
    now, row = 1e3 * 4 * 4680 * 512 * 1536 / H200.flops, 1e3 * 4680 * 1536 * 2 / H200.bytes
    few = COUNTS.collapsed(31, merged_outside=False)
    assert few.now == pytest.approx(149 * now)
    assert few.then == pytest.approx(149 * row * 2 * (4680 + 32) / 4680)
    assert COUNTS.collapsed(31, merged_outside=True).then == pytest.approx(149 * row * (3 + 2 * (4680 + 31) / 4680))
    slow = Counts(RELEASED.config, replace(H200, flops=1e12)).collapsed(31, merged_outside=False)
    assert slow.saved / slow.now == pytest.approx(1 - 32 / 512)  # where arithmetic alone decides


def test_attention_in_pieces_fills_its_last_wave() -> None:
    """37 tiles of queries for each of 12 heads: 4 waves of 132, 7 of half the keys, 11 of a third, 14 of a quarter."""
    wave, row = 1e3 * 132 * 4 * 128 * 23400 * 128 / H200.flops, 1e3 * 4680 * 1536 * 2 / H200.bytes
    for pieces, waves in ((2, 7), (3, 11), (4, 14)):
        count = COUNTS.in_pieces(pieces)
        assert count.now == pytest.approx(149 * 4 * wave)
        assert count.then == pytest.approx(149 * (waves / pieces * wave + 2 * (pieces + 1) * row))


def test_the_page_has_the_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert savings.main(["--counts"]) == 0
    page = DOCS.read_text()
    assert capsys.readouterr().out in page
    merged = sum(COUNTS.merged_product(name).saved for name in PRODUCTS) + COUNTS.merged_cross_attention().saved
    wasted = sum(map(COUNTS.wasted, PRODUCTS))
    halves = COUNTS.in_pieces(2).saved
    for figure in (
        f"{COUNTS.transformer:.1f} ms at that rate",
        f"{merged:.2f} ms of a block: {merged / COUNTS.transformer:.1%}".replace("%", " %"),
        f"{wasted:.1f} ms, {wasted / COUNTS.transformer:.1%}".replace("%", " %"),
        f"{halves:.1f} ms less of a block: {halves / COUNTS.transformer:.1%}".replace("%", " %"),
        f"one pass later, {COUNTS.transformer / COUNTS.passes:.0f} ms",
    ):
        assert figure in page, figure


# ---- the merge


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("real", [1, 5, 15])
def test_padding_merged_in_is_attention_to_all_keys(real: int, dtype: torch.dtype) -> None:
    attention = next(kind for kind in IMPLEMENTATIONS if kind.name == "sdpa").load()
    generator = torch.Generator().manual_seed(real)
    q, k, v = (torch.randn(n, 2, 8, generator=generator).to(dtype) for n in (7, 16, 16))
    k[real:], v[real:] = k[-1].clone(), v[-1].clone()
    out = attention(q, k[:real], v[:real])
    merged = merge_padding(out, log_sum_exp(q, k[:real]), q, k[-1], v[-1], 16 - real)
    torch.testing.assert_close(merged, attention(q, k, v), rtol=0, atol=1e-6 if dtype is torch.float32 else 0.03)
    assert not torch.allclose(out, merged, atol=0.03)


# ---- a rehearsal


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, list[str]]:
    """The JSON, the page, and the calls in the order in which they ran."""
    order: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        turns_of = savings.turns_of

        def noted(number: int, names: Any) -> list[str]:
            order.extend(turns_of(number, names))
            return turns_of(number, names)

        patch.setattr(savings, "turns_of", noted)
        out = tmp_path_factory.mktemp("savings")
        assert savings.main(["--out", str(out), "--device", "cpu"]) == 0
    return json.loads((out / "savings.json").read_text()), (out / "savings.md").read_text(), order


def test_a_rehearsal_has_every_saving_and_says_what_it_is(rehearsal: tuple[dict[str, Any], str, list[str]]) -> None:
    content, page, _ = rehearsal
    rows = content["tables"]["Savings"]
    assert [row["what"] for row in rows if row["saving"] == MERGED] == [*ALL, "sum of its parts"]
    assert [row["what"].split(",")[0] for row in rows if row["saving"] == COLLAPSED] == [
        text for real in (1, 2, 4) for text in (f"8 keys to {real} + 1", f"8 keys to {real}")
    ]
    assert rows[-1]["saving"] == CUT_SHORT and rows[-1]["now_ms"] > 0
    assert content["passed"] and content["result"] is False
    assert "a rehearsal on a CPU, no results" in page.splitlines()[0]
    for row in rows:
        assert row["saved_ms"] == pytest.approx(row["now_ms"] - row["then_ms"])
        assert row["share"] == pytest.approx(row["saved_ms"] / content["block_ms"])
    parts, whole = rows[: len(ALL)], rows[len(ALL)]
    for name in ("now_ms", "then_ms", "counted_ms"):
        assert whole[name] == pytest.approx(sum(row[name] for row in parts))


def test_all_take_turns(rehearsal: tuple[dict[str, Any], str, list[str]]) -> None:
    content, _, order = rehearsal
    names = [*content["microseconds"], "a whole block"]
    half = len(order) // 2
    assert sorted(order[:half]) == sorted(order[half:]) == sorted(names) and order[0] != order[half]
    assert all(len(times) == 4 for times in content["microseconds"].values())


def test_a_wrong_merge_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(savings_probes, "merge_padding", lambda out, *rest: out)
    request = savings.Request(device="cpu")
    effort = savings.Effort(rounds=1, blocks=1, calls=1, warmup=0)
    found = savings.measure(
        request, torch.device("cpu"), savings.timer_for(torch.device("cpu")), Limits(1, 1, 1), effort
    )
    wrong = [row for row in found.rows if row.problem]
    assert len(wrong) == 3 and all("merged in by torch" in row.what and "off by" in row.problem for row in wrong)
    assert all(row.saved_ms is None for row in wrong) and not found.passed
    assert not [name for name in found.facts["microseconds"] if "by torch" in name]


def test_what_cannot_be_had(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert savings.main(["--out", str(tmp_path), "--device", "cpu", "--size", "released"]) == 2
    assert "the released sizes need a GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("bench", "measuring"),
    [(savings, "measure_ceilings"), (vae, "run"), (golden, "verify"), (kernel_times, "_run")],
    ids=["savings", "vae", "golden", "kernel_times"],
)
def test_what_cannot_be_written_is_known_before_anything_is_measured(
    bench: Any, measuring: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(*arguments: object, **options: object) -> None:
        raise AssertionError("measured all the same")

    monkeypatch.setattr(bench, measuring, measured)
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "deep"):
        assert bench.main(["--out", str(out), "--device", "cpu", "--quick"]) == 2
        told = capsys.readouterr().err.splitlines()
        assert len(told) == 1 and f"{out}: expected a folder for results, got a file in its place" in told[0]
    assert (tmp_path / "file").read_text() == "mine"
