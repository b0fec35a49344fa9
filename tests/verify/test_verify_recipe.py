"""Published recipes, run by the publishers' own code, through the public interface: their files, their noise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from echo_rt.errors import EchoError
from echo_rt.ops.backends import available_backends
from echo_rt.verify.bundles import RECIPE_BOUNDS, find_bundles, verify_bundle

RECIPES = ("causal_forcing_framewise_2step", "echo_infinity_short", "longlive_early_switch")
# float32 agrees better than its bound; this keeps it so.
SHARP = 2e-6


def check(bundle: Path, dtype: torch.dtype, backend: str = "torch") -> None:
    report = verify_bundle(bundle, device="cpu", dtype=dtype, backend=backend)
    assert report.kind == "recipe" and {row.bound for row in report.rows} == {RECIPE_BOUNDS[dtype]}
    assert {row.name for row in report.rows} == set(load_file(bundle / "expected.safetensors"))
    assert report.passed, [f"{row.name} {row.error:.1e}" for row in report.rows if not row.ok]
    assert report.backend.name == backend
    if dtype == torch.float32:
        assert max(row.error for row in report.rows) < SHARP


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", RECIPES)
def test_a_published_recipe_is_what_its_publisher_runs(golden_dir: Path, name: str, dtype: torch.dtype) -> None:
    check(golden_dir / "recipes" / name, dtype)


@pytest.mark.skipif(available_backends()["emulated"] != "available", reason="this build has no emulated kernels")
@pytest.mark.parametrize("name", RECIPES)
def test_a_published_recipe_on_emulated_kernels(golden_dir: Path, name: str) -> None:
    check(golden_dir / "recipes" / name, torch.bfloat16, "emulated")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_published_recipe(shared_golden: Path, dtype: torch.dtype) -> None:
    """But those of the repository itself."""
    bundles = {bundle.name: bundle for bundle in find_bundles(shared_golden / "recipes")}
    assert set(bundles) > set(RECIPES)
    for name in set(bundles) - set(RECIPES):
        check(bundles[name], dtype)


def changed(bundle: Path, folder: Path, **changes: object) -> Path:
    """The bundle of a recipe with another ``config.json``, in ``folder``; what it names lies where it lay."""
    shutil.copytree(bundle, folder)
    config = json.loads((folder / "config.json").read_text())
    files = {name: str((bundle / config[name]).resolve()) for name in ("model", "checkpoint", "lora") if config[name]}
    (folder / "config.json").write_text(json.dumps(config | files | changes))
    return folder


@pytest.mark.parametrize(
    ("name", "changes", "wrong"),
    [
        # The first block that is off in a recipe that is nearly the same.
        ("echo_infinity_short", {"overrides": {"memory_reads": "unrotated"}}, 4),
        ("causal_forcing_framewise_2step", {"overrides": {"first_block_steps": []}}, 0),
        ("longlive_early_switch", {"overrides": {"recache_sink": False}}, 3),
        ("longlive_early_switch", {"lora": None}, 0),
    ],
    ids=str,
)
def test_another_recipe_is_told_from_it(
    golden_dir: Path, tmp_path: Path, name: str, changes: dict[str, object], wrong: int
) -> None:
    report = verify_bundle(changed(golden_dir / "recipes" / name, tmp_path / name, **changes), device="cpu")
    assert not report.passed
    assert min(int(row.name.split(".")[1]) for row in report.rows if not row.ok) == wrong


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"recipe": "longlife"}, "recipe must be one of"),
        ({"checkpoint": 3}, "expected checkpoint to be a path, got 3"),
        ({"checkpoint": "nowhere.pt"}, r"nowhere\.pt: expected a file, found none"),
        ({"num_blocks": "7"}, "Expected `int`, got `str`"),
        ({"num_blocks": 8}, "expected a tensor 'noise.7', and it is not there"),
        ({"prompt_switch_blocks": [2]}, "expected a tensor 'prompt_embeds.1'"),
        ({"overrides": {"sink": 3}}, "overrides may name"),
        ({"overrides": {"frames_per_block": 1}}, r"noise\.0 has shape"),
    ],
    ids=str,
)
def test_a_damaged_bundle_of_a_recipe(golden_dir: Path, tmp_path: Path, changes: dict[str, object], words: str) -> None:
    name = "longlive_early_switch" if "overrides" in changes else "echo_infinity_short"
    with pytest.raises(EchoError, match=words):
        verify_bundle(changed(golden_dir / "recipes" / name, tmp_path / "b", **changes), device="cpu")


def test_bundles_are_found_in_folders(golden_dir: Path) -> None:
    """Not the model's folder among them, whose config has no kind."""
    found = find_bundles(golden_dir)
    assert [bundle.name for bundle in found] == [*RECIPES, "rollout_small", "text_encoder", "vae"]
    assert find_bundles(golden_dir / "vae") == [golden_dir / "vae"]


def test_bundles_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = ["2", "10", "a2b", "a10", "b"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"kind": "vae"}')
    assert [bundle.name for bundle in find_bundles(tmp_path)] == names
