"""A decoder that takes the high resolutions in bands of rows makes the same video in less memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from closeness import relative_error
from naive_vae import Bundle, random_weights, tiny_config
from torch import Tensor

from echo_rt.bench.settings import RELEASED
from echo_rt.config import VaeConfig
from echo_rt.errors import ConfigError
from echo_rt.model.vae_decoder import VaeDecoder
from echo_rt.ops.backends import load_ops
from echo_rt.weights.shapes import vae_decoder_shapes

# Two summation orders of the same float32 convolutions.
FLOAT32_ROUNDING = 1e-5


def make_decoder(
    config: VaeConfig, weights: dict[str, Tensor], tiles: int, dtype: torch.dtype = torch.float32
) -> VaeDecoder:
    return VaeDecoder(config, weights, load_ops("torch"), device="cpu", dtype=dtype, tiles=tiles)


def decode(decoder: VaeDecoder, latents: Tensor, groups: tuple[int, ...], most: int) -> Tensor:
    state = decoder.new_state(*latents.shape[2:], most)
    return torch.cat([decoder.decode(part, state) for part in latents.split(list(groups))])


@pytest.fixture(scope="module")
def golden(golden_dir: Path) -> Bundle:
    return Bundle(golden_dir / "vae")


@pytest.mark.parametrize("groups", [(7,), (1, 3, 3), (2, 1, 1, 3)], ids=str)
def test_golden_bundle_in_tiles(golden: Bundle, groups: tuple[int, ...]) -> None:
    video = decode(make_decoder(golden.config, golden.weights, 2), golden.inputs["latents"], groups, 3)
    expected = golden.expected["video"].permute(0, 2, 3, 1)
    assert relative_error(video, expected) < FLOAT32_ROUNDING
    # The two rows at the border are as good as any.
    middle = expected.shape[1] // 2
    border = slice(middle - 1, middle + 1)
    assert relative_error(video[:, border], expected[:, border]) < FLOAT32_ROUNDING


@pytest.mark.parametrize(
    "options",
    [
        {"dim_mult": (1, 1, 2), "temporal_downsample": (True, False), "num_res_blocks": 1},
        {"dim_mult": (1, 2, 2), "temporal_downsample": (False, True), "num_res_blocks": 1},
        {"dim_mult": (1, 2), "temporal_downsample": (True,), "num_res_blocks": 1},
        {"dim_mult": (1, 1, 1, 1), "temporal_downsample": (True, True, True), "num_res_blocks": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [14, 17])
def test_any_number_of_tiles(options: dict[str, object], rows: int) -> None:
    config = tiny_config(**options)
    weights = random_weights(vae_decoder_shapes(config))
    latents = torch.randn(5, config.z_dim, rows, 3, generator=torch.Generator().manual_seed(6))
    expected = decode(make_decoder(config, weights, 1), latents, (5,), 5)
    for tiles in (2, 3):
        for groups in ((5,), (1, 2, 2)):
            video = decode(make_decoder(config, weights, tiles), latents, groups, 2)
            assert relative_error(video, expected) < FLOAT32_ROUNDING, (tiles, groups)
            errors = [
                relative_error(row, other) for row, other in zip(video.unbind(1), expected.unbind(1), strict=True)
            ]
            assert max(errors) < 10 * FLOAT32_ROUNDING


def test_tiles_take_less_memory(golden: Bundle) -> None:
    whole, tiled = (make_decoder(golden.config, golden.weights, tiles).new_state(60, 104, 3) for tiles in (1, 4))
    remembered = sum(tensor.nbytes for tensor in whole.tensors().values())
    assert sum(tensor.nbytes for tensor in tiled.tensors().values()) == remembered
    assert tiled.nbytes - remembered < (whole.nbytes - remembered) / 2


@pytest.mark.parametrize(
    ("downsample", "frames"), [((False, True, True), 2), ((True, True, False), 4), ((False, False, True), 1)], ids=str
)
def test_a_band_is_of_one_frame_and_what_is_made_of_it(downsample: tuple[bool, ...], frames: int) -> None:
    """Where time doubles within the two highest resolutions, one frame that enters them becomes several."""
    config = tiny_config(dim_mult=(1, 1, 1, 1), temporal_downsample=downsample, num_res_blocks=1)
    decoder = make_decoder(config, random_weights(vae_decoder_shapes(config)), 2)
    for latents in (1, 3):
        head = decoder.convolution_shapes(14, 3, latents)["decoder.head.2"]
        assert head.out_size[0] == frames


PAGE = Path(__file__).parent.parent.parent / "docs" / "decoder.md"


def test_counts_of_the_page() -> None:
    rows = [
        line.strip("|").split("|")
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line[:2] == "| " and line[2].isdigit()
    ]
    weights = {name: torch.empty(shape, device="meta") for name, shape in vae_decoder_shapes(RELEASED.vae).items()}
    for tiles, remembered, window, kept, together, twice in rows:
        decoder = VaeDecoder(
            RELEASED.vae, weights, load_ops("torch"), device="meta", dtype=torch.bfloat16, tiles=int(tiles)
        )
        state = decoder.new_state(*RELEASED.config.latent_shape[1:], RELEASED.config.window.frames_per_block)
        counted = [
            sum(tensor.nbytes for tensor in state.tensors().values()),
            state.windows.room.nbytes,
            sum(tensor.nbytes for tensor in state.windows.kept.values()),
            state.nbytes,
        ]
        for cell, count in zip((remembered, window, kept, together), counted, strict=True):
            assert float(cell.split()[0] if cell.strip() else 0) == pytest.approx(count / 2**30, abs=0.0051)
        if state.plan.bands:
            levels = zip(*state.plan.bands, strict=True)
            seen = [
                sum(rows.last - rows.first for rows in level) / sum(rows.end - rows.begin for rows in level)
                for level in levels
            ]
            assert [float(cell) for cell in twice.replace("%", "").split(",")] == pytest.approx(
                [100 * (part - 1) for part in seen[:2]], abs=0.51
            )
    assert len(rows) == 3


def test_a_snapshot_in_mid_stream_goes_on_with_other_tiles(golden: Bundle) -> None:
    latents = golden.inputs["latents"]
    one, two = (make_decoder(golden.config, golden.weights, tiles) for tiles in (1, 2))
    state = two.new_state(*latents.shape[2:], 3)
    first = two.decode(latents[:3], state)
    other = one.new_state(*latents.shape[2:], 3)
    for name, tensor in other.tensors().items():
        tensor.copy_(state.tensors()[name])
    other.latents_seen = state.latents_seen
    video = torch.cat((first, one.decode(latents[3:], other)))
    assert relative_error(video, golden.expected["video"].permute(0, 2, 3, 1)) < FLOAT32_ROUNDING


@pytest.mark.parametrize("tiles", [1, 2])
def test_only_what_a_snapshot_keeps_outlives_a_call(golden: Bundle, tiles: int) -> None:
    latents = golden.inputs["latents"]
    decoder = make_decoder(golden.config, golden.weights, tiles)
    expected = decode(decoder, latents, (1, 3, 3), 3)
    state = decoder.new_state(*latents.shape[2:], 3)
    kept = {tensor.data_ptr() for tensor in state.tensors().values()}
    scratch = [tensor for tensor in state.buffers().values() if tensor.data_ptr() not in kept]
    assert len(scratch) > (tiles - 1) * 10
    parts = []
    for part in latents.split([1, 3, 3]):
        for tensor in scratch:
            tensor.fill_(torch.nan)
        parts.append(decoder.decode(part, state))
    assert torch.equal(torch.cat(parts), expected)


@pytest.mark.parametrize("tiles", [1, 2])
def test_a_nan_shows_and_is_gone_with_what_was_remembered(golden: Bundle, tiles: int) -> None:
    latents = golden.inputs["latents"]
    decoder = make_decoder(golden.config, golden.weights, tiles)
    state = decoder.new_state(*latents.shape[2:], 3)
    expected = decoder.decode(latents[:3], state)
    saved = {name: tensor.clone() for name, tensor in state.tensors().items()}
    following = decoder.decode(latents[3:6], state)
    sick = latents[3:6].clone()
    sick[1, 0, -1, -1] = torch.nan

    for name, tensor in state.tensors().items():
        tensor.copy_(saved[name])
    video = decoder.decode(sick, state)
    assert not video[:4].isnan().any() and video[4:].isnan().any((1, 2, 3)).all()
    assert any(tensor.isnan().any() for tensor in state.tensors().values())
    for name, tensor in state.tensors().items():
        tensor.copy_(saved[name])
    assert torch.equal(decoder.decode(latents[3:6], state), following)

    decoder.decode(sick, state)
    state.reset()
    assert torch.equal(decoder.decode(latents[:3], state), expected)


def test_tiles_that_there_are_no_rows_for(golden: Bundle) -> None:
    with pytest.raises(ConfigError, match="expected 1 to 2 for latents 6 rows high"):
        make_decoder(golden.config, golden.weights, 3).new_state(6, 10, 1)


def test_a_vae_of_one_resolution_has_no_tiles() -> None:
    config = tiny_config(dim_mult=(2,), temporal_downsample=(), num_res_blocks=1)
    decoder = make_decoder(config, random_weights(vae_decoder_shapes(config)), 2)
    with pytest.raises(ConfigError, match="expected 1 for a VAE of one resolution, got 2"):
        decoder.new_state(6, 10, 1)
