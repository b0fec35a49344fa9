"""What a runtime is made of: checkpoints, LoRAs, overrides, the caller's torch settings, and where memory goes."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from streaming import PROMPT, embeds, load, same, take, video, without_recipe
from torch import Tensor

import echo_rt
from echo_rt.errors import ConfigError
from echo_rt.weights.folder import FolderPart, ModelFolder
from echo_rt.weights.parts import VAE
from echo_rt.weights.tiny_model import CHECKPOINT_FILE

MEMORY = "query_memory_encoder."
Tensors = dict[str, Tensor]


def checkpoint_of(folder: Path) -> tuple[Tensors, Tensors]:
    """The transformer and memory encoder that the folder's recipe takes of the checkpoint, under bare names."""
    content = torch.load(folder / CHECKPOINT_FILE, weights_only=True)["generator"]
    bare = {name.removeprefix("model."): tensor for name, tensor in content.items()}
    memory = {name.removeprefix(MEMORY): tensor for name, tensor in bare.items() if name.startswith(MEMORY)}
    return {name: tensor for name, tensor in bare.items() if not name.startswith(MEMORY)}, memory


def saved(path: Path, transformer: Tensors, memory: Tensors | None = None) -> Path:
    tensors = transformer | {MEMORY + name: tensor for name, tensor in (memory or {}).items()}
    torch.save({"generator": {f"model.{name}": tensor for name, tensor in tensors.items()}}, path)
    return path


# ---------------------------------------------------------------- LoRA

ALPHA, RANK = 4, 2


def factors(transformer: Tensors) -> tuple[Tensors, Tensors]:
    """A LoRA's tensors under PEFT's keys, and the transformer it makes.

    The factors are small multiples of a power of two, so their products are exact, and so is the sum in float32.
    """
    generator = torch.Generator().manual_seed(3)
    lora, merged = {}, dict(transformer)
    for module in ("blocks.0.self_attn.q", "blocks.1.ffn.0", "blocks.1.cross_attn.v", "blocks.2.self_attn.o"):
        weight = transformer[f"{module}.weight"]
        down = torch.randint(-3, 4, (RANK, weight.shape[1]), generator=generator) / 32
        up = torch.randint(-3, 4, (weight.shape[0], RANK), generator=generator) / 32
        lora[f"base_model.model.{module}.lora_A.weight"] = down
        lora[f"base_model.model.{module}.lora_B.weight"] = up
        merged[f"{module}.weight"] = (weight.double() + ALPHA / RANK * (up.double() @ down.double())).float()
    return lora, merged


@pytest.mark.parametrize(
    ("in_checkpoint", "in_lora"),
    [(True, True), (True, False), (False, True)],
    ids=["both", "checkpoint", "lora"],
)
def test_a_lora_and_its_memory_encoder_make_the_video(
    small_model: Path, tmp_path: Path, in_checkpoint: bool, in_lora: bool
) -> None:
    """The LoRA's own memory encoder wins over the checkpoint's; without one the checkpoint's stays."""
    transformer, memory = checkpoint_of(small_model)
    low_rank, merged = factors(transformer)
    retrained = {name: tensor if "norm" in name else 1.5 * tensor for name, tensor in memory.items()}
    base = saved(tmp_path / "base.pt", transformer, memory if in_checkpoint else None)
    content: dict[str, Any] = {"generator_lora": low_rank, "alpha": ALPHA}
    if in_lora:
        content["query_memory_encoder"] = retrained
    torch.save(content, tmp_path / "lora.pt")
    expected_memory = retrained if in_lora else memory
    by_hand = saved(tmp_path / "merged.pt", merged, expected_memory)

    with load(small_model, checkpoint=base, lora=tmp_path / "lora.pt") as runtime:
        assert runtime.memory is echo_rt.MemoryMode.EVOLVE
        made = video(runtime, 6)
    with load(small_model, checkpoint=by_hand) as runtime:
        assert same(made, video(runtime, 6))
    with load(small_model, checkpoint=base) as runtime:
        plain = video(runtime, 1)
    assert not torch.equal(made[0].latents, plain[0].latents), "the LoRA changes nothing"
    if in_lora and in_checkpoint:
        with load(small_model, checkpoint=saved(tmp_path / "old.pt", merged, memory)) as runtime:
            assert not same(made, video(runtime, 6)), "the LoRA's memory encoder changes nothing"


def test_a_snapshot_knows_the_strengths_of_its_loras(small_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "lora.pt"
    torch.save({"generator_lora": factors(checkpoint_of(small_model)[0])[0]}, path)
    loras = [path, (path, -0.5)]
    with (
        load(small_model, lora=loras, lora_alpha=ALPHA) as runtime,
        runtime.stream(prompt_embeds=embeds(runtime)) as stream,
    ):
        take(stream, 1)
        snapshot = stream.snapshot()
        after = take(stream, 1)
    with load(small_model, lora=loras, lora_alpha=ALPHA) as runtime, runtime.resume(snapshot) as stream:
        assert same(take(stream, 1), after)
    said = "weights of the transformer are not those of the snapshot"
    for strength in (0.5, 1.0):
        with (
            load(small_model, lora=[(path, strength)], lora_alpha=ALPHA) as runtime,
            pytest.raises(echo_rt.StreamError, match=said),
        ):
            runtime.resume(snapshot)


def test_a_lora_is_merged_in_float32_whatever_its_process_allows(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TF32 is a switch of the process: where it matters, float32 has to be among the dtypes that are computed in."""
    low_rank, _ = factors(checkpoint_of(small_model)[0])
    torch.save({"generator_lora": low_rank, "alpha": ALPHA}, tmp_path / "lora.pt")
    inside: list[tuple[torch.dtype, ...]] = []
    products: list[bool] = []
    model_context, addmm = echo_rt.engine.engine.model_context, torch.addmm

    @contextlib.contextmanager
    def noted(device: torch.device, *dtypes: torch.dtype) -> Iterator[None]:
        inside.append(dtypes)
        with model_context(device, *dtypes):
            yield
        inside.pop()

    def product(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        products.append(any(torch.float32 in dtypes for dtypes in inside))
        return addmm(*tensors, **options)

    monkeypatch.setattr(echo_rt.engine.engine, "model_context", noted)
    monkeypatch.setattr(torch, "addmm", product)
    load(small_model, lora=tmp_path / "lora.pt", dtype="bfloat16").close()
    assert len(products) == len(low_rank) // 2 and all(products)


# ---------------------------------------------------------------- what the weights and overrides say


def test_a_checkpoint_without_memory_runs_without(small_model: Path, tmp_path: Path) -> None:
    """Self-Forcing and its kin."""
    transformer, _ = checkpoint_of(small_model)
    path = saved(tmp_path / "self_forcing.pt", transformer)
    with load(small_model, checkpoint=path) as runtime:
        assert runtime.memory is echo_rt.MemoryMode.OFF and runtime.config.memory is None
        made = video(runtime, 6)
    assert not any(chunk.stats.memory_attended for chunk in made)
    with load(small_model, memory="off") as runtime:  # the same transformer, its memory encoder left out
        assert same(made, video(runtime, 6))
    for mode in ("evolve", "prior"):
        with pytest.raises(ConfigError, match=rf"'{mode}' needs a memory encoder, and .*self_forcing\.pt has none"):
            load(small_model, checkpoint=path, memory=mode)


@pytest.mark.parametrize("normalize_k", [False, True])
@pytest.mark.parametrize("override", [None, False, True])
def test_the_memory_is_rebuilt_on_a_switch_unless_its_keys_are_normalized(
    small_model: Path, tmp_path: Path, normalize_k: bool, override: bool | None
) -> None:
    """In a folder that was written before there were recipes."""
    folder = without_recipe(small_model, tmp_path / "old")
    transformer, memory = checkpoint_of(small_model)
    if normalize_k:
        memory["norm_k_out.weight"] = torch.ones(memory["to_k.weight"].shape[0], dtype=torch.bfloat16)
    path = saved(tmp_path / "generator.pt", transformer, memory)
    overrides = {} if override is None else {"rebuild_on_prompt_switch": override}
    with load(folder, checkpoint=path, overrides=overrides) as runtime:
        assert runtime.config.memory is not None
        assert runtime.config.memory.normalize_k is normalize_k
        rebuilds = (not normalize_k) if override is None else override
        assert runtime.config.memory.rebuild_on_prompt_switch is rebuilds


def test_one_frame_blocks_with_one_memory_frame(small_model: Path, tmp_path: Path) -> None:
    transformer, memory = checkpoint_of(small_model)
    per_frame = memory["query_init"].shape[1] // 3
    memory["query_init"] = memory["query_init"][:, :per_frame].contiguous()
    path = saved(tmp_path / "generator.pt", transformer, memory)
    overrides = {"frames_per_block": 1, "memory_frames": 1, "sink_frames": 2, "local_frames": 3}
    with load(small_model, checkpoint=path, overrides=overrides) as runtime:
        assert runtime.config.memory_frames == 1 and runtime.config.memory_tokens == per_frame
        made = video(runtime, 9)
    assert [chunk.latents.shape[0] for chunk in made] == [1] * 9
    assert [chunk.frames.shape[0] for chunk in made] == [1] + [4] * 8
    assert [chunk.stats.memory_attended for chunk in made] == [False] * 5 + [True] * 4


def test_a_vae_of_other_latents_is_refused(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelFolder.open(small_model).vae.config()
    other = dataclasses.replace(config, z_dim=8, latents_mean=(0.0,) * 8, latents_std=(1.0,) * 8)
    read = FolderPart.config
    monkeypatch.setattr(FolderPart, "config", lambda self: other if self._part is VAE else read(self))
    with pytest.raises(ConfigError, match="the VAE has 8 latent channels, the transformer 16"):
        load(small_model)


# ---------------------------------------------------------------- the caller's torch


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


CALLERS: dict[str, Any] = {
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
}


@pytest.fixture(scope="module")
def plain(runtime: echo_rt.Runtime) -> list[echo_rt.Chunk]:
    return switched_video(runtime)


def switched_video(runtime: echo_rt.Runtime) -> list[echo_rt.Chunk]:
    with runtime.stream(PROMPT, seed=6) as stream:
        chunks = take(stream, 5)
        stream.set_prompt(prompt_embeds=embeds(runtime, 1))
        chunks += take(stream, 1)
        snapshot = stream.snapshot()
    with runtime.resume(snapshot) as stream:
        return chunks + take(stream, 1)


@pytest.mark.parametrize("when", ["load", "stream"])
@pytest.mark.parametrize("caller", CALLERS)
def test_the_callers_torch_settings_do_not_matter(
    small_model: Path, runtime: echo_rt.Runtime, plain: list[echo_rt.Chunk], caller: str, when: str
) -> None:
    with contextlib.ExitStack() as stack:
        mode = CALLERS[caller]
        if when == "load":
            with mode():
                runtime = stack.enter_context(load(small_model))
            made = switched_video(runtime)
        else:
            with mode():
                made = switched_video(runtime)
    assert same(made, plain)
    assert not any(chunk.latents.requires_grad or chunk.latents.is_inference() for chunk in made)


def test_embeddings_that_need_gradients_are_taken_without(runtime: echo_rt.Runtime) -> None:
    expected = video(runtime, 2)
    with torch.enable_grad(), runtime.stream(prompt_embeds=embeds(runtime).requires_grad_()) as stream:
        made = take(stream, 2)
    assert same(made, expected) and not made[0].latents.requires_grad


def test_embeddings_are_copied(runtime: echo_rt.Runtime) -> None:
    expected = video(runtime, 2, prompt=1)
    with runtime.stream(prompt_embeds=embeds(runtime)) as stream:
        mine = embeds(runtime, 1)
        stream.set_prompt(prompt_embeds=mine)
        mine.fill_(float("nan"))
        assert same(take(stream, 2), expected)


# ---------------------------------------------------------------- memory given back


def big_tensors(runtime: echo_rt.Runtime) -> dict[str, weakref.ref[Tensor]]:
    """A tensor of each kind that a runtime holds, without holding it."""
    engine = runtime._engine
    assert engine is not None
    held = {
        "cache": engine.rollout.state.kv,
        "matrix": engine.rollout._transformer.layers[0].qkv.weight,
        "modulations": engine.rollout._transformer.modulations,
        "memory": engine.rollout._memory.query_init,  # type: ignore[union-attr]
        "decoder": engine.pipeline.decoder_state.windows.room,
    }
    return {name: weakref.ref(tensor) for name, tensor in held.items()}


@contextlib.contextmanager
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("by", ["close", "drop"])
def test_nothing_of_a_runtime_is_kept(small_model: Path, by: str) -> None:
    """Closed, its tensors go although names of runtime and stream stay; dropped, without the garbage collector."""
    runtime: echo_rt.Runtime | None = load(small_model)
    assert runtime is not None
    stream: echo_rt.Stream | None = runtime.stream(PROMPT)
    assert stream is not None
    for index, _ in enumerate(stream):
        if index == 1:
            break
    snapshot = stream.snapshot()
    held = big_tensors(runtime)
    assert all(ref() is not None for ref in held.values())
    with no_collector():
        if by == "close":
            runtime.close()
            assert stream.closed
        else:
            runtime = stream = None
        assert [name for name, ref in held.items() if ref() is not None] == []
    assert snapshot.block == 1


def test_a_closed_stream_holds_nothing(small_model: Path) -> None:
    runtime = load(small_model)
    stream = runtime.stream(PROMPT)
    next(stream)
    stream.close()
    held = big_tensors(runtime)
    with no_collector():
        del runtime
        assert [name for name, ref in held.items() if ref() is not None] == []
    assert stream.next_block == 1


def test_the_callers_default_device_is_left_out_of_it(small_model: Path) -> None:
    with load(small_model) as runtime, runtime.stream(PROMPT) as stream:
        expected = next(stream)
    torch.set_default_device("meta")
    try:
        with load(small_model) as runtime, runtime.stream(PROMPT) as stream:
            made = next(stream)
    finally:
        torch.set_default_device(None)
    assert torch.equal(made.latents, expected.latents)
