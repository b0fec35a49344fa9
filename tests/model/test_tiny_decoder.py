"""The streaming tiny decoder against a plain one without state, and against itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from closeness import relative_error
from naive_tiny_vae import RELEASED_GROWTH, RELEASED_WIDTHS, naive_decode, random_decoder
from tape import Tape
from torch import Tensor

from echo_rt.config import VaeConfig
from echo_rt.errors import ConfigError
from echo_rt.model.decoder_protocol import DecoderState
from echo_rt.model.tiny_decoder import TinyDecoder
from echo_rt.weights.tiny_vae import TinyVaeConfig

# Two summation orders of the same float32 convolutions.
FLOAT32_ROUNDING = 1e-5

SMALL = TinyVaeConfig(z_dim=3, widths=(8, 6, 4, 5))
LIKE = VaeConfig(base_dim=4, z_dim=3, latents_mean=(0.1, -0.2, 0.3), latents_std=(1.5, 0.5, 2.0))
WEIGHTS = random_decoder(SMALL.z_dim, SMALL.widths)


def random_latents(frames: int, height: int = 3, width: int = 2, z_dim: int = 3) -> Tensor:
    # Some of them beyond the limit that latents are bent towards.
    return 2 * torch.randn(frames, z_dim, height, width, generator=torch.Generator().manual_seed(6))


def make(
    config: TinyVaeConfig = SMALL, weights: dict[str, Tensor] = WEIGHTS, dtype: torch.dtype = torch.float32, **at: Any
) -> TinyDecoder:
    return TinyDecoder(config, weights, LIKE, **({"device": "cpu", "dtype": dtype} | at))


def expected_video(weights: dict[str, Tensor], latents: Tensor) -> Tensor:
    """``[F, H, W, 3]`` in [-1, 1], as the runtime has it."""
    return 2 * naive_decode(weights, latents).permute(0, 2, 3, 1) - 1


def decode_in(groups: Sequence[int], latents: Tensor, decoder: TinyDecoder, state: DecoderState) -> Tensor:
    assert sum(groups) == len(latents)
    return torch.cat([decoder.decode(part, state) for part in latents.split(list(groups))])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, FLOAT32_ROUNDING), (torch.bfloat16, 1.5e-2), (torch.float16, 2.5e-3)], ids=str
)
def test_it_is_the_published_decoder(
    dtype: torch.dtype, bound: float, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    latents = random_latents(5)
    decoder = make(dtype=dtype, device=device)
    video = decoder.decode(latents, decoder.new_state(3, 2, 5))
    assert video.shape == (17, 24, 16, 3) and video.is_contiguous()
    assert video.dtype == dtype and video.device.type == device
    assert relative_error(video.cpu(), expected_video(WEIGHTS, latents)) < bound


def test_the_released_widths() -> None:
    config = TinyVaeConfig()
    assert (config.widths, config.growth, config.z_dim) == (RELEASED_WIDTHS, RELEASED_GROWTH, 16)
    weights, latents = random_decoder(16, RELEASED_WIDTHS), random_latents(2, 2, 3, 16)
    decoder = make(config, weights)
    video = decoder.decode(latents, decoder.new_state(2, 3, 2))
    assert relative_error(video, expected_video(weights, latents)) < FLOAT32_ROUNDING


@pytest.mark.parametrize("growth", [(1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 2, 2)], ids=str)
def test_other_growths(growth: tuple[int, ...]) -> None:
    """Time may double at any level; what is left out at the start follows."""
    weights, latents = random_decoder(3, SMALL.widths, growth), random_latents(3)
    decoder = make(TinyVaeConfig(z_dim=3, widths=SMALL.widths, growth=growth), weights)
    expected = expected_video(weights, latents)
    for groups in ((3,), (1, 2)):
        video = decode_in(groups, latents, decoder, decoder.new_state(3, 2, 3))
        assert video.shape == expected.shape
        assert relative_error(video, expected) < FLOAT32_ROUNDING


@pytest.mark.parametrize(
    ("groups", "most"),
    [((1,) * 11, 1), ((2, 2, 2, 2, 2, 1), 2), ((3, 3, 3, 2), 3), ((5, 5, 1), 5), ((1, 3, 2, 5), 5), ((2, 9), 3)],
    ids=str,
)
def test_grouping_does_not_show(groups: tuple[int, ...], most: int) -> None:
    latents, decoder = random_latents(11), make()
    state = decoder.new_state(3, 2, most)
    video = decode_in(groups, latents, decoder, state)
    assert state.latents_seen == 11
    at_once = decoder.decode(latents, decoder.new_state(3, 2, 11))
    for made, at, naive in zip(video, at_once, expected_video(WEIGHTS, latents), strict=True):
        assert relative_error(made, at) < FLOAT32_ROUNDING
        assert relative_error(made, naive) < FLOAT32_ROUNDING


def test_a_stream_has_the_frames_of_the_whole_vae() -> None:
    decoder = make()
    state = decoder.new_state(3, 2, 3)
    counts = [len(decoder.decode(random_latents(n), state)) for n in (1, 2, 1, 3, 4)]
    assert counts == [1, 8, 4, 12, 16]
    assert sum(counts) == LIKE.video_frames(11)


def test_every_past_frame_matters() -> None:
    """What each block remembers reaches the next frame; nothing else of the past does."""
    latents, decoder = random_latents(4), make()
    state = decoder.new_state(3, 2, 4)
    decoder.decode(latents[:3], state)
    saved = {name: tensor.clone() for name, tensor in state.tensors().items()}
    expected = decoder.decode(latents[3:], state)
    assert set(saved) == {f"decoder.{index}" for index in (3, 4, 5, 9, 10, 11, 15, 16, 17)}
    for spoiled in saved:
        other = decoder.new_state(3, 2, 1)
        for name, tensor in other.tensors().items():
            tensor.copy_(saved[name])
        other.tensors()[spoiled].add_(1)
        other.latents_seen = 3
        assert not torch.equal(decoder.decode(latents[3:], other)[0], expected[0]), spoiled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seen", [1, 2, 4])
def test_snapshot_continues_bit_for_bit(seen: int, dtype: torch.dtype) -> None:
    latents, decoder = random_latents(7), make(dtype=dtype)
    state, resumed = (decoder.new_state(3, 2, 2) for _ in range(2))
    decoder.decode(latents[:seen], state)
    saved = {name: tensor.clone() for name, tensor in state.tensors().items()}
    expected = decoder.decode(latents[seen:], state)

    # The other state is left full of another stream's frames: whatever the snapshot does not cover would show.
    decoder.decode(latents[3:], resumed)
    for name, tensor in resumed.tensors().items():
        tensor.copy_(saved[name])
    resumed.latents_seen = seen
    assert torch.equal(decoder.decode(latents[seen:], resumed), expected)


def test_reset_starts_afresh() -> None:
    latents, decoder = random_latents(4), make()
    state = decoder.new_state(3, 2, 3)
    first = decoder.decode(latents, state)
    state.reset()
    assert state.latents_seen == 0
    assert torch.equal(decoder.decode(latents, state), first)


def test_addresses_never_change() -> None:
    latents, decoder = random_latents(6), make()
    state = decoder.new_state(3, 2, 3)
    before = {name: tensor.data_ptr() for name, tensor in state.buffers().items()}
    assert set(before) == set(state.tensors()) and len(set(before.values())) == 9
    decode_in((1, 3, 2), latents, decoder, state)
    state.reset()
    decoder.decode(latents, state)
    assert {name: tensor.data_ptr() for name, tensor in state.buffers().items()} == before


def test_a_replay_is_a_call() -> None:
    """What a captured graph does: the same operations on the same addresses, and nothing asked of the host."""
    latents, decoder = random_latents(8), make()
    state, plain = decoder.new_state(3, 2, 2), decoder.new_state(3, 2, 2)
    expected = decode_in((2, 2, 2, 2), latents, decoder, plain)
    given = latents[:2].clone()
    decoder.decode(given, state)
    given.copy_(latents[2:4])
    with torch.no_grad(), Tape() as tape:
        video = decoder.decode_next(given, state, is_start=False)
    made = [video.clone()]
    for first in (4, 6):
        given.copy_(latents[first : first + 2])
        tape.replay()
        made.append(video.clone())
    assert torch.equal(torch.cat(made), expected[5:])


def test_latents_that_are_not_normalized_for_it() -> None:
    """The other kind of file wants them as the VAE has them, with its own mean and spread."""
    latents = random_latents(3)
    decoder = make(TinyVaeConfig(z_dim=3, widths=SMALL.widths, normalized=False))
    video = decoder.decode(latents, decoder.new_state(3, 2, 3))
    mean, std = (torch.tensor(values)[:, None, None] for values in (LIKE.latents_mean, LIKE.latents_std))
    assert relative_error(video, expected_video(WEIGHTS, latents * std + mean)) < FLOAT32_ROUNDING
    assert relative_error(video, expected_video(WEIGHTS, latents)) > 1e-2


def test_a_later_latent_leaves_earlier_frames_alone() -> None:
    latents, decoder = random_latents(5), make()
    changed = latents.clone()
    changed[3:] += 1
    video, other = (decoder.decode(z, decoder.new_state(3, 2, 5)) for z in (latents, changed))
    assert torch.equal(video[:9], other[:9])
    assert relative_error(other[9], video[9]) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_latents_of_any_dtype(dtype: torch.dtype) -> None:
    latents, decoder = random_latents(2).to(dtype), make()
    video = decoder.decode(latents, decoder.new_state(3, 2, 2))
    assert video.dtype == torch.float32
    assert torch.equal(video, decoder.decode(latents.float(), decoder.new_state(3, 2, 2)))


def test_inference_mode_may_come_and_go() -> None:
    latents, decoder = random_latents(3), make()
    expected = decode_in((1, 2), latents, decoder, decoder.new_state(3, 2, 2))
    with torch.inference_mode():
        state = decoder.new_state(3, 2, 2)
        first = decoder.decode(latents[:1], state)
    assert torch.equal(torch.cat([first, decoder.decode(latents[1:], state)]), expected)


@pytest.mark.parametrize("shape", [(3, 2, 3), (0, 3, 2, 3), (1, 4, 2, 3), (1, 3, 3, 2)], ids=str)
def test_latents_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    decoder = make()
    with pytest.raises(ConfigError, match=r"expected latents \[T >= 1, 3, 2, 3\] .* got"):
        decoder.decode(torch.zeros(shape), decoder.new_state(2, 3, 1))
