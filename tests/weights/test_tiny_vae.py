"""Tiny decoders on disk: found, told apart, held against their own shapes and against the model's VAE."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from naive_tiny_vae import RELEASED_GROWTH, RELEASED_WIDTHS, random_decoder
from random_weights import assert_same
from safetensors.torch import save_file
from torch import Tensor

from echo_rt.config import VaeConfig
from echo_rt.errors import ConfigError, EchoError, WeightsError
from echo_rt.weights.tiny_vae import LIGHTTAEW, TAEW, TinyVaeConfig, open_tiny_vae, tiny_decoder_shapes

LIKE = VaeConfig(base_dim=4)
DECODER = random_decoder(16, (6, 5, 4, 4))
# Part of what a released file also holds.
ENCODER = {"encoder.0.weight": torch.ones(4, 3, 3, 3), "encoder.4.conv.0.bias": torch.ones(4)}


def save(path: Path, tensors: dict[str, Tensor] | None = None) -> Path:
    tensors = DECODER | ENCODER if tensors is None else tensors
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return path


def refusal(vae: str | Path, folder: Path, kind: type[EchoError] = WeightsError, like: VaeConfig = LIKE) -> str:
    """The one line with which a decoder is refused."""
    with pytest.raises(kind) as caught:
        open_tiny_vae(vae, folder, like)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_names_and_shapes_of_the_released_files() -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in random_decoder(16, RELEASED_WIDTHS).items()}
    assert tiny_decoder_shapes(TinyVaeConfig()) == expected
    assert len(expected) == 64 and TinyVaeConfig().growth == RELEASED_GROWTH


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", [TAEW, LIGHTTAEW], ids=lambda kind: kind)
def test_the_usual_names_in_the_model_folder(tmp_path: Path, kind: object, suffix: str) -> None:
    assert kind in (TAEW, LIGHTTAEW)
    path = save(tmp_path / f"{kind}{suffix}")
    found = open_tiny_vae("tiny", tmp_path, LIKE)
    assert (found.path, found.kind) == (path, kind)
    assert found.config == TinyVaeConfig(16, (6, 5, 4, 4), (1, 2, 2), normalized=kind is TAEW)
    assert_same(found.tensors, DECODER)


def test_a_file_anywhere_by_its_path(tmp_path: Path) -> None:
    """Its encoder may be left out, its name may say more; it counts before the folder's own."""
    folder = tmp_path / "model"
    folder.mkdir()
    save(folder / "taew2_1.pth")
    path = save(tmp_path / "LightTAEW2_1_bf16.safetensors", DECODER)
    for vae in (path, str(path)):
        found = open_tiny_vae(vae, folder, LIKE)
        assert (found.path, found.kind) == (path, LIGHTTAEW)
        assert_same(found.tensors, DECODER)


def test_no_file_says_where_one_is_usually_found(tmp_path: Path) -> None:
    message = refusal("tiny", tmp_path)
    for word in (str(tmp_path), "taew2_1{.pth,.safetensors}", "lighttaew2_1{.pth,", "TAEHV", "LightX2V", "its path"):
        assert word in message
    assert "http" not in message


@pytest.mark.parametrize("vae", ["tinny", "nowhere/taew2_1.pth"])
def test_a_path_that_leads_nowhere(tmp_path: Path, vae: str) -> None:
    assert f"expected 'wan', 'tiny' or the path of a tiny decoder's file, got '{vae}'" in refusal(vae, tmp_path)


def test_two_in_one_folder_are_not_chosen_between(tmp_path: Path) -> None:
    save(tmp_path / "taew2_1.pth")
    path = save(tmp_path / "lighttaew2_1.safetensors")
    assert "found taew2_1.pth and lighttaew2_1.safetensors" in refusal("tiny", tmp_path)
    assert open_tiny_vae(path, tmp_path, LIKE).kind is LIGHTTAEW


def test_a_name_that_says_neither(tmp_path: Path) -> None:
    message = refusal(save(tmp_path / "decoder.safetensors"), tmp_path)
    assert "decoder.safetensors: expected a name that says which tiny decoder it is, like taew2_1{" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"decoder.5.conv.2.bias": None}, "1 missing (decoder.5.conv.2.bias)"),
        ({"decoder.21.weight": torch.ones(1)}, "1 surplus (decoder.21.weight)"),
        ({"taesd.weight": torch.ones(1)}, "1 surplus (taesd.weight)"),
        ({"decoder.10.conv.0.weight": torch.ones(5, 5, 3, 3)}, "decoder.10.conv.0.weight is [5, 5, 3, 3] for [5, 10,"),
        ({"decoder.22.weight": torch.ones(12, 4, 3, 3)}, "decoder.22.weight is [12, 4, 3, 3] for [3, 4, 3, 3]"),
        ({"decoder.22.bias": torch.ones(3, dtype=torch.int64)}, "decoder.22.bias is int64"),
        ({"decoder.1.weight": None}, "expected a tiny video decoder, found no decoder.1.weight"),
        ({"decoder.13.conv.weight": None}, "found no decoder.13.conv.weight"),
        ({"decoder.13.conv.weight": torch.ones(7, 5, 1, 1)}, "a multiple of 5 rows in decoder.13.conv.weight, found 7"),
    ],
    ids=str,
)
def test_tensors_that_are_not_as_they_should_be(tmp_path: Path, changes: dict[str, Tensor | None], words: str) -> None:
    changed = {name: tensor for name, tensor in (DECODER | ENCODER | changes).items() if tensor is not None}
    message = refusal(save(tmp_path / "taew2_1.pth", changed), tmp_path)
    assert words in message and "taew2_1.pth" in message


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"decoder.1.weight": print}, tmp_path / "taew2_1.pth")
    assert "which is code and is not run" in refusal("tiny", tmp_path)


@pytest.mark.parametrize(
    ("decoder", "words"),
    [
        (random_decoder(48, (6, 5, 4, 4)), "48 channels of a latent, the model's own VAE 16"),
        (random_decoder(16, (6, 5, 4, 4), (2, 2, 2)), "8 frames of a latent, the model's own VAE 4"),
        ({k: v for k, v in DECODER.items() if k < "decoder.2" or k > "decoder.23"}, "4 pixels on a side"),
    ],
    ids=["channels", "frames", "pixels"],
)
def test_a_decoder_of_another_vae(tmp_path: Path, decoder: dict[str, Tensor], words: str) -> None:
    path = save(tmp_path / "taew2_1.safetensors", decoder)
    assert words in refusal(path, tmp_path, ConfigError)


def test_a_model_of_another_stride(tmp_path: Path) -> None:
    like = VaeConfig(base_dim=4, dim_mult=(1, 2, 4), temporal_downsample=(True, True))
    message = refusal(save(tmp_path / "taew2_1.pth"), tmp_path, ConfigError, like)
    assert "8 pixels on a side of a latent pixel, the model's own VAE 4" in message
