"""The VAE encoder against the golden bundle, and against a plain one that takes the whole video at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import relative_error
from naive_vae import Bundle, NaiveVae, random_weights, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from echo_rt.errors import ConfigError
from echo_rt.model.vae_encoder import VaeEncoder
from echo_rt.weights.shapes import vae_encoder_shapes

# Two summation orders of the same float32 convolutions.
FLOAT32_ROUNDING = 1e-5


def make_encoder(bundle: Bundle, dtype: torch.dtype = torch.float32, device: str = "cpu") -> VaeEncoder:
    return VaeEncoder(bundle.config, bundle.weights, device=device, dtype=dtype)


@pytest.fixture(scope="module")
def bundle(golden_dir: Path) -> Bundle:
    return Bundle(golden_dir / "vae")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1.5e-2), (torch.float16, 2.5e-3)], ids=str
)
def test_golden_bundle(
    bundle: Bundle, dtype: torch.dtype, bound: float, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    latents = make_encoder(bundle, dtype, device).encode(bundle.inputs["video"])
    assert latents.dtype == torch.float32 and latents.device.type == device
    assert relative_error(latents.cpu(), bundle.expected["encoded"]) < bound


def test_a_video_of_one_frame(bundle: Bundle) -> None:
    latents = make_encoder(bundle).encode(bundle.inputs["video"][:1])
    assert relative_error(latents, bundle.expected["encoded"][:1]) < FLOAT32_ROUNDING


def test_naive_encoder_is_the_golden_one(bundle: Bundle) -> None:
    latents = NaiveVae(bundle.config, bundle.weights).encode(bundle.inputs["video"])
    assert relative_error(latents, bundle.expected["encoded"]) < FLOAT32_ROUNDING


@pytest.mark.parametrize(
    ("dim_mult", "temporal_downsample", "frames"),
    [
        ((1, 2), (True,), 7),
        ((1, 2, 2), (False, True), 5),
        ((1, 1, 2), (True, False), 5),
        ((2, 1), (False,), 4),
        ((2,), (), 3),
        ((1, 1, 1, 1), (True, True, True), 17),
    ],
    ids=str,
)
def test_other_configurations(dim_mult: tuple[int, ...], temporal_downsample: tuple[bool, ...], frames: int) -> None:
    config = tiny_config(dim_mult=dim_mult, temporal_downsample=temporal_downsample, num_res_blocks=1)
    weights = random_weights(vae_encoder_shapes(config))
    stride = config.spatial_stride
    video = torch.rand(frames, 3, 2 * stride, 3 * stride, generator=torch.Generator().manual_seed(7)) * 2 - 1
    latents = VaeEncoder(config, weights, device="cpu", dtype=torch.float32).encode(video)
    assert latents.shape == (1 + (frames - 1) // config.temporal_stride, config.z_dim, 2, 3)
    assert relative_error(latents, NaiveVae(config, weights).encode(video)) < FLOAT32_ROUNDING


@pytest.mark.parametrize("pieces", [(1, 4, 4), (5, 4), (1, 8), (9,)], ids=str)
def test_pieces_do_not_show(bundle: Bundle, pieces: tuple[int, ...]) -> None:
    encoder, video = make_encoder(bundle), bundle.inputs["video"]
    state = encoder.new_state(*video.shape[2:])
    latents = torch.cat([encoder.encode_next(piece, state) for piece in video.split(pieces)])
    assert torch.equal(latents, encoder.encode(video)) and state.latents_made == len(latents)


def test_what_is_remembered_does_not_grow(bundle: Bundle) -> None:
    encoder, video = make_encoder(bundle), bundle.inputs["video"]
    state = encoder.new_state(*video.shape[2:])

    def buffers() -> list[tuple[int, int]]:
        return [(one.data_ptr(), one.nbytes) for one in (state.windows.room, *state.windows.histories.values())]

    encoder.encode_next(video[:1], state)
    before = buffers()
    for _ in range(3):
        encoder.encode_next(video[1:], state)
    assert buffers() == before


def test_later_pieces_are_whole_groups_of_the_same_size(bundle: Bundle) -> None:
    encoder, video = make_encoder(bundle), bundle.inputs["video"]
    state = encoder.new_state(*video.shape[2:])
    encoder.encode_next(video[:1], state)
    with pytest.raises(ConfigError, match=r"expected 4\*k video frames, got 5"):
        encoder.encode_next(video[1:6], state)
    with pytest.raises(ConfigError, match=r"expected a video \[F >= 1, 3, 48, 80\], got \[4, 3, 40, 80\]"):
        encoder.encode_next(video[1:5, :, 8:], state)


def test_encoding_leaves_nothing_behind(bundle: Bundle) -> None:
    encoder, video = make_encoder(bundle), bundle.inputs["video"][:5]
    first = encoder.encode(video)
    encoder.encode(-video)
    assert torch.equal(encoder.encode(video), first)


def test_float32_is_asked_for_whatever_the_process_has_set(bundle: Bundle) -> None:
    """On a GPU a convolution that leaves it to torch's switches is rounded to TF32."""
    allowed: list[bool] = []

    class Watcher(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__
            if "conv" in name:
                allowed.append(args[-1] if name == "_convolution" else True)
            return func(*args, **(kwargs or {}))

    encoder = make_encoder(bundle)
    with Watcher():
        encoder.encode(bundle.inputs["video"][:5])
    assert len(allowed) > 40 and not any(allowed)


@pytest.mark.parametrize("frames", [2, 4, 8])
def test_incomplete_groups_are_refused(bundle: Bundle, frames: int) -> None:
    with pytest.raises(ConfigError, match=rf"1 \+ 4\*k video frames, got {frames}"):
        make_encoder(bundle).encode(bundle.inputs["video"][:frames])


@pytest.mark.parametrize("shape", [(0, 3, 48, 80), (1, 4, 48, 80), (3, 48, 80)], ids=str)
def test_what_is_no_video_is_refused(bundle: Bundle, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        make_encoder(bundle).encode(torch.zeros(shape))
    assert str(list(shape)) in str(error.value)


@pytest.mark.parametrize("size", [(47, 80), (48, 84), (0, 80)], ids=str)
def test_sizes_that_are_no_multiple_are_refused(bundle: Bundle, size: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=f"multiples of 8, got {size[0]} and {size[1]}"):
        make_encoder(bundle).encode(torch.zeros(1, 3, *size))
