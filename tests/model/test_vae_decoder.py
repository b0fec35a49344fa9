"""The streaming VAE decoder against the golden bundle, against a plain one without state, and against itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import relative_error
from naive_vae import Bundle, NaiveVae, random_weights, tiny_config
from torch import Tensor
from torch.nn import functional

from echo_rt.config import VaeConfig
from echo_rt.errors import ConfigError
from echo_rt.model.vae_decoder import VaeDecoder, VaeDecoderState
from echo_rt.model.vae_layers import rms_norm
from echo_rt.ops.backends import load_ops
from echo_rt.weights.shapes import vae_decoder_shapes

# Two summation orders of the same float32 convolutions.
FLOAT32_ROUNDING = 1e-5

OTHER_CONFIGS = {
    "one temporal level": {"dim_mult": (1, 2), "temporal_downsample": (True,), "num_res_blocks": 1},
    "time doubles first": {"dim_mult": (1, 2, 2), "temporal_downsample": (False, True), "num_res_blocks": 1},
    "time doubles last": {"dim_mult": (1, 1, 2), "temporal_downsample": (True, False), "num_res_blocks": 2},
    "no temporal level": {"dim_mult": (2, 1), "temporal_downsample": (False,), "num_res_blocks": 1},
    "one resolution": {"dim_mult": (2,), "temporal_downsample": (), "num_res_blocks": 1},
    "time times eight": {"dim_mult": (1, 1, 1, 1), "temporal_downsample": (True, True, True), "num_res_blocks": 1},
}


def random_latents(config: VaeConfig, frames: int, height: int = 3, width: int = 2) -> Tensor:
    return torch.randn(frames, config.z_dim, height, width, generator=torch.Generator().manual_seed(6))


def make_decoder(
    config: VaeConfig, weights: dict[str, Tensor], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> VaeDecoder:
    return VaeDecoder(config, weights, load_ops("torch"), device=device, dtype=dtype)


def decode_in(groups: Sequence[int], latents: Tensor, decoder: VaeDecoder, state: VaeDecoderState) -> Tensor:
    assert sum(groups) == len(latents)
    return torch.cat([decoder.decode(part, state) for part in latents.split(list(groups))])


class Golden(Bundle):
    """The golden bundle, its decoder in float32, and that decoder's video of all latents at once, ``[F, H, W, 3]``."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.latents = self.inputs["latents"]
        self.video = self.expected["video"].permute(0, 2, 3, 1)
        self.decoder = make_decoder(self.config, self.weights)
        self.at_once = self.decoder.decode(self.latents, self.state(len(self.latents)))

    def state(self, latents: int, frames_at_full: int | None = None) -> VaeDecoderState:
        return self.decoder.new_state(*self.latents.shape[2:], latents, frames_at_full=frames_at_full)


@pytest.fixture(scope="module")
def golden(golden_dir: Path) -> Golden:
    return Golden(golden_dir / "vae")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1.5e-2), (torch.float16, 2.5e-3)], ids=str
)
def test_golden_bundle(
    golden: Golden, dtype: torch.dtype, bound: float, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    decoder = make_decoder(golden.config, golden.weights, dtype, device)
    state = decoder.new_state(*golden.latents.shape[2:], 3)
    video = decoder.decode(golden.latents, state)
    assert video.dtype == dtype and video.device.type == device and video.is_contiguous()
    assert relative_error(video.cpu(), golden.video) < bound


def test_naive_decoder_is_the_golden_one(golden: Golden) -> None:
    video = NaiveVae(golden.config, golden.weights).decode(golden.latents[:3]).permute(0, 2, 3, 1)
    assert relative_error(video, golden.video[: len(video)]) < FLOAT32_ROUNDING


@pytest.mark.parametrize("frames_at_full", [1, 4, 5, 28])
@pytest.mark.parametrize(
    ("groups", "latents"),
    [((1,) * 7, 1), ((2, 2, 2, 1), 2), ((3, 3, 1), 3), ((5, 2), 5), ((1, 3, 2, 1), 3), ((2, 5), 3), ((7,), 7)],
    ids=str,
)
def test_grouping_does_not_show(golden: Golden, groups: tuple[int, ...], latents: int, frames_at_full: int) -> None:
    state = golden.state(latents, frames_at_full)
    video = decode_in(groups, golden.latents, golden.decoder, state)
    assert state.latents_seen == 7
    assert relative_error(video, golden.at_once) < FLOAT32_ROUNDING
    assert relative_error(video, golden.video) < FLOAT32_ROUNDING


def test_memory_does_not_grow_with_the_latents_of_a_call(golden: Golden) -> None:
    one, block, many = (golden.decoder.new_state(12, 20, latents).nbytes for latents in (1, 3, 300))
    assert block < one == many  # three latents are cut into smaller slices than those are
    assert golden.decoder.new_state(12, 20, 3, frames_at_full=12).nbytes > block


@pytest.mark.parametrize("options", OTHER_CONFIGS.values(), ids=OTHER_CONFIGS.keys())
def test_other_configurations(options: dict[str, object]) -> None:
    config = tiny_config(**options)
    weights, latents = random_weights(vae_decoder_shapes(config)), random_latents(config, 6)
    expected = NaiveVae(config, weights).decode(latents).permute(0, 2, 3, 1)
    assert len(expected) == config.video_frames(len(latents))
    decoder = make_decoder(config, weights)
    for groups, most, full in (((6,), 6, 48), ((6,), 6, 1), ((1, 1, 2, 2), 2, None), ((2, 3, 1), 2, 2)):
        video = decode_in(groups, latents, decoder, decoder.new_state(3, 2, most, frames_at_full=full))
        assert relative_error(video, expected) < FLOAT32_ROUNDING, (groups, most, full)


def test_frames_of_each_call() -> None:
    config = tiny_config(dim_mult=(1, 1, 1), temporal_downsample=(True, True), num_res_blocks=1)
    decoder = make_decoder(config, random_weights(vae_decoder_shapes(config)))
    state = decoder.new_state(3, 2, 3)
    counts = [len(decoder.decode(random_latents(config, n), state)) for n in (2, 1, 3, 4)]
    assert counts == [5, 4, 12, 16]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_latents_of_any_dtype(golden: Golden, dtype: torch.dtype) -> None:
    latents = golden.latents[:2].to(dtype)
    video = golden.decoder.decode(latents, golden.state(2))
    assert video.dtype == torch.float32
    assert torch.equal(video, golden.decoder.decode(latents.float(), golden.state(2)))


def test_latents_are_not_rounded_before_they_are_unpacked(golden: Golden) -> None:
    decoder = make_decoder(golden.config, golden.weights, torch.bfloat16)
    latents = golden.latents[:2] + 1e-3 * golden.latents[2:4]  # not such as bfloat16 has
    video, rounded = (
        decoder.decode(given, decoder.new_state(*latents.shape[2:], 2)) for given in (latents, latents.bfloat16())
    )
    assert not torch.equal(video, rounded)


def test_no_gradients_are_kept(golden: Golden) -> None:
    state = golden.state(2)
    video = golden.decoder.decode(golden.latents[:2].clone().requires_grad_(), state)
    assert not video.requires_grad and not any(tensor.requires_grad for tensor in state.buffers().values())


def test_a_long_stream_has_no_seam() -> None:
    config = tiny_config(dim_mult=(1, 1), temporal_downsample=(True,), num_res_blocks=1)
    decoder = make_decoder(config, random_weights(vae_decoder_shapes(config)))
    latents = random_latents(config, 1000, 2, 2)
    groups = (1, 2) + (3,) * 200 + (5, 1, 2) * 49 + (1, 1, 1, 1, 1)
    streamed = decode_in(groups, latents, decoder, decoder.new_state(2, 2, 3))
    at_once = decoder.decode(latents, decoder.new_state(2, 2, 1000, frames_at_full=2000))
    errors = [relative_error(frame, expected) for frame, expected in zip(streamed, at_once, strict=True)]
    assert len(errors) == 1999
    assert max(errors) < FLOAT32_ROUNDING


def test_a_later_latent_leaves_earlier_frames_alone(golden: Golden) -> None:
    changed = golden.latents.clone()
    changed[3:] += 1
    video = golden.decoder.decode(changed, golden.state(7))
    unchanged = golden.config.video_frames(3)
    assert torch.equal(video[:unchanged], golden.at_once[:unchanged])
    assert relative_error(video[unchanged], golden.at_once[unchanged]) > 1e-3


@pytest.mark.parametrize(("seen", "dtype"), [(1, torch.float32), (2, torch.bfloat16), (4, torch.float32)], ids=str)
def test_snapshot_continues_bit_for_bit(golden: Golden, seen: int, dtype: torch.dtype) -> None:
    decoder = make_decoder(golden.config, golden.weights, dtype)
    state, resumed = (decoder.new_state(*golden.latents.shape[2:], 2) for _ in range(2))
    decoder.decode(golden.latents[:seen], state)
    saved = {name: tensor.clone() for name, tensor in state.tensors().items()}
    expected = decoder.decode(golden.latents[seen:6], state)

    # The other state is left full of another stream's frames: whatever the snapshot does not cover would show.
    decoder.decode(golden.latents[3:], resumed)
    for name, tensor in resumed.tensors().items():
        tensor.copy_(saved[name])
    resumed.latents_seen = seen
    assert torch.equal(decoder.decode(golden.latents[seen:6], resumed), expected)


def test_reset_starts_afresh(golden: Golden) -> None:
    state = golden.state(3)
    first = golden.decoder.decode(golden.latents[:3], state)
    state.reset()
    assert state.latents_seen == 0
    assert torch.equal(golden.decoder.decode(golden.latents[:3], state), first)


def test_state_is_the_two_past_frames_of_each_window(golden: Golden) -> None:
    state = golden.state(3)
    causal = {
        name.removesuffix(".weight")
        for name, shape in vae_decoder_shapes(golden.config).items()
        if name.endswith(".weight") and len(shape) == 5 and shape[2] == 3
    }
    assert set(state.tensors()) == causal
    for tensor in state.tensors().values():
        assert tensor.shape[0] == 2 and tensor.is_contiguous()
    # The last convolution works at full resolution, on four frames at once.
    assert state.tensors()["decoder.head.2"].shape == (2, 48, 80, 8)
    # The resolution below takes all the frames of three latents in two slices, the full one each of them in two more.
    assert state.windows.room.numel() == (2 + 3) * 48 * 80 * 8


def test_addresses_never_change(golden: Golden) -> None:
    state = golden.state(2)

    def addresses() -> dict[str, int]:
        return {name: tensor.data_ptr() for name, tensor in state.buffers().items()}

    before = addresses()
    for part in golden.latents.split([1, 3, 2, 1]):
        golden.decoder.decode(part, state)
        assert addresses() == before
    state.reset()
    assert addresses() == before


def test_state_made_in_inference_mode_decodes_outside_it(golden: Golden) -> None:
    with torch.inference_mode():
        state = golden.state(2)
    video = golden.decoder.decode(golden.latents[:2], state)
    assert relative_error(video, golden.video[: len(video)]) < FLOAT32_ROUNDING


def test_streams_share_nothing(golden: Golden) -> None:
    one, other = golden.state(1), golden.state(1)
    video = []
    for latent in golden.latents[:4].split(1):
        video.append(golden.decoder.decode(latent, one))
        golden.decoder.decode(-latent, other)
    assert relative_error(torch.cat(video), golden.video[: golden.config.video_frames(4)]) < FLOAT32_ROUNDING


@pytest.mark.parametrize(
    "shape", [(1, 15, 6, 10), (1, 16, 5, 10), (1, 16, 6, 11), (0, 16, 6, 10), (16, 6, 10)], ids=str
)
def test_latents_of_another_size_are_refused(golden: Golden, shape: tuple[int, ...]) -> None:
    state = golden.state(3)
    with pytest.raises(ConfigError) as error:
        golden.decoder.decode(torch.zeros(shape), state)
    assert "16, 6, 10" in str(error.value) and str(list(shape)) in str(error.value)
    assert state.latents_seen == 0


def test_what_is_added_and_scaled_by_keeps_its_precision() -> None:
    """Biases and gammas are a few numbers, and whatever adds them or scales by them does so in float32."""
    passed: dict[str, list[Tensor]] = {"bias": [], "gamma": []}
    torchs = load_ops("torch")

    class Watched:
        name = torchs.name

        def rms_silu_window(self, x: Tensor, bias: Tensor | None, residual: Tensor | None, *rest: Any) -> None:
            passed["bias"] += [] if bias is None else [bias]
            passed["gamma"].append(rest[0])
            torchs.rms_silu_window(x, bias, residual, *rest)

    config = tiny_config(dim_mult=(1, 1), temporal_downsample=(True,), num_res_blocks=1)
    weights = random_weights(vae_decoder_shapes(config))
    decoder = VaeDecoder(config, weights, Watched(), device="cpu", dtype=torch.bfloat16)  # type: ignore[arg-type]
    decoder.decode(random_latents(config, 2), decoder.new_state(3, 2, 2))
    known = {tuple(tensor.flatten().tolist()) for tensor in weights.values()}
    for tensors in passed.values():
        assert len(tensors) > 10
        assert all(tuple(tensor.tolist()) in known for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_norm_before_the_attention(dtype: torch.dtype) -> None:
    x = (1e-3 + torch.rand(5, 384, generator=torch.Generator().manual_seed(3))).to(dtype)
    x[0], gamma = 0, torch.linspace(0.5, 1.5, 384)
    expected = functional.normalize(x.double(), dim=-1) * 384**0.5 * gamma.double()
    normed = rms_norm(x, gamma)
    assert not normed[0].any(), "nothing has no direction"
    assert relative_error(normed, expected.to(dtype)) < 1e-4  # of the few that fall to the other side of a rounding
