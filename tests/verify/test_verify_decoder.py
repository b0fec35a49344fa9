"""What ``verify`` says of a decoder for which nothing is expected: its precisions as pictures, and its groups."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from naive_vae import Bundle, NaiveVae, random_weights, tiny_config
from safetensors.torch import load_file, save_file
from torch import Tensor

from echo_rt.engine.build import fit_decoder
from echo_rt.errors import WeightsError
from echo_rt.model.vae_decoder import VaeDecoder
from echo_rt.ops.backends import load_ops
from echo_rt.ops.schema import Ops
from echo_rt.verify import decoder as verify_decoder
from echo_rt.verify.bundles import BOUNDS, verify_bundle
from echo_rt.verify.decoder import psnr, ssim
from echo_rt.weights.folder import holds_vae
from echo_rt.weights.shapes import vae_shapes


def test_precisions_of_a_bundle(golden_dir: Path) -> None:
    """Of the bundle's own latents, and whatever dtype its errors were computed in."""
    report = verify_bundle(golden_dir / "vae", device="cpu", dtype="float16")
    bundle = Bundle(golden_dir / "vae")
    expected = bundle.expected["video"].permute(0, 2, 3, 1)
    assert [each.dtype for each in report.precisions] == ["bfloat16", "float16"]
    for each in report.precisions:
        dtype = getattr(torch, each.dtype)
        decoder = VaeDecoder(bundle.config, bundle.weights, load_ops("torch"), device="cpu", dtype=dtype)
        video = decoder.decode(bundle.inputs["latents"], decoder.new_state(6, 10, 7)).float()
        # The published float32 video is as good a reference as ours.
        assert each.psnr == pytest.approx(psnr(video, expected), abs=0.5)
        assert each.ssim == pytest.approx(ssim(video, expected), abs=1e-4)
    low, high = (each.psnr for each in report.precisions)
    assert 40 < low < low + 12 < high, "float16 has three bits more, which are 18 dB"


def test_a_bundle_of_another_shape(tmp_path: Path) -> None:
    """Frames of 6x4 pixels have room for no SSIM; that is no failure."""
    config = tiny_config(dim_mult=(1, 2), temporal_downsample=(True,), num_res_blocks=1)
    weights = {name: tensor.bfloat16() for name, tensor in random_weights(vae_shapes(config)).items()}
    latents = torch.randn(4, config.z_dim, 2, 3, generator=torch.Generator().manual_seed(1))
    folder = tmp_path / "narrow"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"kind": "vae", **dataclasses.asdict(config)}))
    save_file(weights, folder / "weights.safetensors")
    save_file({"latents": latents}, folder / "inputs.safetensors")
    save_file(
        {"video": NaiveVae(config, weights).decode(latents).float().contiguous()}, folder / "expected.safetensors"
    )
    report = verify_bundle(folder, device="cpu")
    assert report.passed and [each.ssim for each in report.precisions] == [None, None]
    assert all(each.psnr > 20 for each in report.precisions)


def test_other_kinds_have_no_precisions(golden_dir: Path) -> None:
    assert verify_bundle(golden_dir / "text_encoder", device="cpu").precisions == ()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_is_checked_in_groups(tiny_model: Path, tmp_path: Path, dtype: str) -> None:
    report = verify_bundle(tiny_model, device="cpu", dtype=dtype, backend="torch", dump=tmp_path)
    assert report.passed and (report.name, report.kind) == (tiny_model.name, "model")
    groups = [f"video in groups of {n}" for n in (1, 2, 3, 5)]
    assert [row.name for row in report.rows] == [*groups, "video in mixed groups"]
    assert all(row.bound == 2 * BOUNDS[getattr(torch, dtype)] for row in report.rows)
    assert [each.dtype for each in report.precisions] == ["bfloat16", "float16"]
    assert all(each.psnr > 40 and each.ssim > 0.99 for each in report.precisions)
    kept = load_file(tmp_path / tiny_model.name / "actual.safetensors")
    assert set(kept) == {"video", *(row.name for row in report.rows)}
    assert kept["video"].shape == (41, 48, 64, 3) and kept["video"].std() > 0.05, "a picture, and not one grey"


@pytest.fixture
def few_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_decoder, "_SIZE", (16, 16))


@pytest.mark.usefixtures("few_pixels")
def test_a_model_is_decoded_as_a_stream_is(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the ways that are found for so many latents in a call; and the latents are drawn from a seed."""
    blocks: set[tuple[int, ...]] = set()

    def note(decoder: VaeDecoder, block: tuple[int, int, int], ops: Ops) -> None:
        blocks.add(block)
        fit_decoder(decoder, block, ops)

    monkeypatch.setattr(verify_decoder, "fit_decoder", note)
    reports = [verify_bundle(tiny_model, device="cpu", backend="torch") for _ in range(2)]
    assert blocks == {(latents, 2, 2) for latents in (1, 2, 3, 5, 11)}
    assert reports[0] == reports[1] and reports[0].passed


class Seamed(VaeDecoder):
    """The first frame of every call is a little brighter."""

    def decode(self, latents: Tensor, state: object) -> Tensor:
        video = super().decode(latents, state)  # type: ignore[arg-type]
        video[0] *= 1.001
        return video


class Forgetful(VaeDecoder):
    """Every call begins a stream."""

    def decode(self, latents: Tensor, state: object) -> Tensor:
        state.reset()  # type: ignore[attr-defined]
        return super().decode(latents, state)  # type: ignore[arg-type]


class Blind(VaeDecoder):
    """Nothing but NaN."""

    def decode(self, latents: Tensor, state: object) -> Tensor:
        return super().decode(latents, state) * torch.nan  # type: ignore[arg-type]


@pytest.mark.usefixtures("few_pixels")
@pytest.mark.parametrize("decoder", [Seamed, Forgetful, Blind])
def test_a_group_that_shows_fails(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, decoder: type) -> None:
    monkeypatch.setattr(verify_decoder, "VaeDecoder", decoder)
    report = verify_bundle(tiny_model, device="cpu", backend="torch")
    assert not report.passed and not any(row.ok for row in report.rows)


def test_what_holds_a_model(tiny_model: Path, golden_dir: Path, tmp_path: Path) -> None:
    assert holds_vae(tiny_model) and not holds_vae(golden_dir / "vae") and not holds_vae(tmp_path)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{}")
    assert holds_vae(tmp_path)
    with pytest.raises(WeightsError, match=r"vae/config\.json"):
        verify_bundle(tmp_path, device="cpu", backend="torch")
