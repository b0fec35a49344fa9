"""Generator checkpoints of every shape in which they are published, and the choice between their parts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from random_weights import MODEL, TRANSFORMER, assert_same, memory, random_tensors, transformer
from safetensors.torch import load_file, save_file
from torch import Tensor

from echo_rt.config import MemoryConfig, ModelConfig
from echo_rt.errors import WeightsError
from echo_rt.weights.generator import check_memory, load_generator
from echo_rt.weights.shapes import MEMORY_PREFIX, memory_config_of, memory_shapes, transformer_shapes

EMA_SEED, EMA_MEMORY_SEED = 5, 105


def keys(tensors: Mapping[str, Tensor], memory_tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """A trained object's state dict: the transformer is its attribute ``model``, the memory encoder part of that."""
    named = {f"model.{name}": tensor for name, tensor in tensors.items()}
    return named | {f"model.{MEMORY_PREFIX}{name}": tensor for name, tensor in (memory_tensors or {}).items()}


def plain() -> dict[str, Tensor]:
    return keys(transformer(), memory())


def averaged(with_memory: bool = True) -> dict[str, Tensor]:
    return keys(transformer(EMA_SEED), memory(EMA_MEMORY_SEED) if with_memory else None)


def fsdp(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As FSDP saves it: a wrapper around the model, around every block, and around the memory encoder."""
    renamed = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if parts[1] == "blocks":
            parts.insert(3, "_fsdp_wrapped_module")
        if parts[1] == "query_memory_encoder":
            parts.insert(2, "_fsdp_wrapped_module")
        renamed[".".join([parts[0], "_fsdp_wrapped_module", *parts[1:]])] = tensor
    return renamed


def refusal(read: Callable[[], Any]) -> str:
    with pytest.raises(WeightsError) as caught:
        read()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint.pt"


@pytest.mark.parametrize("wrap", [dict, fsdp])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_echo_infinity(tmp_path: Path, wrap: Callable[[Mapping[str, Tensor]], dict[str, Tensor]], suffix: str) -> None:
    path = tmp_path / f"echo_infinity{suffix}"
    parts = {"generator": wrap(plain()), "generator_ema": wrap(averaged())}
    if suffix == ".pt":
        torch.save(parts | {"step": 900, "critic": {"model.w": torch.ones(2)}}, path)
    else:
        save_file({f"{part}.{name}": t for part, tensors in parts.items() for name, t in tensors.items()}, path)
    for ema in (None, True):
        loaded = load_generator(path, TRANSFORMER, ema=ema)
        assert loaded.ema is True
        assert_same(loaded.transformer, transformer(EMA_SEED))
        assert loaded.memory is not None
        assert_same(loaded.memory, memory(EMA_MEMORY_SEED))
    loaded = load_generator(str(path), TRANSFORMER, ema=False)
    assert loaded.ema is False
    assert_same(loaded.transformer, transformer())
    assert loaded.memory is not None
    assert_same(loaded.memory, memory())


def test_average_without_memory_takes_that_of_the_generator(checkpoint: Path) -> None:
    saved(checkpoint, {"generator": plain(), "generator_ema": averaged(with_memory=False)})
    loaded = load_generator(checkpoint, TRANSFORMER, ema=True)
    assert loaded.ema is True
    assert_same(loaded.transformer, transformer(EMA_SEED))
    assert loaded.memory is not None
    assert_same(loaded.memory, memory())


def test_average_asked_for_and_missing(checkpoint: Path) -> None:
    saved(checkpoint, {"generator": plain()})
    assert load_generator(checkpoint, TRANSFORMER).ema is False
    message = refusal(lambda: load_generator(checkpoint, TRANSFORMER, ema=True))
    assert message == f"{checkpoint}: expected generator_ema, which was asked for, found generator"
    saved(checkpoint, plain())
    assert "found neither" in refusal(lambda: load_generator(checkpoint, TRANSFORMER, ema=True))


def test_average_only(checkpoint: Path) -> None:
    saved(checkpoint, {"generator_ema": averaged()})
    assert load_generator(checkpoint, TRANSFORMER).ema is True
    message = refusal(lambda: load_generator(checkpoint, TRANSFORMER, ema=False))
    assert "expected generator, which was asked for, found generator_ema" in message


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("with_memory", [True, False])
def test_bare_tensors(checkpoint: Path, prefix: str, with_memory: bool) -> None:
    content = keys(transformer(), memory() if with_memory else None)
    saved(checkpoint, {prefix + name.removeprefix("model."): tensor for name, tensor in content.items()})
    loaded = load_generator(checkpoint, TRANSFORMER)
    assert loaded.ema is None
    assert_same(loaded.transformer, transformer())
    if with_memory:
        assert loaded.memory is not None
        assert_same(loaded.memory, memory())
    else:
        assert loaded.memory is None


def test_kin_without_memory(checkpoint: Path) -> None:
    """Self-Forcing, Causal-Forcing, LongLive."""
    saved(checkpoint, {"generator": keys(transformer()), "generator_ema": fsdp(averaged(with_memory=False))})
    loaded = load_generator(checkpoint, TRANSFORMER)
    assert loaded.memory is None
    assert_same(loaded.transformer, transformer(EMA_SEED))


def test_golden_weights_load_as_a_checkpoint(golden_dir: Path) -> None:
    bundle = golden_dir / "rollout_small"
    config = ModelConfig.from_flat(json.loads((bundle / "config.json").read_text()))
    loaded = load_generator(bundle / "weights.safetensors", config.transformer)
    weights = load_file(bundle / "weights.safetensors")
    assert_same(loaded.transformer, {k: v for k, v in weights.items() if not k.startswith(MEMORY_PREFIX)})
    assert loaded.memory is not None
    assert memory_config_of(loaded.memory, "here") == (18, MemoryConfig(layers=2, normalize_k=False, ffn_multiplier=4))
    check_memory(loaded.memory, config, "golden")


def test_one_tensor_too_many_or_too_few(checkpoint: Path) -> None:
    saved(checkpoint, {"generator": plain() | {"model.blocks.0.extra": torch.ones(1)}})
    message = refusal(lambda: load_generator(checkpoint, TRANSFORMER))
    assert f"{checkpoint} (generator): expected" in message and "1 surplus (blocks.0.extra)" in message
    saved(checkpoint, {"generator": {k: v for k, v in plain().items() if k != "model.head.modulation"}})
    assert "1 missing (head.modulation)" in refusal(lambda: load_generator(checkpoint, TRANSFORMER))
    wrapped = {"model.head._fsdp_wrapped_module.modulation": torch.ones(1, 2, TRANSFORMER.dim)}
    saved(checkpoint, {"generator": plain() | wrapped})
    assert "expected head.modulation once" in refusal(lambda: load_generator(checkpoint, TRANSFORMER))


def test_checkpoint_of_another_model(checkpoint: Path) -> None:
    wide = dataclasses.replace(TRANSFORMER, dim=48)
    saved(checkpoint, {"generator": keys(random_tensors(transformer_shapes(wide)))})
    message = refusal(lambda: load_generator(checkpoint, TRANSFORMER))
    assert "expected a transformer 24 wide with 2 blocks, found one 48 wide with 2" in message
    deep = dataclasses.replace(TRANSFORMER, num_layers=3)
    saved(checkpoint, {"generator": keys(random_tensors(transformer_shapes(deep)))})
    assert "24 wide with 2 blocks, found one 24 wide with 3" in refusal(lambda: load_generator(checkpoint, TRANSFORMER))
    saved(checkpoint, {"encoder.conv1.weight": torch.ones(2)})
    assert "found 1 tensor (encoder.conv1.weight)" in refusal(lambda: load_generator(checkpoint, TRANSFORMER))
    saved(checkpoint, {"patch_embedding.weight": torch.tensor(1.0)})
    message = refusal(lambda: load_generator(checkpoint, TRANSFORMER))
    assert "5-dimensional patch_embedding.weight" in message and message.startswith(f"{checkpoint}: "), "it is the file"


def test_lora_is_no_generator(checkpoint: Path) -> None:
    factor = {"base_model.model.blocks.0.self_attn.q.lora_A.weight": torch.ones(2, 24)}
    for content in ({"generator_lora": factor}, factor):
        saved(checkpoint, content)
        assert "expected a whole generator, found a LoRA" in refusal(lambda: load_generator(checkpoint, TRANSFORMER))


@pytest.mark.parametrize("normalize_k", [True, False])
def test_memory_facts(normalize_k: bool) -> None:
    config = dataclasses.replace(
        MODEL, memory=MemoryConfig(frames=3, layers=4, normalize_k=normalize_k, ffn_multiplier=2)
    )
    tensors = random_tensors(memory_shapes(config))
    assert memory_config_of(tensors, "here") == (
        18,
        MemoryConfig(layers=4, normalize_k=normalize_k, ffn_multiplier=2),
    )
    check_memory(tensors, config, "here")


def test_memory_for_another_video_size() -> None:
    larger = dataclasses.replace(MODEL, latent_height=8, latent_width=10)
    assert refusal(lambda: check_memory(memory(), larger, "echo.pt")) == (
        "echo.pt: expected a memory of 2 frames x 20 tokens = 40 tokens for latents of 10x8, "
        "found one of 12 tokens, made for another video size"
    )


def test_memory_of_another_shape() -> None:
    normalized = dataclasses.replace(MODEL, memory=MemoryConfig(frames=2, normalize_k=True))
    assert "1 missing (norm_k_out.weight)" in refusal(lambda: check_memory(memory(), normalized, "here"))
    deeper = dataclasses.replace(MODEL, memory=MemoryConfig(frames=2, layers=3))
    assert "layers.2.q.weight" in refusal(lambda: check_memory(memory(), deeper, "here"))
    for name, tensor, said in (
        ("query_init", None, "found no query_init"),
        ("query_init", torch.zeros(12, 24), "3-dimensional query_init, found shape [12, 24]"),
        ("query_init", torch.zeros(1, 0, 24), "found shape [1, 0, 24]"),
        ("layers.0.ffn.0.weight", None, "found no layers.0.ffn.0.weight"),
        ("layers.0.ffn.0.weight", torch.zeros(50, 24), "multiple of 24 channels, found 50"),
    ):
        tensors = {k: v for k, v in (memory() | {name: tensor}).items() if v is not None}
        assert said in refusal(lambda tensors=tensors: memory_config_of(tensors, "here"))
