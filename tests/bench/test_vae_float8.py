"""The simulation of float8 convolutions: it rounds what it says, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import vae_float8

from echo_rt.verify.bundles import relative_error


def test_rounded_rows_keep_three_bits() -> None:
    rows = torch.randn(4, 5, 96, generator=torch.Generator().manual_seed(2))
    off = (vae_float8.rounded(rows) - rows).abs() / rows.abs().amax(-1, keepdim=True)
    assert 0 < float(off.max()) <= 16.01 / 448  # half a step of the largest binade, 256 to 448
    scaled = vae_float8.rounded(1000 * rows)
    torch.testing.assert_close(scaled, 1000 * vae_float8.rounded(rows))  # each row has its own scale


def test_the_golden_bundle(golden_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["decoded"]: row for row in vae_float8.rows_of(golden_dir / "vae")}
    errors = [rows[f"float32, {count} highest in float8"]["error"] for count in range(1, 5)]
    assert errors == sorted(errors) and errors[0] > 3 * rows["bfloat16"]["error"]
    page = (Path(__file__).parent.parent.parent / "docs" / "decoder.md").read_text(encoding="utf-8")
    said = " ".join(page.split())
    two = rows["float32, 2 highest in float8"]
    assert f"off by {two['error']:.1e}".replace("e-0", "e-") + f", {two['psnr']:.1f} dB" in said
    assert vae_float8.main([str(golden_dir / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_without_float8_it_is_the_decoder(golden_dir: Path) -> None:
    decoding = vae_float8._read(golden_dir / "vae")
    video = vae_float8.decode(decoding, torch.float32, 0)
    assert relative_error(video, decoding.video(torch.float32, [7])) < 1e-5
