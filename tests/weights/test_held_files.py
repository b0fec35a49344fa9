"""The files of Wan2.1 that people hold: every variant against the plain one, put together to a model."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import refusals
from random_weights import (
    TEXT_ENCODER,
    TEXT_ENCODER_NAMES,
    TRANSFORMER,
    VAE,
    VAE_NAMES,
    assert_same,
    random_tensors,
    write_json,
)
from random_weights import text_encoder as plain_text_encoder
from random_weights import vae as plain_vae
from safetensors.torch import save_file
from streaming import load, same
from torch import Tensor

import echo_rt
from echo_rt.config import TransformerConfig
from echo_rt.errors import BackendError, WeightsError
from echo_rt.weights import gguf_files
from echo_rt.weights.files import open_tensors
from echo_rt.weights.folder import TEXT_ENCODER_FILE, TOKENIZER_FOLDER, VAE_FILE, ModelFolder
from echo_rt.weights.generator import load_generator
from echo_rt.weights.lora import merge_lora
from echo_rt.weights.shapes import names_of, text_encoder_modules, transformer_names, transformer_shapes

Tensors = dict[str, Tensor]
# As wide as one head of Wan2.1: no shape says how many there are.
ONE_HEAD = TransformerConfig(dim=128, ffn_dim=256, freq_dim=32, num_heads=1, num_layers=2, text_dim=64)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def plain_transformer() -> Tensors:
    return random_tensors(transformer_shapes(ONE_HEAD), 3)


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensors:
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def is_matrix(name: str, tensor: Tensor) -> bool:
    return name.endswith(".weight") and tensor.ndim == 2


def refusal(read: Callable[[], object]) -> str:
    with pytest.raises(WeightsError) as caught:
        read()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def model_of(path: Path, **parts: Path) -> ModelFolder:
    return ModelFolder.open(path, **parts)


# ---------------------------------------------------------------- float8: what is stored, and what it stands for


def cast_float8(tensors: Tensors, dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    stored = {name: t.to(dtype) if is_matrix(name, t) else t.half() for name, t in tensors.items()}
    return stored, {name: t.float() if t.dtype == dtype else t for name, t in stored.items()}


def scaled_float8(tensors: Tensors, old: bool, rows: bool) -> tuple[Tensors, Tensors]:
    stored: Tensors = {}
    expected: Tensors = {}
    for name, tensor in tensors.items():
        if not is_matrix(name, tensor):
            stored[name] = expected[name] = tensor.half()
            continue
        module = name.removesuffix(".weight")
        largest = tensor.abs().amax(dim=1, keepdim=True) if rows else tensor.abs().max()
        scale = largest / 448
        stored[name] = (tensor / scale).to(E4M3)
        expected[name] = stored[name].float() * scale
        stored[f"{module}.{'scale_weight' if old else 'weight_scale'}"] = scale
        stored[f"{module}.{'scale_input' if old else 'input_scale'}"] = torch.tensor(0.5)
        if not old:
            content = json.dumps({"format": "float8_e4m3fn"}).encode()
            stored[f"{module}.comfy_quant"] = torch.tensor(list(content), dtype=torch.uint8)
    return stored | ({"scaled_fp8": torch.zeros(2, dtype=E4M3)} if old else {}), expected


STORED: dict[str, Callable[[Tensors], tuple[Tensors, Tensors]]] = {
    "float32": lambda tensors: (tensors, tensors),
    "bf16": lambda tensors: (cast(tensors, torch.bfloat16),) * 2,
    "fp16": lambda tensors: (cast(tensors, torch.float16),) * 2,
    "fp8_e4m3fn": lambda tensors: cast_float8(tensors, E4M3),
    "fp8_e5m2": lambda tensors: cast_float8(tensors, E5M2),
    "fp8_scaled": lambda tensors: scaled_float8(tensors, old=True, rows=False),
    "fp8_scaled by rows": lambda tensors: scaled_float8(tensors, old=True, rows=True),
    "weight_scale": lambda tensors: scaled_float8(tensors, old=False, rows=False),
}
PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "state_dict.", "module.", "_orig_mod.", "model.model.")


def prefixed(tensors: Tensors, prefix: str) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_transformer(tmp_path: Path, stored: str, prefix: str) -> None:
    tensors, expected = STORED[stored](plain_transformer())
    path = tmp_path / "wan2.1_t2v_1.3B.safetensors"
    save_file(prefixed(tensors, prefix), path)
    assert model_of(path).transformer.config() == ONE_HEAD
    assert_same(model_of(path).transformer.tensors(), expected)
    # As a checkpoint it is the same transformer; and it is near the plain one.
    assert_same(load_generator(path, ONE_HEAD).transformer, expected)
    for name, tensor in plain_transformer().items():
        assert (expected[name].float() - tensor).norm() <= 0.1 * tensor.norm(), name


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("naming", ["wan", "diffusers"])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".bin"])
def test_wrappers_and_namings_of_a_transformer(tmp_path: Path, prefix: str, naming: str, suffix: str) -> None:
    tensors, path = plain_transformer(), tmp_path / f"transformer{suffix}"
    if naming == "diffusers":
        tensors = {transformer_names(ONE_HEAD.num_layers)[name]: tensor for name, tensor in tensors.items()}
    content = prefixed(tensors, prefix)
    save_file(content, path) if suffix == ".safetensors" else torch.save(content, path)
    assert_same(model_of(path).transformer.tensors(), plain_transformer())
    assert_same(load_generator(path, ONE_HEAD).transformer, plain_transformer())


def test_dicts_of_a_training_run(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4}]}
    for section in ("state_dict", "model", "module"):
        torch.save({section: prefixed(plain_transformer(), "model."), "optimizer": optimizer, "step": 3}, path)
        assert_same(model_of(path).transformer.tensors(), plain_transformer())
        assert_same(load_generator(path, ONE_HEAD).transformer, plain_transformer())


def transformers_names(tensors: Tensors) -> Tensors:
    return {TEXT_ENCODER_NAMES[name]: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("naming", ["wan", "transformers"])
def test_text_encoder(tmp_path: Path, stored: str, naming: str) -> None:
    """Kijai's files have Wan's names, ComfyUI's the library's, and a tokenizer among them."""
    tensors, expected = STORED[stored](plain_text_encoder())
    if naming == "transformers":
        scales = {name: t for name, t in tensors.items() if not name.endswith((".weight", "_fp8"))}
        names = {name: TEXT_ENCODER_NAMES[name.rpartition(".")[0] + ".weight"] for name in scales}
        moved = {names[n].removesuffix("weight") + n.rpartition(".")[2]: t for n, t in scales.items()}
        beside = {name: t for name, t in tensors.items() if name.endswith("_fp8")}
        weights = {name: t for name, t in tensors.items() if name.endswith(".weight")}
        tensors = transformers_names(weights) | moved | beside | {"spiece_model": torch.zeros(9, dtype=torch.uint8)}
    path = tmp_path / "umt5_xxl.safetensors"
    save_file(tensors, path)
    folder = model_of(tmp_path, text_encoder=path)
    assert folder.text_encoder.config() == TEXT_ENCODER
    widened = stored.startswith(("fp8", "weight_scale"))  # to bfloat16: no more room than the released file takes
    for name, tensor in folder.text_encoder.tensors().items():
        wide = widened and is_matrix(name, tensor)
        assert torch.equal(tensor, expected[name].bfloat16() if wide else expected[name]), name


@pytest.mark.parametrize("naming", ["wan", "diffusers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vae(tmp_path: Path, naming: str, dtype: torch.dtype) -> None:
    expected = cast(plain_vae(), dtype)
    path = tmp_path / "Wan2_1_VAE.safetensors"
    save_file({VAE_NAMES[n] if naming == "diffusers" else n: t for n, t in expected.items()}, path)
    for folder in (model_of(tmp_path), model_of(tmp_path, vae_file=path)):
        assert folder.vae.config() == VAE
        assert_same(folder.vae.tensors(), expected)


# ---------------------------------------------------------------- float8 that cannot be read


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scaled_fp8": torch.zeros(2, dtype=E4M3)}, "expected a scale for each weight of a scaled float8 file, found"),
        ({"m.scale_weight": torch.ones(2)}, "m.scale_weight to be one real number or one of each of 4 rows"),
        ({"m.scale_weight": torch.ones(4, dtype=torch.complex64)}, "rows, found [4] of complex64"),
        ({"m.weight_scale": torch.ones(2, 2)}, "m.weight_scale to be one real number or one of each of 4 rows"),
        ({"n.scale_weight": torch.ones(1)}, "expected n.weight in float8 beside n.scale_weight, found none"),
        ({"o.weight": torch.ones(2, 2), "o.scale_weight": torch.ones(1)}, "expected o.weight in float8"),
        ({"n.weight": torch.ones(2, 2).to(E4M3), "m.scale_weight": torch.ones(1)}, "found none for 1 (n.weight)"),
        ({"n.weight": torch.ones(2, 2).to(E4M3), "m.weight_scale": torch.ones(1)}, "found none for 1 (n.weight)"),
        ({"m.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)}, "ComfyUI's format 'nvfp4'"),
        ({"m.comfy_quant": torch.tensor(list(b"[1]"), dtype=torch.uint8)}, "to name a format as JSON"),
        (
            {"m.comfy_quant": torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)},
            "found none for 1 (m.weight)",
        ),
    ],
)
def test_scales_that_do_not_fit(tmp_path: Path, change: Tensors, said: str) -> None:
    save_file({"m.weight": torch.ones(4, 3).to(E4M3)} | change, tmp_path / "x.safetensors")
    assert said in refusal(lambda: open_tensors(tmp_path / "x.safetensors"))


# ---------------------------------------------------------------- GGUF


def k_blocks(values: Tensor, bits: int) -> tuple[np.ndarray, Tensor]:
    """Rows of a multiple of 256 values in Q4_K, Q5_K or Q6_K, and what they then are: whole steps of one size."""
    step = float(np.float16(0.25))
    half = 2 ** (bits - 1)
    whole = (values / step).round().clamp(-half, half - 1)
    q = (whole + half).numpy().astype(np.uint8).reshape(-1, 256)
    count = len(q)
    scale = np.full((count, 1), step, np.float16).view(np.uint8)
    if bits == 6:
        lanes = q.reshape(count, 2, 4, 32)  # of 128 values: four lanes, two in each half of a byte
        low = lanes & 15
        ql = (low[:, :, :2] | low[:, :, 2:] << 4).reshape(count, 128)
        qh = sum((lanes[:, :, lane] >> 4) << 2 * lane for lane in range(4)).reshape(count, 64)
        blocks = np.concatenate([ql, qh, np.ones((count, 16), np.uint8), scale], axis=1)
    else:
        # Of each of eight parts the scale is 1 and the minimum that is taken off ``half``, in six bits each.
        parts = [1] * 4 + [half] * 4 + [1 | half % 16 << 4] * 4
        if half > 15:
            parts[4:8] = [half % 64 | (half >> 4) << 6] * 4
        lanes = q.reshape(count, 4, 2, 32)
        qs = (lanes[:, :, 0] & 15 | (lanes[:, :, 1] & 15) << 4).reshape(count, 128)
        qh = sum((q.reshape(count, 8, 32)[:, part] >> 4) << part for part in range(8))
        middle = [qh] if bits == 5 else []
        scales = np.tile(np.array(parts, np.uint8), (count, 1))
        blocks = np.concatenate([scale, scale, scales, *middle, qs], axis=1)
    return blocks.astype(np.uint8).reshape(*values.shape[:-1], -1), whole * step


def write_gguf(path: Path, tensors: Tensors, kind: str, architecture: str = "wan") -> Tensors:
    """A file with ``tensors``, matrices in ``kind`` where their rows are long enough; returns what they then are."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    expected = {}
    for name, tensor in tensors.items():
        if kind.endswith("_K") and is_matrix(name, tensor) and tensor.shape[1] % 256 == 0:
            data, expected[name] = k_blocks(tensor, int(kind[1]))
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
        elif kind == "Q8_0" and is_matrix(name, tensor) and tensor.shape[1] % 32 == 0:
            data = gguf.quants.quantize(tensor.numpy(), gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            rows = tensor.reshape(len(tensor), -1, 32)
            step = (rows.abs().amax(dim=2, keepdim=True) / 127).half().float()
            expected[name] = ((rows / (rows.abs().amax(dim=2, keepdim=True) / 127)).round() * step).reshape(
                tensor.shape
            )
        elif kind == "BF16":
            expected[name] = tensor.bfloat16()
            writer.add_tensor(name, expected[name].view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            expected[name] = tensor.half() if kind == "F16" or (kind.endswith("_K") and tensor.ndim > 1) else tensor
            writer.add_tensor(name, expected[name].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


KINDS = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K")


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_transformer(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "Wan2.1-T2V-1.3B.gguf"
    expected = write_gguf(path, plain_transformer(), kind)
    folder = model_of(path)
    assert folder.transformer.config() == ONE_HEAD
    for name, tensor in folder.transformer.tensors().items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.allclose(tensor.float(), expected[name].float(), rtol=0, atol=1e-6), name
        assert torch.equal(tensor, expected[name]) or kind == "Q8_0", name
        assert (tensor.float() - plain_transformer()[name]).norm() <= 0.2 * plain_transformer()[name].norm(), name


def test_gguf_text_encoder(tmp_path: Path) -> None:
    names = names_of(text_encoder_modules(TEXT_ENCODER), TEXT_ENCODER.num_layers, layout=2)
    path = tmp_path / "umt5-xxl-encoder-F16.gguf"
    expected = write_gguf(path, {names[n]: t for n, t in plain_text_encoder().items()}, "F16", "t5encoder")
    folder = model_of(tmp_path)
    assert folder.text_encoder.config() == TEXT_ENCODER
    assert_same(folder.text_encoder.tensors(), {name: expected[other] for name, other in names.items()})


def test_gguf_is_dequantized_when_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quants = pytest.importorskip("gguf").quants
    write_gguf(tmp_path / "x.gguf", plain_transformer(), "Q8_0")
    computed: list[int] = []
    dequantize = quants.dequantize
    monkeypatch.setattr(quants, "dequantize", lambda *args: computed.append(1) or dequantize(*args))
    tensors = model_of(tmp_path / "x.gguf").transformer.tensors()
    assert len(tensors) == len(plain_transformer()) and not computed
    # Nor to see whether a LoRA fits.
    factors = {"lora_A.weight": torch.ones(2, 128), "lora_B.weight": torch.ones(256, 2)}
    save_file({f"blocks.0.ffn.0.{name}": t for name, t in factors.items()}, tmp_path / "lora.safetensors")
    merged = merge_lora(tensors, tmp_path / "lora.safetensors").transformer
    assert not computed
    assert merged["blocks.0.ffn.0.weight"].shape == (256, 128) and len(computed) == 1
    computed.clear()
    whole = tensors["blocks.0.ffn.0.weight"]
    assert whole.dtype == torch.float32 and len(computed) == 1
    monkeypatch.setattr(gguf_files, "_VALUES_AT_ONCE", 1000)  # a few rows at a time
    assert torch.equal(tensors["blocks.0.ffn.0.weight"], whole) and len(computed) == 1 + -(-len(whole) // 7)


def test_gguf_shape_of_before(tmp_path: Path) -> None:
    """Converters reshape what no block divides, and note the shape."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "wan")
    writer.add_array("comfy.gguf.orig_shape.w", [2, 3, 2])
    writer.add_tensor("w", np.arange(12, dtype=np.float32).reshape(1, 12))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert torch.equal(open_tensors(tmp_path / "x.gguf")["w"], torch.arange(12.0).reshape(2, 3, 2))


def test_gguf_that_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path, {"w": torch.ones(4)}, "F32", "flux")
    assert "expected a GGUF file of Wan2.1 or umT5, found one of 'flux'" in refusal(lambda: open_tensors(path))
    write_gguf(path, {"w": torch.ones(4)}, "F32")
    assert "a Wan2.1 text-to-video transformer, found 1 tensor (w)" in refusal(model_of(path).transformer.tensors)
    whole = path.read_bytes()
    for length in (*range(4, 40), *range(40, len(whole) - 32, 7)):  # padding may lack
        path.write_bytes(whole[:length])
        assert "expected a GGUF file, found a damaged" in refusal(lambda: open_tensors(path)), length
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(BackendError, match=r"the package gguf .* found none \(pip install 'echo-rt\[gguf\]'\)"):
        open_tensors(path)


def test_flipped_bytes_of_gguf_are_refused_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path, {"a.weight": torch.ones(4, 32), "b": torch.ones(3)}, "Q8_0")
    assert refusals(path, 200) > 30


# ---------------------------------------------------------------- a model of single files


def comfy_folder(folder: Path, root: str = ".") -> Path:
    for sub, name, tensors in (
        (
            "diffusion_models",
            "wan2.1_t2v_1.3B_bf16.safetensors",
            prefixed(plain_transformer(), "model.diffusion_model."),
        ),
        ("text_encoders", "umt5_xxl_fp16.safetensors", transformers_names(plain_text_encoder())),
        ("vae", "wan_2.1_vae.safetensors", plain_vae()),
    ):
        path = folder / root / sub / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)
    write_json(folder / "tokenizer" / "tokenizer.json", {})
    return folder


@pytest.mark.parametrize("root", [".", "models", "split_files"])
def test_comfyui_folder(tmp_path: Path, root: str) -> None:
    folder = model_of(comfy_folder(tmp_path, root))
    assert folder.rollout_defaults() == {}
    assert folder.transformer.config() == ONE_HEAD
    assert_same(folder.transformer.tensors(), plain_transformer())
    assert_same(folder.vae.tensors(), plain_vae())
    assert_same(folder.text_encoder.tensors(), plain_text_encoder())
    assert folder.tokenizer_path() == tmp_path / "tokenizer"


def test_two_files_for_one_part(tmp_path: Path) -> None:
    folder = comfy_folder(tmp_path)
    shutil.copy(folder / "vae" / "wan_2.1_vae.safetensors", folder / "Wan2_1_VAE_bf16.safetensors")
    message = refusal(model_of(folder).vae.tensors)
    assert "found Wan2_1_VAE_bf16.safetensors, vae/wan_2.1_vae.safetensors; give the one to use as vae_file" in message
    assert_same(model_of(folder, vae_file=folder / "Wan2_1_VAE_bf16.safetensors").vae.tensors(), plain_vae())


def test_files_in_place_of_a_folders_own(tmp_path: Path) -> None:
    folder = comfy_folder(tmp_path)
    other = tmp_path / "other"
    save_file({name: tensor + 1 for name, tensor in plain_vae().items()}, other.with_suffix(".safetensors"))
    write_json(other / "tokenizer_config.json", {})
    model = model_of(folder, vae_file=other.with_suffix(".safetensors"), tokenizer=other)
    assert_same(model.vae.tensors(), {name: tensor + 1 for name, tensor in plain_vae().items()})
    assert model.tokenizer_path() == other
    assert "text_encoder: expected a file or folder, found none" in refusal(
        lambda: model_of(folder, text_encoder=tmp_path / "gone")
    )


@pytest.mark.parametrize(
    ("part", "names", "said"),
    [
        ("vae_file", ("token_embedding.weight",), "expected the Wan2.1 VAE, found a T5 text encoder"),
        ("text_encoder", ("encoder.downsamples.0.shortcut.bias",), "a umT5 text encoder, found the Wan2.1 VAE"),
        ("text_encoder", ("visual.proj",), "found a CLIP image encoder"),
        ("text_encoder", ("text_model.embeddings.weight",), "found a CLIP text encoder"),
        ("vae_file", ("decoder.1.weight",), "found a tiny decoder, which is given as the vae"),
        ("vae_file", ("encoder.conv1.weight", "encoder.downsamples.0.downsamples.0.a"), "found the VAE of Wan2.2 5B"),
        ("model", ("encoder.conv1.weight", "encoder.downsamples.0.a"), "transformer, found the Wan2.1 VAE"),
        ("model", ("patch_embedding.weight", "img_emb.proj.0.weight"), "found a Wan image-to-video transformer"),
        ("model", ("patch_embedding.weight", "vace_blocks.0.x"), "found a Wan VACE transformer"),
        ("model", ("double_blocks.0.x",), "found a transformer of Flux or HunyuanVideo"),
        ("model", ("blocks.0.self_attn.q.lora_A.weight",), "found a LoRA, which is given as the LoRA"),
        (
            "model",
            ("generator.model.patch_embedding.weight",),
            "found a generator checkpoint, which is given as the ch",
        ),
        ("model", ("patch_embedding.weight", "blocks.0.q.qweight"), "found weights quantized with GPTQ or AWQ"),
        ("model", ("ema.patch_embedding.weight", "ema.time_projection.1.bias"), "one whose names begin with 'ema.'"),
        (
            "vae_file",
            ("first_stage_model.encoder.conv1.weight", "first_stage_model.encoder.downsamples.0.a"),
            "expected the Wan2.1 VAE, found one whose names begin with 'first_stage_model.': take that off them",
        ),
    ],
)
def test_another_network_is_named(tmp_path: Path, part: str, names: tuple[str, ...], said: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file({name: torch.zeros(1) for name in names}, path)
    model = model_of(path) if part == "model" else model_of(comfy_folder(tmp_path), **{part: path})
    read = {"model": "transformer", "vae_file": "vae", "text_encoder": "text_encoder"}[part]
    assert said in refusal(getattr(model, read).tensors)


def test_t5_is_not_umt5(tmp_path: Path) -> None:
    tensors = transformers_names(plain_text_encoder())
    del tensors["encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"]
    save_file(tensors, tmp_path / "umt5_xxl.safetensors")
    assert "found a T5, with them in the first" in refusal(model_of(tmp_path).text_encoder.config)


def test_no_more_layers_than_the_file_holds(tmp_path: Path) -> None:
    """Neither a config nor names may ask for the names of layers that no tensors are of."""
    save_file(plain_transformer(), tmp_path / "diffusion_pytorch_model.safetensors")
    sizes = {"dim": 128, "ffn_dim": 256, "freq_dim": 32, "num_heads": 1, "num_layers": 1000, "text_dim": 64}
    write_json(tmp_path / "config.json", sizes)
    message = refusal(model_of(tmp_path).transformer.tensors)
    assert f"expected 27015 tensors, found {len(plain_transformer())}: 26946 missing (blocks.2.modulation" in message
    (tmp_path / "config.json").unlink()
    many = plain_transformer() | {f"blocks.{layer}.x": torch.zeros(1) for layer in range(2, 5000)}
    save_file(many, tmp_path / "diffusion_pytorch_model.safetensors")
    assert "num_layers must be a positive integer of at most 1024, got 5000" in refusal(
        model_of(tmp_path / "diffusion_pytorch_model.safetensors").transformer.tensors
    )


def test_a_config_beside_the_file_is_its_config(tmp_path: Path) -> None:
    save_file(random_tensors(transformer_shapes(TRANSFORMER)), tmp_path / "x.safetensors")
    assert "as wide as heads of 128" in refusal(model_of(tmp_path / "x.safetensors").transformer.config)
    write_json(tmp_path / "config.json", {"hidden_size": 3})  # of another model
    assert "as wide as heads of 128" in refusal(model_of(tmp_path / "x.safetensors").transformer.config)
    sizes = {"ffn_dim": 40, "freq_dim": 16, "num_layers": 2, "text_dim": 20, "text_len": 8}
    write_json(tmp_path / "config.json", sizes | {"dim": 24, "num_heads": 2})
    assert model_of(tmp_path / "x.safetensors").transformer.config() == TRANSFORMER
    diffusers = {"_class_name": "CausalWanTransformer3DModel", "num_attention_heads": 2, "attention_head_dim": 12}
    write_json(tmp_path / "config.json", sizes | diffusers | {"in_channels": 16})
    assert model_of(tmp_path / "x.safetensors").transformer.config() == TRANSFORMER


def test_video_of_single_files_is_that_of_the_folder(small_model: Path, tmp_path: Path) -> None:
    """Each part elsewhere, under another name or in another container; the prompt goes through the text encoder."""
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        shutil.copy(small_model / name, tmp_path / name)
    (tmp_path / "diffusion_pytorch_model.safetensors").rename(tmp_path / "wan.safetensors")
    encoder = torch.load(small_model / TEXT_ENCODER_FILE)
    save_file(transformers_names(encoder), tmp_path / "encoder")
    save_file(torch.load(small_model / VAE_FILE), tmp_path / "vae")
    shutil.copytree(small_model / TOKENIZER_FOLDER, tmp_path / "words")
    parts = {"text_encoder": tmp_path / "encoder", "tokenizer": tmp_path / "words", "vae_file": tmp_path / "vae"}

    def video(runtime: echo_rt.Runtime) -> list[echo_rt.Chunk]:
        with runtime, runtime.stream("a red fox", seed=1) as stream:
            return [next(stream) for _ in range(2)]

    checkpoint = small_model / "echo_infinity.pt"
    assert same(video(load(small_model)), video(load(tmp_path / "wan.safetensors", checkpoint=checkpoint, **parts)))


# ---------------------------------------------------------------- the Hugging Face cache


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with two snapshots of a model; main is the older."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    repository = tmp_path / "home" / "hub" / "models--Wan-AI--Wan2.1-T2V-1.3B"
    for name in ("a1", "b2"):
        comfy_folder(repository / "snapshots" / name)
    os.utime(repository / "snapshots" / "a1", (1, 1))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a1")
    return repository


def test_models_in_the_cache(cache: Path) -> None:
    for model in (cache, "Wan-AI/Wan2.1-T2V-1.3B", Path("Wan-AI/Wan2.1-T2V-1.3B")):
        assert ModelFolder.open(model).path == cache / "snapshots" / "a1"
    for reference in ("gone", "../../.."):
        (cache / "refs" / "main").write_text(reference)
        assert ModelFolder.open(cache).path == cache / "snapshots" / "b2"
    (cache / "refs" / "main").unlink()
    assert ModelFolder.open(cache).path == cache / "snapshots" / "b2"


def test_models_that_are_not_in_the_cache(cache: Path) -> None:
    message = refusal(lambda: ModelFolder.open("Wan-AI/Wan2.1-T2V-14B"))
    assert f"the Hugging Face cache {cache.parent}, found none" in message
    assert message.endswith("to download it: hf download Wan-AI/Wan2.1-T2V-14B")
    commands = ["hf download a/b c.pt", "hf download d/e"]
    message = refusal(lambda: ModelFolder.open("Wan-AI/Wan2.1-T2V-14B", downloads=commands))
    assert message.endswith("hf download Wan-AI/Wan2.1-T2V-14B && hf download a/b c.pt && hf download d/e")
    assert "does not exist" in refusal(lambda: ModelFolder.open("a/b/c"))
    shutil.rmtree(cache / "snapshots")
    assert "hf download Wan-AI/Wan2.1-T2V-1.3B" in refusal(lambda: ModelFolder.open("Wan-AI/Wan2.1-T2V-1.3B"))
