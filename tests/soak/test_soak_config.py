"""What a soak may be asked for, and that --out belongs to one of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from echo_rt.cli import serve
from echo_rt.errors import ConfigError
from echo_rt.options import DEMO, DEMO_PROMPT
from echo_rt.soak.config import MANIFEST_FILE, Limits, SoakConfig, check_manifest, write_manifest
from echo_rt.utils.build_info import __version__
from echo_rt.weights.folder import DEMO_FOLDER


def config(out: object = "out", **changes: Any) -> SoakConfig:
    return SoakConfig(**{"model": "m", "out": str(out), "blocks": 10} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": None}, "one of --blocks and --hours, got none"),
        ({"hours": 1.0}, "one of --blocks and --hours, got both"),
        ({"blocks": 0}, "--blocks must be an integer of 1 or more, got 0"),
        ({"keep": 0}, "--keep must be an integer of 1 or more"),
        ({"hash_every": True}, "--hash-every must be an integer"),
        ({"interval": 0.0}, "--interval must be a number .*3600, got 0"),
        ({"interval": 4000}, "--interval must be a number .*3600, got 4000"),
        ({"interval": float("nan")}, "interval must be a number"),
        ({"prompts": ()}, "--prompt: expected one or more with text"),
        ({"prompts": ("a", " ")}, "--prompt: expected one or more with text"),
        ({"prompts": ("a", "b")}, "got 2 of them and --switch-every left out"),
        ({"switch_every": 3}, "got 1 of them and --switch-every 3"),
        ({"seed": -1}, "seed"),
        ({"memory": "none"}, "memory must be one of"),
        ({"overrides": {"width": 3}}, "overrides"),
    ],
)
def test_what_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    "changes",
    [{"drift": -1.0}, {"latency_ratio": 0.5}, {"warmup_blocks": None}, {"host_slack": None}, {"outliers": 1.01}],
)
def test_limits_that_cannot_be(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"--{next(iter(changes))}".replace("_", "-")):
        Limits(**changes)


def test_auto_depends_on_the_device() -> None:
    on_gpu, on_cpu = Limits().resolved("cuda"), Limits().resolved("cpu")
    assert (on_gpu.latency_ratio, on_gpu.latency_zscore, on_gpu.snapshot_stall) == (1.05, 10.0, 2000.0)
    assert (on_cpu.latency_ratio, on_cpu.latency_zscore, on_cpu.snapshot_stall) == (None, None, None)
    assert Limits(latency_ratio=2.0).resolved("cpu").latency_ratio == 2.0
    assert Limits(latency_ratio=None).resolved("cuda").latency_ratio is None


def test_prompts_go_round() -> None:
    soak = config(prompts=("a", "b", "c"), switch_every=4)
    assert [soak.prompt_of(block) for block in (0, 3, 4, 8, 11, 12)] == [0, 0, 1, 2, 2, 0]
    assert [block for block in range(10) if soak.switches_at(block)] == [4, 8]
    assert not any(config().switches_at(block) for block in range(10))


def test_the_same_soak_is_known_again(tmp_path: Path) -> None:
    soak = config(tmp_path, overrides={"denoising_steps": (1000,)}, limits=Limits(drift=0.5))
    assert check_manifest(soak) is None
    write_manifest(soak)
    assert check_manifest(soak) == soak.settings()
    # Who looks on may change.
    others = config(tmp_path, overrides=soak.overrides, limits=soak.limits, serve=("", 1), plots=False)
    assert check_manifest(others) == soak.settings()


def test_a_soak_may_become_longer(tmp_path: Path) -> None:
    write_manifest(config(tmp_path, blocks=10))
    assert check_manifest(config(tmp_path, blocks=11)) == config(tmp_path, blocks=10).settings()
    for change in ({"blocks": 11, "seed": 1}, {"blocks": None, "hours": 9.0}):
        with pytest.raises(ConfigError, match=r"holds another soak, name another --out: .*blocks was 10"):
            check_manifest(config(tmp_path, **change))
    with pytest.raises(ConfigError, match="longer, not shorter, name another --out: blocks was 10 and is 9"):
        check_manifest(config(tmp_path, blocks=9))
    write_manifest(config(tmp_path, blocks=None, hours=2.0))
    longer = check_manifest(config(tmp_path, blocks=None, hours=2.5))
    assert longer == config(tmp_path, blocks=None, hours=2.0).settings()


@pytest.mark.parametrize(("vae", "shown"), [("wan", "wan"), ("tiny", "tiny"), ("a/taew2_1.pth", "taew2_1.pth")])
def test_files_are_known_by_their_whole_path(
    vae: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder may be called what a decoder is called."""
    monkeypatch.chdir(tmp_path)
    settings = config(model="tiny", checkpoint="wan", vae=vae).settings()
    assert (settings["model"], settings["checkpoint"]) == (str(tmp_path / "tiny"), str(tmp_path / "wan"))
    assert settings["vae"] == (shown if vae == shown else str(tmp_path / "a" / shown))


def test_a_model_with_a_name_is_the_same_soak_in_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one in the package, and one of the hub; as a folder of that name, it is another."""
    monkeypatch.chdir(tmp_path)
    for name in (DEMO, "Wan-AI/Wan2.1-T2V-1.3B"):
        asked = config(tmp_path / "soak", model=name)
        assert asked.settings()["model"] == name
        for earlier in (name, str(tmp_path / "elsewhere" / name)):  # as earlier versions wrote it
            (tmp_path / "soak").mkdir(exist_ok=True)
            content = {"config": asked.settings() | {"model": earlier}}
            (tmp_path / "soak" / MANIFEST_FILE).write_text(json.dumps(content))
            begun = check_manifest(asked)
            assert begun == asked.settings()
        (tmp_path / "elsewhere" / name).mkdir(parents=True)
        (tmp_path / "elsewhere" / name / "config.json").write_text("{}")
        with pytest.raises(ConfigError, match="model was "):
            check_manifest(asked)
    assert config(model=Path("demo")).settings()["model"] == str(tmp_path / "demo")


def test_the_default_prompt_is_one_that_the_default_model_knows() -> None:
    words = json.loads((DEMO_FOLDER / "config.json").read_text())["echo_rt"]["words"]
    assert set(DEMO_PROMPT.split()) <= set(words)
    assert config().prompts == (DEMO_PROMPT,)
    assert {one.name: one.default for one in serve.OPTIONS["video"]}["prompt"] == DEMO_PROMPT


def test_loras_are_known_by_their_whole_path_and_strength(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One at full strength as manifests had it before there were several."""
    monkeypatch.chdir(tmp_path)
    assert config(tmp_path).settings()["lora"] is None
    assert config(tmp_path, lora=((Path("l"), 1.0),)).settings()["lora"] == str(tmp_path / "l")
    several = config(tmp_path, lora=["l", ("m", 0.5)]).settings()["lora"]
    assert several == [str(tmp_path / "l"), f"{tmp_path / 'm'}:0.5"]


def test_another_soak_is_refused_with_what_differs(tmp_path: Path) -> None:
    write_manifest(config(tmp_path))
    other = config(tmp_path, seed=3, limits=Limits(drift=0.5))
    with pytest.raises(ConfigError, match=r"limits\.drift was None and is 0\.5; seed was 0 and is 3"):
        check_manifest(other)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"config": 3}', "\x00\xff"])
def test_a_manifest_that_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST_FILE).write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"soak\.json: expected the manifest of a soak"):
        check_manifest(config(tmp_path))


def test_the_manifest_can_be_read_by_a_person(tmp_path: Path) -> None:
    write_manifest(config(tmp_path))
    there = json.loads((tmp_path / MANIFEST_FILE).read_text())
    assert there["echo_rt"] == __version__ and there["config"]["blocks"] == 10
