"""What a video is decoded in is a choice of its own: it changes the frames alone, and belongs to the stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from streaming import DEVICES, embeds, load, require, same, take, video

import echo_rt
from echo_rt import stream as stream_module
from echo_rt.errors import ConfigError, StreamError
from echo_rt.model.vae_decoder import VaeDecoder
from echo_rt.model.vae_encoder import VaeEncoder
from echo_rt.ops.backends import load_ops
from echo_rt.utils.device import parse_vae_dtype
from echo_rt.weights.folder import ModelFolder


@pytest.fixture(scope="module")
def mixed(small_model: Path) -> Iterator[echo_rt.Runtime]:
    """A transformer in bfloat16, its latents decoded in float32."""
    with load(small_model, dtype="bfloat16", vae_dtype="float32") as runtime:
        yield runtime


def test_frames_are_those_of_the_chosen_precision(small_model: Path, mixed: echo_rt.Runtime) -> None:
    assert (mixed.dtype, mixed.vae_dtype) == (torch.bfloat16, torch.float32)
    made = video(mixed, 3)
    folder = ModelFolder.open(small_model)
    tensors, config = folder.vae.tensors(), folder.vae.config()
    decoder = VaeDecoder(config, tensors, load_ops("torch"), device="cpu", dtype=torch.float32)
    latents = torch.cat([chunk.latents for chunk in made])
    decoded = decoder.decode(latents, decoder.new_state(*latents.shape[2:], len(latents)))
    expected = (decoded.double().clamp(-1, 1) + 1) * 127.5
    frames = torch.cat([chunk.frames for chunk in made])
    assert float((frames.double() - expected).abs().max()) < 0.501, "each byte is the nearest"

    with load(small_model, dtype="bfloat16") as plain:
        assert plain.vae_dtype is torch.bfloat16, "without a choice it is the model's"
        for chunk, other in zip(made, video(plain, 3), strict=True):
            assert torch.equal(chunk.latents, other.latents) and not torch.equal(chunk.frames, other.frames)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vae", ["wan", "tiny"])
def test_a_snapshot_goes_on_bit_for_bit(small_model: Path, tmp_path: Path, vae: str, device: str) -> None:
    options = {"dtype": "float32", "vae_dtype": "bfloat16", "vae": vae, "device": require(device)}
    with load(small_model, **options) as used:
        with used.stream(prompt_embeds=embeds(used), seed=5) as stream:
            take(stream, 2)
            stream.snapshot(tmp_path / "state.safetensors")
            expected = take(stream, 2)
        video(used, 1, seed=9)  # the buffers hold another video
        snapshot = echo_rt.Snapshot.load(tmp_path / "state.safetensors")
        assert {t.dtype for name, t in snapshot.tensors.items() if name.startswith("decoder.")} == {torch.bfloat16}
        with used.resume(snapshot) as stream:
            assert same(take(stream, 2), expected)


def test_a_snapshot_of_another_precision_is_refused(small_model: Path, mixed: echo_rt.Runtime) -> None:
    with mixed.stream(prompt_embeds=embeds(mixed)) as stream:
        take(stream, 1)
        snapshot = stream.snapshot()
    with load(small_model, dtype="bfloat16") as other:
        words = "vae_dtype is 'float32' in the snapshot and 'bfloat16' here$"
        with pytest.raises(StreamError, match=words):
            other.resume(snapshot)


def test_a_block_is_made_in_the_context_of_both(mixed: echo_rt.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a convolution in float32 is one only where that is asked for."""
    entered: list[tuple[torch.dtype, ...]] = []
    found = stream_module.model_context

    def note(device: torch.device, *dtypes: torch.dtype) -> AbstractContextManager[None]:
        entered.append(dtypes)
        return found(device, *dtypes)

    monkeypatch.setattr(stream_module, "model_context", note)
    video(mixed, 1)
    assert set(entered) == {(torch.bfloat16, torch.float32)}


def test_what_the_decoder_keeps_is_told(small_model: Path, mixed: echo_rt.Runtime) -> None:
    with load(small_model, dtype="bfloat16") as half:
        assert mixed.decoder_bytes == 2 * half.decoder_bytes > 0
        with half.stream(prompt_embeds=embeds(half)) as stream:
            before = half.decoder_bytes
            take(stream, 3)
            snapshot = stream.snapshot()
            assert half.decoder_bytes == before, "it is the same in the steady state"
        remembered = sum(t.nbytes for name, t in snapshot.tensors.items() if name.startswith("decoder."))
        assert remembered < half.decoder_bytes, "with its scratch buffers"
    with pytest.raises(StreamError, match="closed"):
        _ = half.decoder_bytes


def test_names() -> None:
    assert parse_vae_dtype(None, torch.float16) is torch.float16
    assert parse_vae_dtype("float32", torch.float16) is parse_vae_dtype(torch.float32, torch.float16) is torch.float32
    for wrong in ("int8", torch.float64, 16):
        with pytest.raises(
            ConfigError, match=r"vae_dtype must be one of float32, bfloat16, float16, fp32, float, .* half; got '"
        ):
            parse_vae_dtype(wrong, torch.float16)  # type: ignore[arg-type]


def test_a_wrong_name_is_found_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vae_dtype must be one of"):
        echo_rt.Runtime.from_pretrained(tmp_path / "nothing", device="cpu", vae_dtype="float8")


def test_the_encoder_is_in_float32_unless_asked(small_model: Path) -> None:
    folder = ModelFolder.open(small_model)
    size = 2 * folder.vae.config().spatial_stride
    picture = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    made = [
        VaeEncoder(folder.vae.config(), folder.vae.tensors(), device="cpu", **options).encode(picture)
        for options in ({}, {"dtype": torch.float32}, {"dtype": torch.bfloat16})
    ]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
