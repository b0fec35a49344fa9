"""A video to begin with, up to its latents: what is refused, how it is fitted, that pieces do not show."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from streaming import load
from torch import Tensor

import echo_rt
from echo_rt.engine.initial_video import InitialVideoEncoder
from echo_rt.errors import ConfigError, NumericalError, WeightsError
from echo_rt.model.vae_encoder import VaeEncoder
from echo_rt.weights.folder import VAE_FILE, ModelFolder

SIDE = 32  # pixels of the small model's frames
FIRST, BOTH = 9, 21  # frames of its first block, and of its first two


def frames_of(count: int, height: int = SIDE, width: int = SIDE) -> Tensor:
    return torch.randint(256, (count, height, width, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.fixture(scope="module")
def encoder(runtime: echo_rt.Runtime) -> InitialVideoEncoder:
    return runtime._engine.initial_video  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def framewise(small_model: Path) -> Iterator[InitialVideoEncoder]:
    """That of a model whose blocks are one latent frame."""
    with load(small_model, memory="off", overrides={"frames_per_block": 1}) as runtime:
        yield runtime._engine.initial_video  # type: ignore[union-attr]


def test_latents_are_those_of_the_vae(small_model: Path, encoder: InitialVideoEncoder) -> None:
    folder, video = ModelFolder.open(small_model), frames_of(BOTH)
    vae = VaeEncoder(folder.vae.config(), folder.vae.tensors(), device="cpu", dtype=torch.float32)
    latents = encoder.encode(video)
    assert latents.shape == (6, 16, 4, 4) and latents.dtype == torch.float32
    assert torch.equal(latents, vae.encode(video.permute(0, 3, 1, 2).float() / 127.5 - 1))


def test_arrays_tensors_and_pieces_are_the_same(encoder: InitialVideoEncoder) -> None:
    video = frames_of(BOTH)
    array = video.numpy().copy()
    array.flags.writeable = False
    backwards = video.numpy()[::-1].copy()[::-1]  # negative strides
    expected = encoder.encode(video)
    for same in (array, backwards, video.split(4), [video[:0], video], (piece.numpy() for piece in video.split(20))):
        encoder.check(same)
        assert torch.equal(encoder.encode(same), expected)


def test_no_more_than_a_group_is_read_ahead(encoder: InitialVideoEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read and not yet encoded, at most."""
    read, encoded, waiting = 0, 0, []
    encode_next = VaeEncoder.encode_next

    def counting(self: VaeEncoder, video: Tensor, state: object) -> Tensor:
        nonlocal encoded
        waiting.append(read - encoded)
        encoded += len(video)
        return encode_next(self, video, state)  # type: ignore[arg-type]

    def pieces() -> Iterator[Tensor]:
        nonlocal read
        for frame in frames_of(BOTH).split(1):
            read += 1
            yield frame

    monkeypatch.setattr(VaeEncoder, "encode_next", counting)
    encoder.encode(pieces())
    assert encoded == BOTH and max(waiting) == 4


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        (0, "9 frames, got 0"),
        (1, "9 frames, got 1"),
        (8, "9 frames, got 8"),
        (10, "9 or 21 frames, got 10"),
        (13, "9 or 21 frames, got 13"),
        (20, "9 or 21 frames, got 20"),
        (22, "21 or 33 frames, got 22"),
    ],
)
def test_counts_that_fill_no_blocks(encoder: InitialVideoEncoder, frames: int, expected: str) -> None:
    words = f"must fill blocks of 3 latent frames: expected {expected}"
    with pytest.raises(ConfigError, match=words):
        encoder.check(frames_of(frames))
    with pytest.raises(ConfigError, match=words):
        encoder.encode(iter(frames_of(frames).split(1)))


def test_a_picture_and_which_recipes_take_it(encoder: InitialVideoEncoder, framewise: InitialVideoEncoder) -> None:
    with pytest.raises(ConfigError, match=r"a picture begins a video only where .* the recipes causal-forcing-frame"):
        encoder.check(frames_of(1))
    assert framewise.encode(frames_of(1)).shape[0] == 1
    assert framewise.encode(frames_of(5)).shape[0] == 2
    with pytest.raises(ConfigError, match=r"blocks of 1 latent frame: expected 1 or 5 frames, got 4$"):
        framewise.check(frames_of(4))


def test_what_is_too_long(encoder: InitialVideoEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("echo_rt.engine.initial_video.MOST_INITIAL_SECONDS", 1)
    with pytest.raises(ConfigError, match="16 frames at most, 1 s at 16 fps; got 21 or more"):
        encoder.check(frames_of(BOTH))

    def endless() -> Iterator[Tensor]:
        while True:
            yield frames_of(1)

    with pytest.raises(ConfigError, match="16 frames at most"):
        encoder.encode(endless())


@pytest.mark.parametrize(
    ("video", "words"),
    [
        (frames_of(FIRST).float(), r"uint8 \[F, H, W, 3\], got float32 \[9, 32, 32, 3\]"),
        (np.zeros((9, 3, SIDE, SIDE), np.uint8), r"uint8 \[F, H, W, 3\], got uint8 \[9, 3, 32, 32\]"),
        (frames_of(1)[0], r"uint8 \[F, H, W, 3\], got uint8 \[32, 32, 3\]"),
        (frames_of(FIRST, 0), r"got uint8 \[9, 0, 32, 3\]"),
        ("clip.mp4", "must be frames, .* got a str"),
        (Path("clip.mp4"), "must be frames, .* got a PosixPath"),
        (7, "must be frames, .* got an int"),
        (frames_of(FIRST, SIDE, 48), r"frames of 32x32 pixels, got 48x32; fit='crop' or fit='pad' .*--fit"),
    ],
    ids=str,
)
def test_what_is_no_video_for_this_model(encoder: InitialVideoEncoder, video: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        encoder.check(video)  # type: ignore[arg-type]
    if not isinstance(video, (Tensor, np.ndarray)):
        return
    with pytest.raises(ConfigError, match=words):  # as a piece it is refused when it is read
        encoder.encode([video])


def test_pieces_that_are_none(encoder: InitialVideoEncoder) -> None:
    with pytest.raises(ConfigError, match="expected pieces that are tensors or arrays, got a list"):
        encoder.encode([[1, 2]])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("height", "width", "fit", "rows", "columns"),
    [
        (64, 128, "crop", (0, 32), (0, 32)),
        (64, 128, "pad", (8, 24), (0, 32)),
        (128, 64, "pad", (0, 32), (8, 24)),
        (16, 8, "crop", (0, 32), (0, 32)),
        (16, 8, "pad", (0, 32), (8, 24)),
        (3, 1000, "pad", (15, 16), (0, 32)),
        (1000, 3, "crop", (0, 32), (0, 32)),
    ],
)
def test_fitting(
    encoder: InitialVideoEncoder,
    height: int,
    width: int,
    fit: str,
    rows: tuple[int, int],
    columns: tuple[int, int],
) -> None:
    """A white picture stays white where it is, and black is what is added."""
    white = torch.full((1, height, width, 3), 255, dtype=torch.uint8)
    fitted = encoder._fitted(white, fit)
    expected = torch.full((1, 3, SIDE, SIDE), -1.0)
    expected[:, :, slice(*rows), slice(*columns)] = 1.0
    assert torch.allclose(fitted, expected, atol=1e-5)


def test_what_is_cut_off_is_the_edges_and_nothing_is_stretched(encoder: InitialVideoEncoder) -> None:
    """Of a picture of the video's height and twice its width the middle is taken as it is."""
    video = frames_of(1, SIDE, 2 * SIDE)
    middle = video[:, :, SIDE // 2 : SIDE // 2 + SIDE].permute(0, 3, 1, 2).float() / 127.5 - 1
    assert torch.allclose(encoder._fitted(video, "crop"), middle, atol=1e-4)
    assert torch.equal(encoder._fitted(frames_of(1), "pad"), encoder._fitted(frames_of(1), None))


def test_a_fitted_video_in_pieces_of_several_sizes(encoder: InitialVideoEncoder) -> None:
    video = frames_of(BOTH, 40, 90)
    with pytest.raises(ConfigError, match="got 90x40"):
        encoder.encode([video])
    whole = encoder.encode(video, "crop")
    assert torch.equal(encoder.encode(video.split(7), "crop"), whole)
    assert not torch.equal(encoder.encode(video, "pad"), whole)
    mixed = [frames_of(FIRST), frames_of(BOTH - FIRST, 40, 90)]
    assert encoder.encode(mixed, "pad").shape == whole.shape


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_is_encoded_in_the_dtype_of_the_vae(small_model: Path, encoder: InitialVideoEncoder, dtype: str) -> None:
    video = frames_of(FIRST)
    with load(small_model, vae_dtype=dtype) as runtime:
        narrow = runtime._engine.initial_video.encode(video)  # type: ignore[union-attr]
    wide = encoder.encode(video)
    assert narrow.dtype == torch.float32 and 1e-5 < float((narrow - wide).norm() / wide.norm()) < 3e-2


def test_the_encoder_is_let_go_of(encoder: InitialVideoEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[VaeEncoder]] = []
    new_state = VaeEncoder.new_state

    def noted(self: VaeEncoder, height: int, width: int) -> object:
        made.append(weakref.ref(self))
        return new_state(self, height, width)

    monkeypatch.setattr(VaeEncoder, "new_state", noted)
    encoder.encode(frames_of(FIRST))
    gc.collect()
    assert len(made) == 1 and made[0]() is None


def test_latents_that_overflow(encoder: InitialVideoEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_next = VaeEncoder.encode_next
    monkeypatch.setattr(VaeEncoder, "encode_next", lambda *arguments: encode_next(*arguments) * float("inf"))
    with pytest.raises(NumericalError, match="initial video are NaN or infinite; vae_dtype float32 may help"):
        encoder.encode(frames_of(FIRST))


def test_a_tiny_decoder_has_the_vae_of_its_folder(
    small_model: Path, encoder: InitialVideoEncoder, tmp_path: Path
) -> None:
    video = frames_of(FIRST)
    folder = tmp_path / "model"
    shutil.copytree(small_model, folder)
    with load(folder, vae="tiny") as runtime:
        tiny = runtime._engine.initial_video  # type: ignore[union-attr]
        assert torch.equal(tiny.encode(video), encoder.encode(video))
        (folder / VAE_FILE).unlink()
        with pytest.raises(WeightsError, match=f"encoded by the model's own VAE: .*{VAE_FILE}"):
            tiny.encode(video)


def test_an_engine_without_a_folder(encoder: InitialVideoEncoder, runtime: echo_rt.Runtime) -> None:
    bare = InitialVideoEncoder(None, runtime.config, runtime.vae_config, runtime.device, torch.float32)
    with pytest.raises(ConfigError, match="no folder with a VAE"):
        bare.encode(frames_of(FIRST))
