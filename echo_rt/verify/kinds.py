"""What each kind of golden bundle computes, with the code that ``generate`` uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from echo_rt.attention import attentions
from echo_rt.config import ModelConfig, TextEncoderConfig, VaeConfig
from echo_rt.engine.build import ModelTensors, Networks, build_rollout
from echo_rt.engine.executor import Executor, make_executor
from echo_rt.engine.prompts import check_prompt_embeds
from echo_rt.model.text import TextEncoder
from echo_rt.model.vae_encoder import VaeEncoder
from echo_rt.ops.backends import Backend, choose_backend, load_ops
from echo_rt.options import MemoryMode, RuntimeOptions
from echo_rt.runtime import Runtime
from echo_rt.utils.device import model_context, working_dtype
from echo_rt.verify.decoder import Decoding, Precision
from echo_rt.verify.folder import RECIPE, Bundle
from echo_rt.weights.choice import Taken
from echo_rt.weights.fingerprint import FingerprintedTensors
from echo_rt.weights.shapes import MEMORY_PREFIX, memory_shapes, text_encoder_shapes, transformer_shapes, vae_shapes


class Computed(NamedTuple):
    """The computed tensors on the host, the backend that was used, and for a VAE its video in lower precisions."""

    tensors: dict[str, Tensor]
    backend: Backend
    precisions: tuple[Precision, ...] = ()
    taken: Taken | None = None


def _rollout(bundle: Bundle) -> Computed:
    """``latents.b``, ``memory_state.b`` and the expected ``flow.b.step`` of every block b."""
    executor = make_executor(bundle.device, bundle.graphs)
    try:
        with model_context(bundle.device, bundle.dtype):
            return _run_rollout(bundle, executor)
    finally:
        executor.close()


def _run_rollout(bundle: Bundle, executor: Executor) -> Computed:
    config, dtype = ModelConfig.from_flat(bundle.config), working_dtype(bundle.dtype)
    memory = None if config.memory is None else (dtype, config.transformer.head_dim)
    backend = choose_backend(bundle.backend, bundle.device, memory=memory)
    shapes = {MEMORY_PREFIX + name: shape for name, shape in memory_shapes(config).items()}
    weights = bundle.weights(transformer_shapes(config.transformer) | shapes)
    own = {name.removeprefix(MEMORY_PREFIX): weights[name] for name in shapes if config.memory is not None}
    networks = Networks(
        config,
        ModelTensors(weights, FingerprintedTensors(own, weights.source)),
        RuntimeOptions(device=bundle.device, dtype=bundle.dtype, float8_except=bundle.float8_except),
        backend,
        attention=attentions(config, bundle.device, dtype, backend.ops, cache=None),
    )
    mode = MemoryMode.OFF if config.memory is None else MemoryMode.EVOLVE
    rollout = build_rollout(config, networks, mode, executor)
    blocks, switches = bundle.script()
    actual: dict[str, Tensor] = {}

    def keep_flow(block: int, step: int, flow: Tensor) -> None:
        if f"flow.{block}.{step}" in bundle.expected:
            with executor.eager():
                actual[f"flow.{block}.{step}"] = flow.to("cpu", torch.float32, copy=True)

    def prompt(number: int) -> Tensor:
        embeds = bundle.input(f"prompt_embeds.{number}").to(bundle.device)
        check_prompt_embeds(embeds, config.transformer.text_dim, config.transformer.text_len)
        return embeds

    # The rollout reads its inputs in its own queues: synchronize before they are freed.
    rollout.start(prompt(0))
    executor.synchronize()
    for block in range(blocks):
        for number, at in enumerate(switches, start=1):
            if at == block:
                rollout.switch_prompt(prompt(number))
                executor.synchronize()
        latents = rollout.next_block(bundle.noise(block, rollout.noise_shape).to(bundle.device), keep_flow)
        executor.synchronize()
        with executor.eager():
            actual[f"latents.{block}"] = latents.to("cpu", copy=True)
            if rollout.memory is not None:
                actual[f"memory_state.{block}"] = rollout.memory.to("cpu", torch.float32, copy=True)
    return Computed(actual, backend)


def _vae(bundle: Bundle) -> Computed:
    """``video`` of given latents and ``encoded`` of a given video, each if it is expected."""
    config, backend = VaeConfig.from_flat(bundle.config), choose_backend(bundle.backend, bundle.device)
    weights = bundle.weights(vae_shapes(config))
    actual: dict[str, Tensor] = {}
    precisions: tuple[Precision, ...] = ()
    if "video" in bundle.expected:
        latents = bundle.input("latents", rank=4).to(bundle.device)
        decoding = Decoding(config, weights, backend.ops, bundle.device, latents)
        # One at a time: the hardest case for the history.
        actual["video"] = decoding.video(bundle.dtype, [1] * len(latents)).permute(0, 3, 1, 2)
        precisions = decoding.precisions()
    if "encoded" in bundle.expected:
        with model_context(bundle.device, bundle.dtype):
            encoder = VaeEncoder(config, weights, device=bundle.device, dtype=bundle.dtype)
            actual["encoded"] = encoder.encode(bundle.input("video", rank=4).to(bundle.device)).float().cpu()
    return Computed(actual, backend, precisions)


def _text_encoder(bundle: Bundle) -> Computed:
    """``prompt_embeds`` of given token ids."""
    config = TextEncoderConfig.from_flat(bundle.config)
    weights = bundle.weights(text_encoder_shapes(config))
    ids, mask = (bundle.input(name, rank=2).to(bundle.device) for name in ("input_ids", "attention_mask"))
    backend = choose_backend(bundle.backend, bundle.device)
    with (
        model_context(bundle.device, bundle.dtype),
        TextEncoder(config, weights, None, text_len=ids.shape[1], device=bundle.device, dtype=bundle.dtype) as encoder,
    ):
        return Computed({"prompt_embeds": encoder.encode_ids(ids, mask).float().cpu()}, backend)


def _recipe(bundle: Bundle) -> Computed:
    """``latents.b`` of the first blocks, from published files through the public loader and a stream."""
    blocks, switches = bundle.script()
    initial = bundle.inputs.get("initial_latents")
    stride = VaeConfig().spatial_stride
    *_, rows, columns = bundle.input("noise.0", rank=4).shape
    with (
        Runtime.from_pretrained(
            bundle.path("model"),
            checkpoint=bundle.path("checkpoint"),
            lora=None if bundle.config.get("lora") is None else bundle.path("lora"),
            recipe=bundle.config["recipe"],
            overrides=bundle.config.get("overrides"),
            width=stride * columns,
            height=stride * rows,
            device=bundle.device,
            dtype=bundle.dtype,
            backend=bundle.backend,
            graphs=bundle.graphs,
            float8_except=bundle.float8_except,
        ) as runtime,
        runtime.stream(
            prompt_embeds=bundle.input("prompt_embeds.0"),
            noise=bundle.noise,
            initial_latents=initial,
            include_initial=initial is None,
        ) as stream,
    ):
        given = stream.next_block  # blocks of the given latents, which the bundle does not count
        for number, block in enumerate(switches, start=1):
            stream.set_prompt(prompt_embeds=bundle.input(f"prompt_embeds.{number}"), block=given + block)
        made = {f"latents.{block}": next(stream).latents for block in range(blocks)}
        return Computed(made, Backend(load_ops(runtime.backend), runtime.backend_reason), taken=runtime.taken)


RUN: dict[str, Callable[[Bundle], Computed]] = {
    "rollout": _rollout,
    "vae": _vae,
    "text_encoder": _text_encoder,
    RECIPE: _recipe,
}
