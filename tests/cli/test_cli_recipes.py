"""``recipes``, ``--recipe``, and how a run says which one it has."""

from __future__ import annotations

import json
import shutil

import pytest

from echo_rt.recipes import RECIPES


def test_the_table(echo_rt):
    outcome = echo_rt("recipes", "--json")
    assert outcome.code == 0
    listed = {recipe["name"]: recipe for recipe in outcome.json["recipes"]}
    assert list(listed) == list(RECIPES)
    step = listed["causal-forcing-framewise-2step"]
    assert step["facts"]["first_block_steps"] == [1000, 750, 500, 250] and step["facts"]["denoising_steps"] == [
        1000,
        500,
    ]
    assert (step["ema"], step["memory"], step["lora"]) == (True, "absent", False)
    assert "hf download zhuhz22/Causal-Forcing causal-forcing++/framewise-2step.pt --local-dir Causal-Forcing" in [
        file["download"] for file in step["files"]
    ]

    page = echo_rt("recipes")
    assert (page.code, page.err) == (0, "")
    for name, recipe in RECIPES.items():
        (shown,) = (part for part in page.out.split("\n\n") if part.startswith(f"{name}\n"))
        words = dict(line.split(maxsplit=1) for line in shown.splitlines() if len(line.split()) > 1)
        assert set(recipe.facts) <= set(words), name
        for note in recipe.notes:
            assert note in shown
    assert "  denoising_steps    1000,500\n" in page.out and "  EMA weights        yes\n" in page.out


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "--prompt", "a", "-o", "v.mp4", "--frames", "1"),
        ("soak", "--out", "out", "--blocks", "1"),
        ("bench",),
    ],
    ids=lambda command: command[0],
)
def test_a_name_that_is_none(echo_rt, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    outcome = echo_rt(*command, "--model", "m", "--recipe", "longlife")
    assert outcome.code == 2
    assert outcome.error.startswith("recipe must be one of") and "did you mean 'longlive'?" in outcome.error
    assert list(tmp_path.iterdir()) == []


def test_a_benchmark_of_random_weights_has_none(echo_rt):
    outcome = echo_rt("bench", "--recipe", "longlive")
    assert outcome.code == 2 and "--recipe: expected --model DIR with it" in outcome.error


def test_a_run_says_which_one_it_has(echo_rt, small_model, tmp_path):
    checkpoint = small_model / "echo_infinity.pt"
    model = ("generate", "--model", small_model, "--checkpoint", checkpoint, "--device", "cpu", "--frames", 1)
    outcome = echo_rt(*model, "--prompt", "a", "-o", tmp_path / "v.mp4", "--json")
    assert outcome.code == 0, outcome.err
    line = (
        f"echo-rt: recipe echo-infinity-long (the folder names it): the plain weights of {checkpoint} "
        f"(as in the recipe), in {small_model}"
    )
    assert [text for text in outcome.err.splitlines() if " block " not in text] == [line]
    report = outcome.json
    assert (report["recipe"], report["recipe_reason"]) == ("echo-infinity-long", "the folder names it")
    assert (report["ema"], report["checkpoint"], report["loras"]) == (False, str(checkpoint), [])

    short = (*model, "--prompt", "a", "-o", tmp_path / "w.mp4", "--recipe", "echo-infinity-short")
    outcome = echo_rt(*short, "--quiet")
    assert outcome.code == 0
    (warning,) = outcome.err.splitlines()
    assert warning.startswith("echo-rt: warning: the memory encoder of recipe echo-infinity-short normalizes its keys")
    outcome = echo_rt(*short, "--json", "--overwrite")
    assert outcome.json["warnings"] == [warning.removeprefix("echo-rt: warning: ")]


def test_a_stock_folder_is_refused_with_the_list(echo_rt, small_model, tmp_path):
    folder = tmp_path / "stock"
    shutil.copytree(small_model, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["echo_rt"]
    (folder / "config.json").write_text(json.dumps(config))
    video = ("--prompt", "a", "-o", tmp_path / "v.mp4", "--frames", 1, "--size", "32x32", "--device", "cpu")
    outcome = echo_rt("generate", "--model", folder, *video)
    assert outcome.code == 2 and all(name in outcome.error for name in RECIPES)
    assert not (tmp_path / "v.mp4").exists()
    assert echo_rt("generate", "--model", folder, *video, "--recipe", "self-forcing").code == 0
