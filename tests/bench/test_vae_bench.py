"""``bench/vae.py``: what it counts, what it runs beside ours, and what it says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vae as script
import vae_run
from closeness import relative_error
from echo_rt.bench.timing import DEVICE_CLOCK, Times
from naive_vae import NaiveVae, random_weights, tiny_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from vae import goals, notes, write
from vae_decoders import (
    DIFFUSERS,
    HEAD,
    OURS,
    PUBLISHED,
    Decoder,
    PublishedDecoder,
    Setting,
    decoder_stages,
    diffusers,
    ours,
    published,
)
from vae_run import DeviceBytes, Measured, Memory, VaeRequest, VaeRun, run

from echo_rt.bench.settings import RELEASED
from echo_rt.config import VaeConfig
from echo_rt.errors import BackendError, ConfigError
from echo_rt.model.vae_layers import EnlargingConv
from echo_rt.ops.backends import Backend, load_ops
from echo_rt.weights.shapes import vae_decoder_shapes

CPU = torch.device("cpu")
MAKERS = {OURS: ours, PUBLISHED: published, DIFFUSERS: diffusers}
SMALLEST = {"device": "cpu", "width": 16, "height": 16, "quick": True, "blocks": 1}
ARGUMENTS = ("--device", "cpu", "--width", "16", "--height", "16", "--quick", "--blocks", "1")
CONFIGS = {
    "wan's": {"num_res_blocks": 1},
    "time doubles first": {"dim_mult": (1, 2, 2), "temporal_downsample": (False, True), "num_res_blocks": 1},
    "no temporal level": {"dim_mult": (2, 1), "temporal_downsample": (False,), "num_res_blocks": 2},
}


def setting_of(config: VaeConfig, latents: int = 3) -> Setting:
    weights = random_weights(vae_decoder_shapes(config))
    z = torch.randn(latents, config.z_dim, 3, 2, generator=torch.Generator().manual_seed(2))
    stages = decoder_stages(config, 3, 2, latents)
    return Setting(config, weights, load_ops("torch"), CPU, torch.float32, z, stages)


def counted(call: Any) -> int:
    # Torch does not count the attention that it has for a CPU; as products it does.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


# ---- the counts


def test_work_of_the_released_decoder() -> None:
    config = RELEASED.config
    stages = decoder_stages(RELEASED.vae, *config.latent_shape[1:], config.window.frames_per_block)
    assert [stage.name for stage in stages] == ["104x60", "208x120", "416x240", "832x480", HEAD]
    assert sum(product.is_causal for stage in stages for product in stage.products) == 32
    total = sum(stage.flops for stage in stages)
    assert total == pytest.approx(39.6e12, rel=0.03)  # the number that the goals were set with
    assert sum(stage.flops for stage in stages[2:]) > total * 2 / 3
    assert stages[-1].given == (12, 480, 832, 96)


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_counts_are_what_torch_counts(options: dict[str, Any]) -> None:
    """Of the plainest of the decoders, for a block in mid-stream: whole, and stage by stage."""
    setting = setting_of(tiny_config(**options))
    decoder = published(setting)
    decoder.block()
    assert counted(decoder.block) == sum(stage.flops for stage in setting.stages)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_a_stage_is_that_stage(options: dict[str, Any], name: str) -> None:
    """Its work is what was counted for it; what unpacks the latents comes before all stages."""
    setting = setting_of(tiny_config(**options))
    decoder = MAKERS[name](setting)
    decoder.block()
    for index, stage in enumerate(setting.stages):
        unpacking = sum(product.flops for product in stage.products if product.name == "conv2.weight")
        assert counted(decoder.stage(index)) == stage.flops - unpacking, stage.name
        if decoder.convolutions is not None:
            alone = sum(product.flops for product in stage.convolutions)
            assert counted(decoder.convolutions(index)) == alone, stage.name


# ---- the decoders


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_the_published_structure_decodes(options: dict[str, Any]) -> None:
    config = tiny_config(**options)
    weights = random_weights(vae_decoder_shapes(config))
    latents = torch.randn(6, config.z_dim, 3, 2, generator=torch.Generator().manual_seed(6))
    decoder = PublishedDecoder(config, weights, device=CPU, dtype=torch.float32)
    parts = [decoder.decode(part, is_start=n == 0) for n, part in enumerate(latents.split([1, 3, 2]))]
    expected = NaiveVae(config, weights).decode(latents).transpose(0, 1)[None]
    assert relative_error(torch.cat(parts, 2), expected) < 1e-5


@pytest.mark.parametrize("name", MAKERS)
def test_all_decode_the_same_block(name: str) -> None:
    setting = setting_of(tiny_config(num_res_blocks=1))
    decoder = MAKERS[name](setting)
    with torch.no_grad():
        videos = [decoder.block() for _ in range(2)]
    twice = NaiveVae(setting.config, dict(setting.tensors)).decode(setting.latents.repeat(2, 1, 1, 1))
    expected = twice.permute(0, 2, 3, 1).split([9, 12])
    for video, right in zip(videos, expected, strict=True):
        assert relative_error(video, right) < 1e-5
    # Two frames of each of the convolutions that look back; ours has room to work in besides.
    causal = [p for stage in setting.stages for p in stage.products if p.is_causal]
    remembered = sum(2 * p.shape[1] * p.height * p.width * 4 for p in causal)
    assert decoder.state_bytes() == remembered or (name == OURS and decoder.state_bytes() > remembered)


# ---- the run


def test_a_rehearsal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = script.main(["--out", str(tmp_path), *ARGUMENTS])
    assert code == 0
    content = json.loads((tmp_path / "vae.json").read_text())
    assert content["passed"] and not content["judged"] and "Goals" not in content["tables"]
    assert any("a rehearsal, no results" in note for note in content["notes"])
    assert [row["decoder"] for row in content["tables"]["Decoders"]] == [OURS, PUBLISHED, DIFFUSERS]
    stages = ["2x2", "4x4", "8x8", "16x16", HEAD, "whole"]
    assert [row["stage"] for row in content["tables"]["Stages"]] == 3 * stages
    assert [row["stage"] for row in content["tables"]["Convolutions"]] == stages
    assert sum(row["calls"] for row in content["tables"]["Convolutions"][:-1]) == 32 + 3
    assert {row["tflops"] for row in content["tables"]["Stages"] + content["tables"]["Convolutions"]} == {None}
    assert content["tables"]["Convolutions"][-1]["kinds"] == "32 conv3d, 3 enlarged"
    assert content["tables"]["Decoders"][0]["steady_bytes"] is None
    assert (tmp_path / "vae.md").read_text() in capsys.readouterr().out


def test_the_convolutions_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    original = EnlargingConv.use
    monkeypatch.setattr(EnlargingConv, "use", lambda conv, kind: (used.append(kind.name), original(conv, kind))[1])
    found = run(VaeRequest(**SMALLEST, convolution="three-products,phases", peers=False))
    assert found.passed and set(used) == {"phases"}
    assert "its convolutions: three-products for" in found.measured[0].what and "phases for" in found.measured[0].what
    # By the decoder once for each of three, and again where convolutions are timed alone.
    assert len(used) == 3 + 3
    with pytest.raises(BackendError, match="convolution must be one of"):
        run(VaeRequest(**SMALLEST, convolution="magic", peers=False))


def test_what_differs_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(setting: Setting) -> Decoder:
        right = published(setting)
        return dataclasses.replace(right, block=lambda: 2 * right.block())

    monkeypatch.setattr(vae_run, "_MAKERS", {OURS: ours, PUBLISHED: wrong})
    found = run(VaeRequest(**SMALLEST))
    assert found.passed and found.find(PUBLISHED) is None and found.find(OURS) is not None
    assert found.measured[1].error == pytest.approx(1, abs=0.1) and found.measured[1].stages == []

    def nan(setting: Setting) -> Decoder:
        return dataclasses.replace(wrong(setting), name=OURS, block=lambda: torch.full((12, 16, 16, 3), torch.nan))

    monkeypatch.setattr(vae_run, "_MAKERS", {OURS: nan, PUBLISHED: published})
    found = run(VaeRequest(**SMALLEST))
    assert not found.passed and found.find(PUBLISHED) is not None


def test_ours_that_is_wrong_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(vae_run, "difference", lambda video, expected: 1.0)
    code = script.main(["--out", str(tmp_path), *ARGUMENTS, "--no-peers"])
    assert code == 1
    content = json.loads((tmp_path / "vae.json").read_text())
    assert content["passed"] is False and content["tables"]["Stages"] == []
    assert content["tables"]["Decoders"][0]["what"].startswith("not timed: ")


@pytest.mark.parametrize(
    "error",
    [
        BackendError("diffusers is not installed"),
        TypeError("no such option\nmore"),
        torch.OutOfMemoryError("tried to allocate 9 GiB\nmore"),
    ],
)
def test_others_that_are_not_there(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def absent(setting: Setting) -> Decoder:
        raise error

    monkeypatch.setattr(vae_run, "_MAKERS", {OURS: ours, DIFFUSERS: absent})
    found = run(VaeRequest(**SMALLEST))
    assert found.passed and [each.name for each in found.missing] == [DIFFUSERS]
    assert str(error).splitlines()[0] in found.missing[0].why and "more" not in found.missing[0].why
    assert any(DIFFUSERS in note for note in notes(found))
    monkeypatch.setattr(vae_run, "_MAKERS", {OURS: absent})
    no_memory = isinstance(error, torch.OutOfMemoryError)
    with pytest.raises(BackendError if no_memory else type(error)) as raised:
        run(VaeRequest(**SMALLEST))
    if no_memory:
        assert "too little memory for a video of 16x16: tried to allocate 9 GiB; name a smaller" in str(raised.value)


def test_what_cannot_be_had(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="released sizes need a GPU"):
        run(VaeRequest(device="cpu", size="released"))
    with pytest.raises(ConfigError, match="width must be a positive multiple of 16 pixels, got 24"):
        run(VaeRequest(device="cpu", width=24))
    assert script.main(["--out", str(tmp_path / "none"), "--device", "cpu", "--blocks", "0"]) == 2
    assert "iterations must be a whole number of at least 1" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_convolutions_as_asked() -> None:
    found = run(VaeRequest(**SMALLEST, peers=False, convolution="three-products,phases")).find(OURS)
    assert found is not None and set(found.kinds.values()) == {"three-products", "phases"}
    assert found.kinds["decoder.head.2"] == "three-products"
    with pytest.raises(BackendError, match="convolution must be one of"):
        run(VaeRequest(**SMALLEST, convolution="magic"))


# ---- what it says of a GPU


def gpu_run(ours_ms: float, diffusers_ms: float | None, **changes: Any) -> VaeRun:
    """As if measured at the released sizes."""
    stages = decoder_stages(RELEASED.vae, *RELEASED.config.latent_shape[1:], 3)

    def measured(name: str, ms: float) -> Measured:
        times = Times((1e3 * ms,), DEVICE_CLOCK)
        part = Times((1e3 * ms / 5,), DEVICE_CLOCK)
        alone = [Times((800 * ms / 5,), DEVICE_CLOCK)] * len(stages) if name == OURS else []
        kinds = {p.name.removesuffix(".weight"): "kernel" for stage in stages for p in stage.convolutions}
        return Measured(name, "", 0.0, 1.0, Memory(10, 20, 30), times, [part] * len(stages), alone, kinds)

    found = [measured(OURS, ours_ms)] + ([] if diffusers_ms is None else [measured(DIFFUSERS, diffusers_ms)])
    header = {"gpu": {"name": "G", "driver": "1"}, "host": {}, "date": "d", "commit": "c", "torch": "2"}
    header |= {"cuda": "12", "cudnn": 9, "echo_rt": "0"}
    facts = {
        "request": VaeRequest(),
        "header": header,
        "size": "released",
        "frames": (832, 480),
        "latents": 3,
        "dtype": torch.bfloat16,
        "backend": Backend(load_ops("torch"), "asked for by name"),
        "clock": DEVICE_CLOCK,
        "blocks": 1,
        "stages": stages,
        "measured": found,
        "missing": [],
        "complete": True,
    }
    return VaeRun(**{**facts, **changes})


def test_goals(tmp_path: Path) -> None:
    fast, slow = gpu_run(100, 250), gpu_run(102, 250)
    assert [goal.verdict for goal in goals(fast)] == ["met", "met", "met"]
    assert [goal.verdict for goal in goals(slow)] == ["unmet", "unmet", "unmet"]
    assert [goal.verdict for goal in goals(gpu_run(100, None))] == ["met", "met", "open"]
    assert goals(fast)[1].value == pytest.approx(406.5, abs=0.1)
    text = write(fast, tmp_path)
    assert "## Goals" in text and "832x480" in text
    content = json.loads((tmp_path / "vae.json").read_text())
    whole = content["tables"]["Convolutions"][-1]
    assert whole["tflops"] == pytest.approx(505, abs=1) and content["tables"]["Stages"][5]["tflops"] > 406
    assert whole["share"] == pytest.approx(0.8) and whole["ms"] == pytest.approx(80)
    assert content["tables"]["Stages"][-1]["ours_ratio"] == 2.5
    assert content["tables"]["Decoders"][0]["peak_bytes"] == 30


@pytest.mark.parametrize(
    "changes",
    [{"dtype": torch.float32}, {"size": "tiny"}, {"request": VaeRequest(width=64)}, {"clock": "host"}],
    ids=str,
)
def test_goals_are_of_one_setting(changes: dict[str, Any], tmp_path: Path) -> None:
    found = gpu_run(100, 250, **changes)
    assert not found.judged and "## Goals" not in write(found, tmp_path)


def test_bytes_of_a_gpu() -> None:
    """100 were there before; 50 stay, and at most 80 beside those that were there are held meanwhile."""
    held = SimpleNamespace(now=100, most=100)

    def reset(device: torch.device) -> None:
        held.most = held.now

    cuda = SimpleNamespace(
        memory_allocated=lambda device: held.now,
        max_memory_allocated=lambda device: held.most,
        reset_peak_memory_stats=reset,
        synchronize=lambda device: None,
    )
    taken = DeviceBytes(torch.device("cuda", 0), cuda)
    held.now, held.most = 150, 900  # the most of what came before the stream had begun counts for nothing
    assert taken.steady() == 50
    held.now, held.most = 140, 180
    assert taken.peak() == 80
    on_cpu = DeviceBytes(CPU)
    assert on_cpu.steady() is None and on_cpu.peak() is None
