"""``verify``: table, JSON, exit codes."""

from __future__ import annotations

import shutil

import pytest
from safetensors.torch import load_file, save_file


def test_golden_bundles_pass(echo_rt, golden_dir, tmp_path):
    outcome = echo_rt(
        "verify", golden_dir / "text_encoder", golden_dir / "vae", "--device", "cpu", "--dump", tmp_path, "--json"
    )
    assert outcome.code == 0, outcome.err
    assert outcome.json["passed"] is True
    assert [(b["name"], b["kind"], b["passed"]) for b in outcome.json["bundles"]] == [
        ("text_encoder", "text_encoder", True),
        ("vae", "vae", True),
    ]
    rows = {row["name"]: row for row in outcome.json["bundles"][1]["tensors"]}
    assert set(rows) == set(load_file(tmp_path / "vae" / "actual.safetensors")) == {"video", "encoded"}
    assert all(row["ok"] and row["error"] <= row["bound"] == 1e-4 for row in rows.values())


@pytest.fixture
def wrong_bundle(golden_dir, tmp_path):
    """A bundle that expects something else."""
    bundle = tmp_path / "wrong"
    shutil.copytree(golden_dir / "text_encoder", bundle)
    expected = load_file(bundle / "expected.safetensors")
    save_file({"prompt_embeds": -expected["prompt_embeds"]}, bundle / "expected.safetensors")
    return bundle


def test_a_difference_is_shown_and_fails(echo_rt, golden_dir, wrong_bundle):
    outcome = echo_rt("verify", wrong_bundle, golden_dir / "text_encoder", "--device", "cpu")
    assert outcome.code == 1 and outcome.err == ""
    assert "2.00e+00" in outcome.out and "off" in outcome.out
    assert "wrong: failed, 0 of 1 tensors within bounds" in outcome.out
    assert "text_encoder: passed, 1 of 1 tensors within bounds" in outcome.out
    assert echo_rt("verify", wrong_bundle, "--json").json["bundles"][0]["tensors"][0]["error"] == pytest.approx(2)


@pytest.mark.parametrize("config", [None, "{", '{"kind": "poem"}'], ids=["absent", "broken", "unknown"])
def test_what_is_no_bundle(echo_rt, tmp_path, config):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    outcome = echo_rt("verify", tmp_path)
    assert outcome.code == 2
    assert str(tmp_path) in outcome.error


def test_other_mistakes(echo_rt, golden_dir):
    outcome = echo_rt("verify", golden_dir / "vae", "--backend", "magic")
    assert outcome.code == 2 and "magic" in outcome.error
    outcome = echo_rt("verify", golden_dir / "vae", "--device", "toaster")
    assert outcome.code == 2 and "toaster" in outcome.error
