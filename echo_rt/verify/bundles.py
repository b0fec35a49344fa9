"""Golden bundles: run one through the code that ``generate`` uses, and hold every tensor against the published one.

A bundle is a folder with ``config.json`` (its ``kind`` says what it is), ``weights``, ``inputs`` and
``expected.safetensors``; one of kind ``recipe`` names files as they are published in the place of ``weights``. The
error of a tensor is ``‖actual - expected‖ / ‖expected‖``. Of a VAE it is also told how the video looks when it is
decoded in other precisions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from echo_rt.attention import attentions
from echo_rt.config import ModelConfig, TextEncoderConfig, VaeConfig
from echo_rt.engine.build import ModelTensors, Networks, build_rollout
from echo_rt.engine.executor import Executor, make_executor
from echo_rt.engine.prompts import check_prompt_embeds
from echo_rt.errors import EchoError, WeightsError
from echo_rt.model.text import TextEncoder
from echo_rt.model.vae_encoder import VaeEncoder
from echo_rt.ops.backends import Backend, choose_backend
from echo_rt.options import MemoryMode, RuntimeOptions
from echo_rt.utils.atomic_file import write_whole
from echo_rt.utils.device import FLOAT8, model_context, parse_device, parse_dtype, working_dtype
from echo_rt.verify.decoder import Decoding, Precision
from echo_rt.verify.recipe import RecipeBundle
from echo_rt.weights.choice import Taken
from echo_rt.weights.files import check_tensors, open_tensors
from echo_rt.weights.fingerprint import FingerprintedTensors
from echo_rt.weights.shapes import (
    MEMORY_PREFIX,
    Shapes,
    memory_shapes,
    text_encoder_shapes,
    transformer_shapes,
    vae_shapes,
)

# Largest error allowed in each dtype. float16 has eight times bfloat16's precision; its bound is tighter to match.
# float8 is that of a rollout's linear layers: where there are none, bfloat16's bound holds.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 1.5e-2, torch.float16: 2e-3, FLOAT8: 6e-2}
RECIPE_BOUNDS = BOUNDS | {torch.float32: 1e-5}

Tensors = Mapping[str, Tensor]


def bound_between(dtype: torch.dtype) -> float:
    """The largest error between two results in ``dtype``: both are rounded, where of a bundle one side alone is."""
    return 2 * BOUNDS[dtype]


@dataclass(frozen=True)
class Row:
    """One tensor of a bundle: its relative error and the bound that holds in the dtype it was computed in."""

    name: str
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        # A NaN error is not below the bound.
        return self.error <= self.bound


@dataclass(frozen=True)
class BundleReport:
    """All tensors of one bundle, and of a VAE its video in lower precisions, for which there is no bound.

    ``taken``: of a recipe's bundle, by which one it ran and of which weights.
    """

    name: str
    kind: str
    backend: Backend
    rows: tuple[Row, ...]
    precisions: tuple[Precision, ...] = ()
    taken: Taken | None = None

    @property
    def passed(self) -> bool:
        return bool(self.rows) and all(row.ok for row in self.rows)


@dataclass(frozen=True)
class _Bundle:
    config: Mapping[str, Any]
    weights: Tensors
    inputs: Tensors
    expected: Tensors
    device: torch.device
    dtype: torch.dtype
    backend: Backend
    executor: Executor
    source: str
    float8_except: Sequence[str]

    def checked_weights(self, shapes: Shapes) -> FingerprintedTensors:
        source = f"{self.source}/weights.safetensors"
        check_tensors(self.weights, shapes, source)
        return FingerprintedTensors(self.weights, source)

    def input(self, name: str, rank: int | None = None) -> Tensor:
        if name not in self.inputs:
            raise WeightsError(f"{self.source}/inputs.safetensors: expected a tensor {name!r}, and it is not there")
        tensor = self.inputs[name]
        if rank is not None and tensor.ndim != rank:
            raise WeightsError(
                f"{self.source}/inputs.safetensors: expected {name} with {rank} dimensions, got {list(tensor.shape)}"
            )
        return tensor.to(self.device)


def _noise(bundle: _Bundle, block: int, shape: torch.Size) -> Tensor:
    """The bundle's own noise ``[steps, B, C, h, w]`` of a block, in the place of the counter-based generator's."""
    names = [f"noise.{block}", *(f"renoise.{block}.{step}" for step in range(shape[0] - 1))]
    for name in names:
        if (noise := bundle.input(name)).shape != shape[1:]:
            raise WeightsError(
                f"{bundle.source}: {name} has shape {tuple(noise.shape)}, a block has {tuple(shape[1:])}"
            )
    return torch.stack([bundle.input(name) for name in names])


def _script(config: Mapping[str, Any], source: str) -> tuple[int, list[int]]:
    """How many blocks there are, and which of them begin with another prompt."""
    blocks, switches = config["num_blocks"], config.get("prompt_switch_blocks", [])
    whole = [n for n in (blocks, *switches) if isinstance(n, int) and n >= 0] if isinstance(switches, list) else []
    if not whole or len(whole) != 1 + len(switches):
        raise WeightsError(
            f"{source}/config.json: expected num_blocks and prompt_switch_blocks as whole numbers, "
            f"got {blocks!r} and {switches!r}"
        )
    return blocks, switches


def _rollout(bundle: _Bundle) -> dict[str, Tensor]:
    config = ModelConfig.from_flat(bundle.config)
    memory = {MEMORY_PREFIX + name: shape for name, shape in memory_shapes(config).items()}
    weights = bundle.checked_weights(transformer_shapes(config.transformer) | memory)
    own = (
        {} if config.memory is None else {name: bundle.weights[MEMORY_PREFIX + name] for name in memory_shapes(config)}
    )
    options = RuntimeOptions(device=bundle.device, dtype=bundle.dtype, float8_except=bundle.float8_except)
    dtype = working_dtype(bundle.dtype)
    attention = attentions(config, bundle.device, dtype, bundle.backend.ops, cache=None)
    tensors = ModelTensors(weights, FingerprintedTensors(own, weights.source))
    networks = Networks(config, tensors, options, bundle.backend, attention=attention)
    mode = MemoryMode.OFF if config.memory is None else MemoryMode.EVOLVE
    rollout = build_rollout(config, networks, mode, bundle.executor)
    blocks, switches = _script(bundle.config, bundle.source)
    actual: dict[str, Tensor] = {}

    def keep_flow(block: int, step: int, flow: Tensor) -> None:
        if f"flow.{block}.{step}" in bundle.expected:
            with bundle.executor.eager():
                actual[f"flow.{block}.{step}"] = flow.to("cpu", torch.float32, copy=True)

    def prompt(number: int) -> Tensor:
        embeds = bundle.input(f"prompt_embeds.{number}")
        check_prompt_embeds(embeds, config.transformer.text_dim, config.transformer.text_len)
        return embeds

    # What is given to the rollout is read in its queues: it must outlive them.
    rollout.start(prompt(0))
    bundle.executor.synchronize()
    for block in range(blocks):
        for number, at in enumerate(switches, start=1):
            if at == block:
                rollout.switch_prompt(prompt(number))
                bundle.executor.synchronize()
        latents = rollout.next_block(_noise(bundle, block, rollout.noise_shape), keep_flow)
        bundle.executor.synchronize()
        with bundle.executor.eager():
            actual[f"latents.{block}"] = latents.to("cpu", copy=True)
            if rollout.memory is not None:
                actual[f"memory_state.{block}"] = rollout.memory.to("cpu", torch.float32, copy=True)
    return actual


def _decoding(bundle: _Bundle) -> Decoding:
    config = VaeConfig.from_flat(bundle.config)
    weights = bundle.checked_weights(vae_shapes(config))
    return Decoding(config, weights, bundle.backend.ops, bundle.device, bundle.input("latents", rank=4))


def _vae(bundle: _Bundle) -> dict[str, Tensor]:
    config = VaeConfig.from_flat(bundle.config)
    actual: dict[str, Tensor] = {}
    if "video" in bundle.expected:
        decoding = _decoding(bundle)
        # One at a time: the hardest case for the history.
        actual["video"] = decoding.video(bundle.dtype, [1] * len(decoding.latents)).permute(0, 3, 1, 2)
    if "encoded" in bundle.expected:
        weights = bundle.checked_weights(vae_shapes(config))
        encoder = VaeEncoder(config, weights, device=bundle.device, dtype=bundle.dtype)
        actual["encoded"] = encoder.encode(bundle.input("video", rank=4)).float().cpu()
    return actual


def _text_encoder(bundle: _Bundle) -> dict[str, Tensor]:
    config = TextEncoderConfig.from_flat(bundle.config)
    weights = bundle.checked_weights(text_encoder_shapes(config))
    ids, mask = bundle.input("input_ids", rank=2), bundle.input("attention_mask", rank=2)
    with TextEncoder(config, weights, None, text_len=ids.shape[1], device=bundle.device, dtype=bundle.dtype) as encoder:
        return {"prompt_embeds": encoder.encode_ids(ids, mask).float().cpu()}


KINDS: dict[str, Callable[[_Bundle], dict[str, Tensor]]] = {
    "rollout": _rollout,
    "vae": _vae,
    "text_encoder": _text_encoder,
}
RECIPE = "recipe"
_WITH_LINEAR_LAYERS = ("rollout", RECIPE)  # which dtype float8 is about


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(
            f"{folder} is not a golden bundle (config.json cannot be read: {error.strerror}), nor a model with a VAE"
        ) from None
    except ValueError as error:
        raise WeightsError(f"{path}: expected JSON, got {error}") from None
    kinds = (*KINDS, RECIPE)
    if not isinstance(config, dict) or config.get("kind") not in kinds:
        kind = config.get("kind") if isinstance(config, dict) else None
        raise WeightsError(f"{path}: expected a kind of {', '.join(kinds)}; got {kind!r}")
    return config


def find_bundles(folder: Path) -> list[Path]:
    """The folders at and below ``folder`` whose ``config.json`` has a ``kind``, in order of their names."""
    found = (Path(place) for place, _, files in os.walk(folder) if "config.json" in files)
    return sorted(place for place in found if _has_kind(place / "config.json"))


def _has_kind(path: Path) -> bool:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # somebody else's file
    return isinstance(config, dict) and "kind" in config


def has_float8_layers(path: str | Path) -> bool:
    """Whether dtype float8 is about the bundle in folder ``path``; :class:`WeightsError` where there is none."""
    return _read_config(Path(path))["kind"] in _WITH_LINEAR_LAYERS


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``‖actual - expected‖ / ‖expected‖``; infinite for another shape."""
    if actual.shape != expected.shape:
        return float("inf")
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def verify_bundle(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "float32",
    backend: str | None = None,
    dump: str | Path | None = None,
    graphs: bool | None = None,
    float8_except: Sequence[str] = (),
) -> BundleReport:
    """Run the bundle in folder ``path`` and compare every expected tensor.

    ``dump``: a folder; all computed tensors go to ``<dump>/<bundle name>/actual.safetensors``. Expected tensors that
    were not computed count as infinitely wrong. ``graphs``: whether what repeats is captured and replayed (None: on a
    GPU, yes). ``float8_except``: layers of a transformer that stay in bfloat16 in dtype float8, as patterns. Raises
    :class:`EchoError` where the bundle cannot be run at all.
    """
    folder = Path(path)
    config = _read_config(folder)
    place = parse_device(device)
    precision = parse_dtype(dtype, place)
    if config["kind"] not in _WITH_LINEAR_LAYERS:
        precision = working_dtype(precision)
    inputs, expected = (open_tensors(folder / f"{name}.safetensors") for name in ("inputs", "expected"))
    precisions: Sequence[Precision] = ()
    taken: Taken | None = None
    try:
        if config["kind"] == RECIPE:
            actual, chosen, taken = RecipeBundle(folder, config, inputs).latents(
                *_script(config, str(folder)),
                device=place,
                dtype=precision,
                backend=backend,
                graphs=graphs,
                float8_except=float8_except,
            )
        else:
            chosen = choose_backend(backend, place, memory=_memory(config, working_dtype(precision)))
            bundle = _Bundle(
                config=config,
                weights=open_tensors(folder / "weights.safetensors"),
                inputs=inputs,
                expected=expected,
                device=place,
                dtype=precision,
                backend=chosen,
                executor=make_executor(place, graphs),
                source=str(folder),
                float8_except=float8_except,
            )
            actual, precisions = _run(bundle)
    except KeyError as missing:
        raise WeightsError(f"{folder}/config.json lacks {missing.args[0]!r}") from None
    name = folder.resolve().name
    if dump is not None:
        dump_tensors(Path(dump) / name, actual)
    bounds = RECIPE_BOUNDS if config["kind"] == RECIPE else BOUNDS
    rows = [
        Row(
            name=key,
            error=relative_error(actual[key], expected[key]) if key in actual else float("inf"),
            bound=bounds[precision],
        )
        for key in expected
    ]
    return BundleReport(name, config["kind"], chosen, tuple(rows), tuple(precisions), taken)


def _run(bundle: _Bundle) -> tuple[dict[str, Tensor], Sequence[Precision]]:
    """What the bundle's kind computes, and of a VAE its video in lower precisions."""
    kind = bundle.config["kind"]
    try:
        with model_context(bundle.device, bundle.dtype):
            actual = KINDS[kind](bundle)
    finally:
        bundle.executor.close()
    decoded = kind == "vae" and "video" in bundle.expected
    return actual, _decoding(bundle).precisions() if decoded else ()


def _memory(config: Mapping[str, Any], dtype: torch.dtype) -> tuple[torch.dtype, int] | None:
    """Dtype and head size of the memory that evolves in a bundle, None where none does."""
    if config["kind"] != "rollout" or config.get("memory") is None:
        return None
    return dtype, ModelConfig.from_flat(config).transformer.head_dim


def dump_tensors(folder: Path, actual: dict[str, Tensor]) -> None:
    """Keep what was computed as ``actual.safetensors`` in ``folder``, which is made as needed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EchoError(f"cannot make the folder {folder}: {error.strerror}") from None
    write_whole(folder / "actual.safetensors", save({k: v.contiguous() for k, v in actual.items()}))
