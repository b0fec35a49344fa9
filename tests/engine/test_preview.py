"""Streams whose pictures a tiny decoder makes: the same latents, other frames, and all that a stream can do."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from naive_tiny_vae import naive_decode
from recorder import Recorder
from safetensors.torch import save_file
from streaming import DEVICES, embeds, load, require, same, take, video
from torch import Tensor

import echo_rt
from echo_rt.errors import ConfigError, StreamError, WeightsError
from echo_rt.weights.folder import VAE_FILE
from echo_rt.weights.tiny_model import TINY_VAE_FILE

FEW_STEPS = {"denoising_steps": (1000, 500)}


@pytest.fixture(scope="module")
def runtime(small_model: Path) -> Iterator[echo_rt.Runtime]:
    with load(small_model, vae="tiny") as runtime:
        yield runtime


@pytest.fixture(scope="module")
def plain(runtime: echo_rt.Runtime) -> list[echo_rt.Chunk]:
    return video(runtime, 8, seed=3)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / TINY_VAE_FILE, weights_only=True)


def test_frames_are_what_the_tiny_decoder_makes_of_the_latents(
    small_model: Path, runtime: echo_rt.Runtime, plain: list[echo_rt.Chunk]
) -> None:
    assert runtime.decoder == "taew2_1"
    assert [len(chunk.frames) for chunk in plain] == [9] + [12] * 7
    latents = torch.cat([chunk.latents for chunk in plain])
    expected = 255 * naive_decode(tensors_of(small_model), latents).permute(0, 2, 3, 1).clamp(0, 1)
    made = torch.cat([chunk.frames for chunk in plain])
    assert float((made.double() - expected).abs().max()) < 0.501


def test_the_latents_are_those_of_any_decoder(small_model: Path, plain: list[echo_rt.Chunk]) -> None:
    with load(small_model) as full:
        assert full.decoder == "wan"
        made = video(full, 3, seed=3)
    for chunk, preview in zip(made, plain, strict=False):
        assert torch.equal(chunk.latents, preview.latents)
        assert chunk.frames.shape == preview.frames.shape and not torch.equal(chunk.frames, preview.frames)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_snapshot_goes_on_bit_for_bit(small_model: Path, tmp_path: Path, dtype: str, device: str) -> None:
    options = {"vae": "tiny", "dtype": dtype, "device": require(device)}
    with load(small_model, **options) as used:
        with used.stream(prompt_embeds=embeds(used), seed=11) as stream:
            take(stream, 2)
            stream.snapshot(tmp_path / "state.safetensors")
            expected = take(stream, 3)
        video(used, 2, seed=99, prompt=99)  # the buffers hold another video
        snapshot = echo_rt.Snapshot.load(tmp_path / "state.safetensors")
        with used.resume(snapshot) as stream:
            assert same(take(stream, 3), expected)
    with load(small_model, **options) as fresh, fresh.resume(snapshot) as stream:
        assert same(take(stream, 3), expected)


def test_a_snapshot_belongs_to_its_decoder(small_model: Path, runtime: echo_rt.Runtime, tmp_path: Path) -> None:
    """Neither of the model's own VAE, nor of the other kind, although the tensors are the same."""
    other_kind = tmp_path / "lighttaew2_1.safetensors"
    save_file(tensors_of(small_model), other_kind)
    with runtime.stream(prompt_embeds=embeds(runtime)) as stream:
        take(stream, 1)
        snapshot = stream.snapshot()
    for vae, name in (("wan", "wan"), (other_kind, "lighttaew2_1")):
        with (
            load(small_model, vae=vae) as other,
            pytest.raises(StreamError, match=f"vae is 'taew2_1' in the snapshot and '{name}' here"),
        ):
            other.resume(snapshot)
    with load(small_model) as full, full.stream(prompt_embeds=embeds(full)) as stream:
        of_the_full = stream.snapshot()
    with pytest.raises(StreamError, match="vae is 'wan' in the snapshot and 'taew2_1' here"):
        runtime.resume(of_the_full)


def test_the_other_kind_wants_the_latents_of_the_vae(
    small_model: Path, runtime: echo_rt.Runtime, tmp_path: Path
) -> None:
    save_file(tensors_of(small_model), tmp_path / "lighttaew2_1.safetensors")
    with load(small_model, vae=tmp_path / "lighttaew2_1.safetensors") as other:
        made = video(other, 2)
    mean, std = (torch.tensor(v)[:, None, None] for v in (other.vae_config.latents_mean, other.vae_config.latents_std))
    latents = torch.cat([chunk.latents for chunk in made]) * std + mean
    expected = 255 * naive_decode(tensors_of(small_model), latents).permute(0, 2, 3, 1).clamp(0, 1)
    assert float((torch.cat([chunk.frames for chunk in made]).double() - expected).abs().max()) < 0.501


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_replayed_preview_is_the_preview(small_model: Path, lookahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU replays graphs: the same addresses, nothing asked of the host, no two queues race."""
    with load(small_model, vae="tiny", overrides=FEW_STEPS) as plain:
        expected = video(plain, 15, seed=3)
    recorder = Recorder()
    monkeypatch.setattr("echo_rt.engine.engine.make_executor", lambda device, graphs: recorder)
    with load(small_model, vae="tiny", overrides=FEW_STEPS, lookahead=lookahead) as runtime:
        recorder.watch(runtime._engine.pipeline.buffers())  # type: ignore[union-attr]
        with runtime.stream(prompt_embeds=embeds(runtime), seed=3) as stream, recorder:
            made = take(stream, 11)
            runs, replays = recorder.runs, recorder.replays
            made += take(stream, 4)
            assert recorder.runs - runs == recorder.replays - replays > 0
    assert same(made, expected)
    assert recorder.races() == []


def test_the_steady_state_keeps_its_promises(small_model: Path, plain: list[echo_rt.Chunk]) -> None:
    with load(small_model, vae="tiny", check=True) as checked:
        assert same(video(checked, 8, seed=3), plain)


def test_a_model_without_a_tiny_decoder(small_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(small_model, folder, ignore=shutil.ignore_patterns(TINY_VAE_FILE))
    with pytest.raises(WeightsError, match=r"expected a tiny decoder, taew2_1\{\.pth.*TAEHV.*LightX2V.*none of them"):
        load(folder, vae="tiny")
    with load(folder, vae=small_model / TINY_VAE_FILE) as runtime:
        assert runtime.decoder == "taew2_1"


def test_the_vae_itself_need_not_be_there(small_model: Path, tmp_path: Path, plain: list[echo_rt.Chunk]) -> None:
    """Nor whole: its file is not looked at. Whoever asks for it is told that it is missing."""
    folder = tmp_path / "model"
    shutil.copytree(small_model, folder, ignore=shutil.ignore_patterns(VAE_FILE))
    for content in (None, b"cut off"):
        if content is not None:
            (folder / VAE_FILE).write_bytes(content)
        with load(folder, checkpoint=small_model / "echo_infinity.pt", vae="tiny") as runtime:
            assert same(video(runtime, 2, seed=3), plain[:2])
    (folder / VAE_FILE).unlink()
    with pytest.raises(WeightsError, match=rf"{VAE_FILE}: expected a file, found none"):
        load(folder)


def test_weights_that_are_not_numbers(small_model: Path, tmp_path: Path) -> None:
    spoiled = tensors_of(small_model)
    spoiled["decoder.16.conv.2.bias"][1] = float("nan")
    save_file(spoiled, tmp_path / "taew2_1.safetensors")
    with pytest.raises(WeightsError, match=r"taew2_1\.safetensors \(tiny decoder\): 1 of 8 values of decoder\.16\."):
        load(small_model, vae=tmp_path / "taew2_1.safetensors")


def test_what_it_is_decoded_in(small_model: Path, runtime: echo_rt.Runtime, plain: list[echo_rt.Chunk]) -> None:
    """Beside the dtype of the model: the same latents, nearly the same frames, half the memory."""
    with load(small_model, vae="tiny", vae_dtype="bfloat16") as half:
        assert 2 * half.decoder_bytes == runtime.decoder_bytes
        made = video(half, 2, seed=3)
    for chunk, expected in zip(made, plain, strict=False):
        assert torch.equal(chunk.latents, expected.latents)
        error = (chunk.frames.float() - expected.frames.float()).abs().mean()
        assert 0 < error < 2


def test_a_decoder_that_is_no_name(small_model: Path) -> None:
    with pytest.raises(ConfigError, match="vae must be 'wan', 'tiny' or a path, got 3"):
        load(small_model, vae=3)
    with pytest.raises(ConfigError, match="vae must be 'wan', 'tiny' or a path, got ''"):
        load(small_model, vae="")
