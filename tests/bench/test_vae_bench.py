"""``bench/vae.py``: what it counts, what it runs beside ours, and what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import vae as script
from closeness import relative_error
from naive_vae import NaiveVae, random_weights, tiny_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from vae import DIFFUSERS, OURS, TORCH, Decoder, Setting, flops

from echo_rt.bench.settings import RELEASED
from echo_rt.config import VaeConfig
from echo_rt.errors import BackendError
from echo_rt.ops.backends import load_ops
from echo_rt.weights.shapes import vae_decoder_shapes

ARGUMENTS = ("--device", "cpu", "--width", "16", "--height", "16", "--quick", "--blocks", "1")
CONFIGS = {
    "wan's": {"num_res_blocks": 1},
    "time doubles first": {"dim_mult": (1, 2, 2), "temporal_downsample": (False, True), "num_res_blocks": 1},
    "no temporal level": {"dim_mult": (2, 1), "temporal_downsample": (False,), "num_res_blocks": 2},
}
MAKERS = {
    OURS: lambda setting: setting.ours(load_ops("torch")),
    TORCH: lambda setting: setting.ours(load_ops("torch"), fit=False),
    DIFFUSERS: Setting.diffusers,
}


def setting_of(config: VaeConfig, latents: int = 3) -> Setting:
    weights = random_weights(vae_decoder_shapes(config))
    z = torch.randn(latents, config.z_dim, 3, 2, generator=torch.Generator().manual_seed(2))
    return Setting(config, weights, z, torch.float32)  # type: ignore[arg-type]


def run(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    code = script.main(["--out", str(tmp_path / "new"), *ARGUMENTS, *arguments])
    return code, json.loads((tmp_path / "new" / "vae.json").read_text())


def test_work_of_the_released_decoder() -> None:
    config = RELEASED.config
    # The number that the goals were set with.
    total = flops(RELEASED.vae, *config.latent_shape[1:], config.window.frames_per_block)
    assert total == pytest.approx(39.6e12, rel=0.03)


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_counts_are_what_torch_counts(options: dict[str, Any]) -> None:
    """For a block in mid-stream."""
    setting = setting_of(tiny_config(**options))
    decoder = setting.ours(load_ops("torch"), fit=False)
    decoder.block()
    # Torch does not count the attention that it has for a CPU; as products it does.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        decoder.block()
    assert counter.get_total_flops() == flops(setting.config, 3, 2, 3)


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
    assert relative_error(setting.expected(), expected[1]) < 1e-5
    assert decoder.state_bytes() > 0


def test_a_rehearsal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, content = run(tmp_path, "--backend", "emulated")
    assert code == 0 and content["passed"] and content["complete"]
    rows = content["tables"]["Decoders"]
    assert [row["decoder"] for row in rows] == [OURS, TORCH, DIFFUSERS]
    for row in rows:
        assert 0 < row["ms"] <= row["p99_ms"] and 0 < row["error"] <= row["bound"] and row["state_mb"] > 0
        assert row["tflops"] is row["peak_mb"] is None, "of a rehearsal"
        assert row["ours_ratio"] == pytest.approx(row["ms"] / rows[0]["ms"])
    assert (tmp_path / "new" / "vae.md").read_text() in capsys.readouterr().out


def test_the_convolutions_can_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, content = run(tmp_path, "--convolution", "three-products,phases", "--no-peers")
    what = content["tables"]["Decoders"][0]["what"]
    assert code == 0 and "three-products for" in what and "phases for" in what
    assert script.main(["--out", str(tmp_path / "none"), *ARGUMENTS, "--convolution", "magic"]) == 2
    assert "convolution must be one of" in capsys.readouterr().err


def test_what_differs_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ours = Setting.ours

    def wrong(decoder: Decoder, factor: float) -> Decoder:
        block = decoder.block
        return decoder._replace(block=lambda: factor * block())

    diffusers = Setting.diffusers
    monkeypatch.setattr(Setting, "diffusers", lambda setting: wrong(diffusers(setting), 2.0))
    code, content = run(tmp_path)
    last = content["tables"]["Decoders"][-1]
    assert code == 0 and last["ms"] is None and last["what"].startswith("not timed: it computes something else")
    assert last["error"] == pytest.approx(1, abs=0.1)

    def nan(setting: Setting, *given: Any, **facts: Any) -> Decoder:
        """Wrong but for the reference."""
        decoder = ours(setting, *given, **facts)
        return decoder if setting.dtype is torch.float32 else wrong(decoder, float("nan"))

    monkeypatch.setattr(Setting, "ours", nan)
    code, content = run(tmp_path, "--no-peers")
    assert code == 1 and content["passed"] is False and content["tables"]["Decoders"][0]["ms"] is None


@pytest.mark.parametrize("error", [BackendError("diffusers is not installed"), TypeError("no such option\nmore")])
def test_others_that_are_not_there(monkeypatch: pytest.MonkeyPatch, error: Exception, tmp_path: Path) -> None:
    def absent(setting: Setting) -> Decoder:
        raise error

    monkeypatch.setattr(Setting, "diffusers", absent)
    code, content = run(tmp_path)
    assert code == 0 and content["notes"][-1] == f"Not measured: {DIFFUSERS}: {str(error).splitlines()[0]}."


def test_memory_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(setting: Setting, *given: Any, **facts: Any) -> Decoder:
        raise torch.OutOfMemoryError("tried to allocate 9 GiB\nmore")

    monkeypatch.setattr(Setting, "ours", full)
    assert script.main(["--out", str(tmp_path), *ARGUMENTS]) == 2
    words = "too little memory for a video of 16x16: tried to allocate 9 GiB; name a smaller"
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "released"], "released sizes need a GPU"),
        (["--width", "24"], "width must be a positive multiple of 16 pixels, got 24"),
        (["--blocks", "0"], "iterations must be a whole number of at least 1"),
    ],
)
def test_what_cannot_be_had(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert script.main(["--out", str(tmp_path / "none"), "--device", "cpu", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
