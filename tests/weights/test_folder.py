"""Model folders in both layouts, and folders that are none."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_weights import (
    TEXT_ENCODER,
    TEXT_ENCODER_NAMES,
    TRANSFORMER,
    VAE,
    assert_same,
    text_encoder,
    transformer,
    vae,
    write_diffusers,
    write_json,
    write_original,
    write_shards,
)
from safetensors.torch import load_file, save_file

from echo_rt.config import TextEncoderConfig, VaeConfig
from echo_rt.errors import WeightsError
from echo_rt.weights.folder import ModelFolder
from echo_rt.weights.shapes import (
    text_encoder_config_of,
    text_encoder_shapes,
    transformer_shapes,
    vae_config_of,
    vae_shapes,
)

WRITERS = {"original": write_original, "diffusers": write_diffusers}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {layout: write(tmp_path_factory.mktemp(layout)) for layout, write in WRITERS.items()}


@pytest.fixture
def folders(written: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Copies that a test may damage."""
    return lambda layout: Path(shutil.copytree(written[layout], tmp_path / layout))


def edit(path: Path, **changes: Any) -> None:
    """Changes fields of a JSON file; ``...`` takes one out."""
    content = json.loads(path.read_text()) | changes
    write_json(path, {name: value for name, value in content.items() if value is not ...})


def refusal(read: Callable[[], Any]) -> str:
    with pytest.raises(WeightsError) as caught:
        read()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("layout", WRITERS)
def test_every_part(written: dict[str, Path], layout: str) -> None:
    folder = ModelFolder.open(str(written[layout]))
    # diffusers has no field for the length of the text.
    text_len = TRANSFORMER.text_len if layout == "original" else 512
    assert folder.transformer.config() == dataclasses.replace(TRANSFORMER, text_len=text_len)
    assert folder.vae.config() == VAE
    assert folder.text_encoder.config() == TEXT_ENCODER
    assert folder.rollout_defaults() == {}
    assert_same(folder.transformer.tensors(), transformer())
    assert_same(folder.vae.tensors(), vae())
    assert_same(folder.text_encoder.tensors(), text_encoder())
    assert folder.tokenizer_path().is_dir()


@pytest.mark.parametrize("layout", WRITERS)
def test_a_part_needs_no_other(folders: Callable[[str], Path], layout: str) -> None:
    path = folders(layout)
    kept = ("Wan2.1_VAE.pth", "vae")
    for entry in path.iterdir():
        if entry.name not in kept:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    folder = ModelFolder.open(path)
    assert_same(folder.vae.tensors(), vae())
    assert "expected" in refusal(folder.transformer.tensors)
    assert "found" in refusal(folder.text_encoder.tensors)
    assert "expected the tokenizer's folder" in refusal(folder.tokenizer_path)


def test_sharded_original_transformer(folders: Callable[[str], Path]) -> None:
    path = folders("original")
    (path / "diffusion_pytorch_model.safetensors").unlink()
    write_shards(path, "diffusion_pytorch_model", transformer())
    assert_same(ModelFolder.open(path).transformer.tensors(), transformer())


def test_stock_config_leaves_text_width_and_patches_to_the_defaults(folders: Callable[[str], Path]) -> None:
    path = folders("original")
    edit(path / "config.json", text_dim=..., text_len=..., in_dim=..., out_dim=...)
    config = ModelFolder.open(path).transformer.config()
    assert (config.text_dim, config.text_len, config.patch_size, config.in_channels) == (4096, 512, (1, 2, 2), 16)


def test_as_many_channels_come_out_as_go_in_where_diffusers_says_null(folders: Callable[[str], Path]) -> None:
    path = folders("diffusers")
    edit(path / "transformer" / "config.json", out_channels=None)
    assert ModelFolder.open(path).transformer.config().out_channels == 16


def test_released_sizes(tmp_path: Path) -> None:
    stock = {"dim": 1536, "eps": 1e-06, "ffn_dim": 8960, "freq_dim": 256, "in_dim": 16, "model_type": "t2v"}
    write_json(tmp_path / "config.json", stock | {"num_heads": 12, "num_layers": 30, "out_dim": 16, "text_len": 512})
    shapes = transformer_shapes(ModelFolder.open(tmp_path).transformer.config())
    assert len(shapes) == 825
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 1_418_996_800


@pytest.mark.parametrize(("layout", "config"), [("original", "config.json"), ("diffusers", "transformer/config.json")])
def test_rollout_defaults(folders: Callable[[str], Path], layout: str, config: str) -> None:
    path = folders(layout)
    defaults = {"width": 96, "height": 64, "denoising_steps": [1000, 500]}
    edit(path / config, echo_rt=defaults)
    assert ModelFolder.open(path).rollout_defaults() == defaults
    edit(path / config, echo_rt=[1])
    assert 'expected "echo_rt" to be an object' in refusal(ModelFolder.open(path).rollout_defaults)


def test_wrong_folders(tmp_path: Path) -> None:
    assert "does not exist (echo-rt recipes shows " in refusal(lambda: ModelFolder.open(tmp_path / "gone"))
    assert "does not exist" in refusal(lambda: ModelFolder.open("x" * 5000))
    message = refusal(lambda: ModelFolder.open(tmp_path))
    assert "config.json, Wan2.1_VAE.pth" in message and "transformer/config.json" in message
    (tmp_path / "file").write_bytes(b"x")
    assert "found another format" in refusal(ModelFolder.open(tmp_path / "file").transformer.tensors)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "i2v", "in_dim": 36}, 'model_type "t2v"), found model_type "i2v"'),
        ({"in_dim": 36}, "as many input as output channels, got in 36 and out 16"),
        ({"dim": ...}, "found no dim"),
        ({"dim": "1536"}, "dim must be a positive integer of at most 1048576, got '1536'"),
        ({"eps": "small"}, "eps must be a number in 0..1, got 'small'"),
        ({"dim": 25}, "dim 25 is not a multiple of num_heads 2"),
        ({"num_layers": 0}, "num_layers must be a positive integer"),
        ({"patch_size": 2}, "patch_size must be (1, rows, columns), got 2"),
        ({"num_layers": 1_000_000}, "num_layers must be a positive integer of at most 1024, got 1000000"),
        ({"patch_size": [2, 2, 2]}, "patch_size must be"),
    ],
)
def test_original_config_of_another_model(folders: Callable[[str], Path], changes: dict[str, Any], said: str) -> None:
    path = folders("original")
    edit(path / "config.json", **changes)
    message = refusal(ModelFolder.open(path).transformer.config)
    assert said in message and str(path / "config.json") in message


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("transformer", {"image_dim": 1280, "added_kv_proj_dim": 1536}, "image_dim null), found image_dim 1280"),
        ("transformer", {"_class_name": "WanVACETransformer3DModel"}, "WanVACETransformer3DModel"),
        ("transformer", {"in_channels": 36}, "as many input as output channels"),
        ("transformer", {"num_attention_heads": ...}, "found no num_attention_heads"),
        ("transformer", {"attention_head_dim": "12"}, "attention_head_dim: Expected `int`, got `str`"),
        ("transformer", {"attention_head_dim": 2**40}, "attention_head_dim: Expected `int` <= 1048576"),
        ("transformer", {"num_layers": 10**9}, "num_layers must be a positive integer of at most 1024"),
        ("vae", {"num_res_blocks": 10**9}, "num_res_blocks must be a positive integer of at most 1024"),
        ("vae", {"decoder_base_dim": 7}, "(decoder_base_dim null), found decoder_base_dim 7"),
        ("text_encoder", {"num_layers": 10**9}, "num_layers must be a positive integer of at most 1024"),
        ("vae", {"is_residual": True, "z_dim": 48}, "is_residual false), found is_residual true"),
        ("vae", {"z_dim": 8}, "latents_mean and latents_std must have z_dim 8"),
        ("vae", {"temperal_downsample": [True]}, "temporal_downsample must name"),
        ("vae", {"base_dim": ...}, "found no base_dim"),
        ("text_encoder", {"model_type": "t5"}, 'model_type "umt5"), found model_type "t5"'),
        ("text_encoder", {"d_kv": ...}, "found no d_kv"),
    ],
)
def test_diffusers_config_of_another_model(
    folders: Callable[[str], Path], file: str, changes: dict[str, Any], said: str
) -> None:
    path = folders("diffusers")
    edit(path / file / "config.json", **changes)
    message = refusal(getattr(ModelFolder.open(path), file).config)
    assert said in message and str(path / file / "config.json") in message


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"version https://git-lfs.github.com/spec/v1\n", b"\xff\xfe"])
def test_config_that_is_no_json_object(folders: Callable[[str], Path], content: bytes) -> None:
    path = folders("original")
    (path / "config.json").write_bytes(content)
    assert f"{path / 'config.json'}: expected" in refusal(ModelFolder.open(path).transformer.config)


def test_weights_and_config_must_agree(folders: Callable[[str], Path]) -> None:
    path = folders("original")
    edit(path / "config.json", num_layers=3)
    message = refusal(ModelFolder.open(path).transformer.tensors)
    assert "diffusion_pytorch_model.safetensors: expected" in message and "missing (blocks.2.modulation" in message
    # In the diffusers layout the names are those that the file would have.
    path = folders("diffusers")
    edit(path / "transformer" / "config.json", num_layers=1)
    assert "surplus (blocks.1.attn1.norm_k.weight" in refusal(ModelFolder.open(path).transformer.tensors)
    edit(path / "vae" / "config.json", base_dim=8)
    assert "misshapen" in refusal(ModelFolder.open(path).vae.tensors)


def test_missing_and_damaged_parts(folders: Callable[[str], Path]) -> None:
    path = folders("original")
    (path / "diffusion_pytorch_model.safetensors").unlink()
    message = refusal(ModelFolder.open(path).transformer.tensors)
    assert "diffusion_pytorch_model.safetensors or diffusion_pytorch_model.safetensors.index.json" in message
    (path / "Wan2.1_VAE.pth").unlink()
    assert "Wan2.1_VAE.pth: expected a file, found none" in refusal(ModelFolder.open(path).vae.tensors)
    (path / "Wan2.1_VAE.pth").mkdir()
    assert "Wan2.1_VAE.pth: expected a file, found a folder" in refusal(ModelFolder.open(path).vae.config)
    shutil.rmtree(path / "google")
    assert "google/umt5-xxl: expected the tokenizer's folder" in refusal(ModelFolder.open(path).tokenizer_path)
    (path / "google" / "umt5-xxl").mkdir(parents=True)
    assert "expected a tokenizer (tokenizer.json" in refusal(ModelFolder.open(path).tokenizer_path)


@pytest.mark.parametrize(
    "config",
    [
        VAE,
        VaeConfig(base_dim=4, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(True, False)),
        VaeConfig(base_dim=6, dim_mult=(1,), num_res_blocks=3, temporal_downsample=()),
    ],
)
def test_vae_config_from_shapes(config: VaeConfig) -> None:
    tensors = {name: torch.empty(shape, device="meta") for name, shape in vae_shapes(config).items()}
    assert vae_config_of(tensors, "here") == config


def test_text_encoder_config_from_shapes_of_umt5_xxl() -> None:
    shapes = text_encoder_shapes(TextEncoderConfig())
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    assert text_encoder_config_of(tensors, "here") == TextEncoderConfig()


@pytest.mark.parametrize(
    ("name", "replacement", "said"),
    [
        ("encoder.conv1.weight", None, "found no encoder.conv1.weight"),
        ("encoder.conv1.weight", torch.zeros(4), "5-dimensional encoder.conv1.weight, found shape [4]"),
        ("encoder.conv1.weight", torch.zeros(3, 3, 3, 3, 3), "multiples of 3"),
        ("encoder.downsamples.0.residual.2.weight", None, "found no encoder.downsamples.0.residual.2.weight"),
        ("encoder.downsamples.2.resample.1.weight", None, "found no encoder.downsamples.2.residual.2.weight"),
        ("conv2.weight", torch.zeros(8, 8, 1, 1, 1), "must have z_dim 8 entries"),
        ("decoder.head.0.gamma", None, "1 missing (decoder.head.0.gamma)"),
        ("stray", torch.zeros(1), "1 surplus (stray)"),
    ],
)
def test_damaged_original_vae(
    folders: Callable[[str], Path], name: str, replacement: torch.Tensor | None, said: str
) -> None:
    path = folders("original")
    tensors = vae() | {name: replacement}
    torch.save({k: v for k, v in tensors.items() if v is not None}, path / "Wan2.1_VAE.pth")
    message = refusal(ModelFolder.open(path).vae.tensors)
    assert said in message and "Wan2.1_VAE.pth" in message


def test_uneven_vae_levels(folders: Callable[[str], Path]) -> None:
    path = folders("original")
    tensors = vae() | {"encoder.downsamples.11.residual.2.weight": torch.zeros(16, 16, 3, 3, 3)}
    torch.save(tensors, path / "Wan2.1_VAE.pth")
    assert "as many residual blocks on every level, found [2, 2, 2, 3]" in refusal(ModelFolder.open(path).vae.config)


def test_damaged_original_text_encoder(folders: Callable[[str], Path]) -> None:
    path = folders("original")
    file = path / "models_t5_umt5-xxl-enc-bf16.pth"
    torch.save({k: v for k, v in text_encoder().items() if k != "blocks.1.attn.q.weight"}, file)
    assert "1 missing (blocks.1.attn.q.weight)" in refusal(ModelFolder.open(path).text_encoder.tensors)
    torch.save(vae(), file)
    assert "expected a umT5 text encoder, found the Wan2.1 VAE" in refusal(ModelFolder.open(path).text_encoder.tensors)


def test_token_table_under_two_names(folders: Callable[[str], Path]) -> None:
    path = folders("diffusers")
    for shard in (path / "text_encoder").glob("model*"):
        shard.unlink()
    file = path / "text_encoder" / "model.safetensors"
    tensors = {TEXT_ENCODER_NAMES[name]: tensor for name, tensor in text_encoder().items()}
    table = tensors["shared.weight"]

    save_file(tensors | {"encoder.embed_tokens.weight": table.clone()}, file)
    assert_same(ModelFolder.open(path).text_encoder.tensors(), text_encoder())
    for other in (table + 1, table.half(), table[1:].clone()):
        save_file(tensors | {"encoder.embed_tokens.weight": other}, file)
        assert "to be one table" in refusal(ModelFolder.open(path).text_encoder.tensors)
    del tensors["shared.weight"]
    save_file(tensors | {"encoder.embed_tokens.weight": table}, file)
    assert_same(ModelFolder.open(path).text_encoder.tensors(), text_encoder())


def test_what_another_decoder_of_the_latents_has_to_know(folders: Callable[[str], Path]) -> None:
    """Without the VAE, and without a look at its weights; only diffusers' folder has a config that may say it."""
    original, diffusers = folders("original"), folders("diffusers")
    (original / "Wan2.1_VAE.pth").write_bytes(b"cut off")
    assert ModelFolder.open(original).latents_config() == VaeConfig()
    edit(diffusers / "vae" / "config.json", latents_mean=[0.5] * VAE.z_dim)
    for weights in (diffusers / "vae").glob("diffusion*"):
        weights.unlink()
    assert ModelFolder.open(diffusers).latents_config() == dataclasses.replace(VAE, latents_mean=(0.5,) * VAE.z_dim)
    shutil.rmtree(diffusers / "vae")
    assert ModelFolder.open(diffusers).latents_config() == VaeConfig()


def test_folders_that_the_libraries_write(tmp_path: Path) -> None:
    """Configs and weights as diffusers and transformers save them, sharded."""
    diffusers = pytest.importorskip("diffusers")
    from transformers import UMT5Config, UMT5EncoderModel

    diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, ffn_dim=40, freq_dim=16, num_layers=2, text_dim=20
    ).save_pretrained(tmp_path / "transformer", max_shard_size="20KB")
    diffusers.AutoencoderKLWan(base_dim=4).save_pretrained(tmp_path / "vae")
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=50, d_model=20, d_kv=6, d_ff=28, num_heads=4, num_layers=2))
    encoder.save_pretrained(tmp_path / "text_encoder", max_shard_size="8KB")

    folder = ModelFolder.open(tmp_path)
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    assert folder.transformer.config() == dataclasses.replace(TRANSFORMER, text_len=512)
    assert folder.vae.config() == VAE
    assert folder.text_encoder.config() == TEXT_ENCODER
    assert set(folder.transformer.tensors()) == set(transformer())
    assert set(folder.vae.tensors()) == set(vae())
    weights = folder.text_encoder.tensors()
    assert torch.equal(weights["token_embedding.weight"], encoder.shared.weight)


def test_vae_of_the_golden_bundle(tmp_path: Path, golden_dir: Path) -> None:
    tensors = load_file(golden_dir / "vae" / "weights.safetensors")
    torch.save(tensors, tmp_path / "Wan2.1_VAE.pth")
    folder = ModelFolder.open(tmp_path)
    assert folder.vae.config() == VaeConfig.from_flat(json.loads((golden_dir / "vae" / "config.json").read_text()))
    assert_same(folder.vae.tensors(), tensors)
