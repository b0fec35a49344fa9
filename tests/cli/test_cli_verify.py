"""``verify``: table, JSON, exit codes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file


def test_golden_bundles_pass(echo_rt, golden_dir, tmp_path):
    outcome = echo_rt(
        "verify", golden_dir / "text_encoder", golden_dir / "vae", "--device", "cpu", "--dump", tmp_path, "--json"
    )
    assert outcome.code == 0, outcome.err
    assert outcome.json["passed"] is True
    chosen = {(bundle["backend"], bundle["backend_reason"]) for bundle in outcome.json["bundles"]}
    assert chosen == {("torch", "the device is cpu")}
    assert [(b["name"], b["kind"], b["passed"]) for b in outcome.json["bundles"]] == [
        ("text_encoder", "text_encoder", True),
        ("vae", "vae", True),
    ]
    rows = {row["name"]: row for row in outcome.json["bundles"][1]["tensors"]}
    assert set(rows) == set(load_file(tmp_path / "vae" / "actual.safetensors")) == {"video", "encoded"}
    assert all(row["ok"] and row["error"] <= row["bound"] == 1e-4 for row in rows.values())
    precisions = [bundle["precisions"] for bundle in outcome.json["bundles"]]
    assert precisions[0] == [] and [each["dtype"] for each in precisions[1]] == ["bfloat16", "float16"]
    assert all(each["psnr"] > 40 and 0.99 < each["ssim"] <= 1 for each in precisions[1])


def test_a_folder_of_bundles(echo_rt, golden_dir, tmp_path):
    for name in ("rollout_small", "text_encoder"):
        shutil.copytree(golden_dir / name, tmp_path / "all" / "deep" / name)
    (tmp_path / "all" / "config.json").write_text("not JSON")
    arguments = ("verify", tmp_path / "all", "--device", "cpu", "--dump", tmp_path / "dump", "--json")
    outcome = echo_rt(*arguments)
    assert outcome.code == 0, outcome.err
    assert [bundle["name"] for bundle in outcome.json["bundles"]] == ["rollout_small", "text_encoder"]
    assert sorted(path.name for path in (tmp_path / "dump").iterdir()) == ["rollout_small", "text_encoder"]
    shutil.copytree(golden_dir / "rollout_small", tmp_path / "all" / "rollout_small")
    assert echo_rt(*arguments).error == "--dump: expected bundles of different names, got two called 'rollout_small'"
    (tmp_path / "empty").mkdir()
    outcome = echo_rt("verify", tmp_path / "empty", "--device", "cpu")
    assert outcome.code == 2 and "expected the folder of a golden bundle or of a model, found no VAE" in outcome.error


def test_a_bundle_of_a_recipe(echo_rt, golden_dir):
    outcome = echo_rt("verify", golden_dir / "recipes" / "longlive_early_switch", "--device", "cpu")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("longlive_early_switch (recipe)\n")
    assert "longlive_early_switch: passed, 9 of 9 tensors within bounds" in outcome.out
    assert "  recipe longlive (asked for by name): the plain weights of " in outcome.out
    outcome = echo_rt("verify", golden_dir / "recipes" / "longlive_early_switch", "--device", "cpu", "--json")
    (bundle,) = outcome.json["bundles"]
    assert (bundle["recipe"], bundle["ema"]) == ("longlive", False)
    assert [Path(lora["file"]).name for lora in bundle["loras"]] == ["longlive_lora.pt"]


def test_a_model_beside_a_bundle(echo_rt, golden_dir, small_model, tmp_path, monkeypatch):
    monkeypatch.setattr("echo_rt.verify.decoder._SIZE", (16, 16))
    outcome = echo_rt("verify", golden_dir / "vae", small_model, "--device", "cpu", "--dump", tmp_path)
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("video in bfloat16 beside float32: PSNR ") == 2
    assert outcome.out.count("  backend torch: the device is cpu\n") == 2
    assert "video in mixed groups" in outcome.out and "small: passed, 5 of 5 tensors within bounds" in outcome.out
    assert (tmp_path / "small" / "actual.safetensors").is_file() and (tmp_path / "vae").is_dir()


def test_a_model_whose_groups_show_fails(echo_rt, small_model, monkeypatch):
    monkeypatch.setattr("echo_rt.verify.decoder._SIZE", (16, 16))
    monkeypatch.setattr("echo_rt.verify.bundles.relative_error", lambda one, other: float("nan"))
    outcome = echo_rt("verify", small_model, "--device", "cpu", "--json")
    assert outcome.code == 1 and outcome.json["passed"] is False
    assert outcome.json["bundles"][0]["kind"] == "model"
    assert {row["error"] for row in outcome.json["bundles"][0]["tensors"]} == {None}


def test_float8_has_a_bound_of_its_own(echo_rt, golden_dir, tmp_path):
    """Only where there are float8 products: a VAE is held to bfloat16's bound."""
    call = ("verify", "--device", "cpu", "--dtype", "float8", "--json")
    outcome = echo_rt(*call, golden_dir / "rollout_small", golden_dir / "vae")
    assert outcome.code == 0, outcome.err
    bounds = [{row["bound"] for row in bundle["tensors"]} for bundle in outcome.json["bundles"]]
    assert bounds == [{6e-2}, {1.5e-2}]
    errors = [row["error"] for row in outcome.json["bundles"][0]["tensors"]]
    kept = echo_rt(*call, golden_dir / "rollout_small", "--float8-except", "*")
    assert max(row["error"] for row in kept.json["bundles"][0]["tensors"]) < 1.5e-2 < max(errors)
    refused = echo_rt(*call, golden_dir / "rollout_small", "--float8-except", "blocks.7.*")
    assert refused.code == 2 and "'blocks.7.*' matches no layer" in refused.err


@pytest.mark.parametrize("dtype", [[], ["--dtype", "bfloat16"]], ids=["default", "bfloat16"])
def test_layers_kept_from_float8_need_float8(echo_rt, golden_dir, dtype):
    """Whatever is verified: a decoder has no such layers, and would not miss them."""
    outcome = echo_rt("verify", golden_dir / "text_encoder", "--float8-except", "*.ffn.2", *dtype)
    got = dtype[-1] if dtype else "float32"
    assert outcome.code == 2 and outcome.error.endswith(f"--float8-except: expected --dtype float8 with it, got {got}")


def test_layers_kept_from_float8_must_be_there(echo_rt, golden_dir, small_model, tmp_path):
    """One rollout among the bundles has them; a folder that is none is refused as such."""
    call = ("verify", "--device", "cpu", "--dtype", "float8", "--float8-except", "nomatch")
    decoders = (golden_dir / "vae", golden_dir / "text_encoder", small_model)
    outcome = echo_rt(*call, *decoders, "--float8-except", "*.ffn.2")
    assert outcome.code == 2 and outcome.out == ""
    assert "--float8-except: 'nomatch', '*.ffn.2' matches no layer" in outcome.error
    assert "blocks.N.self_attn.q, " in outcome.error and outcome.error.endswith("blocks.N.self_attn.attention")
    outcome = echo_rt(*call, golden_dir / "text_encoder", golden_dir / "rollout_small")
    assert outcome.code == 2 and "text_encoder: passed" in outcome.out and "N in 0..1" in outcome.error
    outcome = echo_rt(*call, golden_dir / "text_encoder", tmp_path)
    assert outcome.code == 2 and "expected the folder of a golden bundle" in outcome.error


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


def test_a_folder_that_is_no_bundle_does_not_keep_the_others_from_running(echo_rt, golden_dir, wrong_bundle, tmp_path):
    good = golden_dir / "text_encoder"
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    outcome = echo_rt("verify", "--json", good, nothing, good, "--device", "cpu")
    assert (outcome.code, outcome.json["exit_code"], outcome.json["passed"]) == (2, 2, False)
    assert [(bundle["name"], bundle["passed"]) for bundle in outcome.json["bundles"]] == [
        ("text_encoder", True),
        ("nothing", False),
        ("text_encoder", True),
    ]
    assert outcome.json["bundles"][1]["error"] == outcome.error
    assert str(nothing) in outcome.error

    outcome = echo_rt("verify", nothing, wrong_bundle, good, "--device", "cpu")
    assert outcome.code == 2, "worse than a bound that does not hold"
    assert "wrong: failed" in outcome.out and "text_encoder: passed" in outcome.out


def test_not_passed_when_it_does_not_come_to_its_end(echo_rt, golden_dir, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("echo_rt.verify.bundles.verify_bundle", fail)
    outcome = echo_rt("verify", "--json", golden_dir / "vae")
    assert outcome.code == 1 and outcome.json["passed"] is False


def test_the_model_in_the_package_goes_by_its_name(echo_rt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # as make demo makes it
    outcome = echo_rt("verify", "demo", "--device", "cpu")
    assert outcome.code == 0, outcome.err
    assert "demo_model (model)" in outcome.out and "demo_model: passed" in outcome.out
    outcome = echo_rt("verify", "./demo", "--device", "cpu")
    assert outcome.code == 2 and "demo: expected the folder of a golden bundle or of a model" in outcome.error


def test_other_mistakes(echo_rt, golden_dir):
    outcome = echo_rt("verify", golden_dir / "vae", "--backend", "magic")
    assert outcome.code == 2 and "magic" in outcome.error
    outcome = echo_rt("verify", golden_dir / "vae", "--backend=")
    assert outcome.code == 2 and "backend must be one of torch, emulated, cuda; got ''" in outcome.error
    outcome = echo_rt("verify", "x" * 300)
    assert outcome.code == 2 and "no VAE and no config.json in it (File name too" in outcome.error
    outcome = echo_rt("verify", golden_dir / "vae", "--device", "toaster")
    assert outcome.code == 2 and "toaster" in outcome.error


def test_dump_of_two_bundles_of_one_name(echo_rt, tmp_path):
    outcome = echo_rt("verify", tmp_path / "a" / "vae", tmp_path / "b" / "vae", "--dump", tmp_path / "out")
    assert outcome.code == 2 and "two called 'vae'" in outcome.error
    assert not (tmp_path / "out").exists()


def test_a_dump_into_a_file_is_refused_before_anything_is_run(echo_rt, golden_dir, tmp_path):
    (tmp_path / "file").touch()
    outcome = echo_rt("verify", golden_dir / "vae", "--dump", tmp_path / "file")
    assert outcome.code == 2 and outcome.out == "" and "got a file in its place" in outcome.error


def test_a_dump_into_the_bundle_itself(echo_rt, golden_dir, tmp_path):
    shutil.copytree(golden_dir / "vae", tmp_path / "vae")
    before = sorted((tmp_path / "vae").iterdir())
    for dump in (tmp_path, tmp_path / "vae"):
        outcome = echo_rt("verify", tmp_path / "vae", "--dump", dump)
        assert outcome.code == 2 and "--dump: expected a folder apart from what is read" in outcome.error
    assert sorted((tmp_path / "vae").iterdir()) == before


def test_a_file_beside_the_bundles_is_left_out(echo_rt, golden_dir, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("about the bundles")
    outcome = echo_rt("verify", readme, golden_dir / "text_encoder", "--json")
    assert outcome.code == 0 and outcome.json["passed"]
    assert [bundle["name"] for bundle in outcome.json["bundles"]] == ["text_encoder"]
    assert "README.md: a file, not the folder of a bundle; left out" in outcome.err
    outcome = echo_rt("verify", readme)
    assert outcome.code == 2 and "got the file" in outcome.error
