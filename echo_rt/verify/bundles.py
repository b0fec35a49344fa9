"""Golden bundles and the decoders of models, compared with what they must compute.

A bundle is a folder with ``config.json`` (its ``kind`` says what it is), ``weights``, ``inputs`` and ``expected``; it
is computed by the code that ``generate`` uses.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from msgspec import Meta
from safetensors.torch import save
from torch import Tensor

from echo_rt.attention import attentions
from echo_rt.config import ModelConfig, TextEncoderConfig, VaeConfig
from echo_rt.engine.build import Networks, build_rollout
from echo_rt.engine.executor import Executor, make_executor
from echo_rt.engine.prompts import check_prompt_embeds
from echo_rt.errors import EchoError, WeightsError
from echo_rt.model.text import TextEncoder
from echo_rt.model.vae_encoder import VaeEncoder
from echo_rt.ops.backends import Backend, choose_backend, load_ops
from echo_rt.options import MemoryMode, RuntimeOptions
from echo_rt.runtime import Runtime
from echo_rt.utils.atomic_file import write_whole
from echo_rt.utils.checked_json import convert, read_json
from echo_rt.utils.device import FLOAT8, model_context, parse_device, parse_dtype, working_dtype
from echo_rt.verify.decoder import Decoding, Precision, folder_decoding
from echo_rt.weights.choice import Taken
from echo_rt.weights.files import check_tensors, open_tensors
from echo_rt.weights.folder import holds_vae
from echo_rt.weights.shapes import (
    MEMORY_PREFIX,
    Shapes,
    memory_shapes,
    text_encoder_shapes,
    transformer_shapes,
    vae_shapes,
)
from echo_rt.weights.tensors import FingerprintedTensors, ModelTensors, below

RECIPE, MODEL = "recipe", "model"
FLOAT8_KINDS = ("rollout", RECIPE)  # those with linear layers that float8 is about
# Largest error allowed in each dtype. float16 has eight times bfloat16's precision; its bound is tighter to match.
# float8 is that of a rollout's linear layers: elsewhere bfloat16's bound holds.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 1.5e-2, torch.float16: 2e-3, FLOAT8: 6e-2}
RECIPE_BOUNDS = BOUNDS | {torch.float32: 1e-5}


def bound_between(dtype: torch.dtype) -> float:
    """The largest error between two results in ``dtype``: both are rounded, in a bundle only one of them."""
    return 2 * BOUNDS[dtype]


@dataclass
class _Script:
    num_blocks: Annotated[int, Meta(ge=0)]
    prompt_switch_blocks: list[Annotated[int, Meta(ge=0)]] = field(default_factory=list)


@dataclass(frozen=True)
class Bundle:
    """A bundle, and the device, dtype and other ``options`` that it is run with.

    A bundle of kind ``recipe`` names published files in place of ``weights``.
    """

    folder: Path
    config: Mapping[str, Any]
    inputs: Mapping[str, Tensor]
    expected: Mapping[str, Tensor]
    device: torch.device
    dtype: torch.dtype
    options: RuntimeOptions

    @property
    def backend(self) -> Backend:
        """The backend of a bundle without a memory."""
        return choose_backend(self.options.backend, self.device)

    def weights(self, shapes: Shapes) -> FingerprintedTensors:
        """Open the weights; raises ``WeightsError`` unless they have these ``shapes``."""
        path = self.folder / "weights.safetensors"
        tensors = open_tensors(path)
        check_tensors(tensors, shapes, str(path))
        return FingerprintedTensors(tensors, str(path))

    def path(self, name: str) -> Path:
        """The file or folder that ``config.json`` names, relative to the bundle."""
        path = self.config[name]
        if not isinstance(path, str):
            raise WeightsError(f"{self.folder}/config.json: expected {name} to be a path, got {path!r}")
        return self.folder / path

    def input(self, name: str, rank: int | None = None) -> Tensor:
        """An input on the host; raises ``WeightsError`` if it is absent or has another number of dimensions."""
        place = f"{self.folder}/inputs.safetensors"
        if name not in self.inputs:
            raise WeightsError(f"{place}: expected a tensor {name!r}, and it is not there")
        tensor = self.inputs[name]
        if rank is not None and tensor.ndim != rank:
            raise WeightsError(f"{place}: expected {name} with {rank} dimensions, got {list(tensor.shape)}")
        return tensor

    def noise(self, block: int, shape: Sequence[int]) -> Tensor:
        """The bundle's noise ``[steps, B, C, h, w]`` of a block, used in place of the counter-based generator's."""
        names = [f"noise.{block}", *(f"renoise.{block}.{step}" for step in range(shape[0] - 1))]
        for name in names:
            if (found := tuple(self.input(name).shape)) != tuple(shape[1:]):
                raise WeightsError(f"{self.folder}: {name} has shape {found}, a block has {tuple(shape[1:])}")
        return torch.stack([self.input(name) for name in names]).float()

    def script(self) -> _Script:
        """The number of blocks, and the blocks that begin with another prompt."""
        return convert(dict(self.config), _Script, f"{self.folder}/config.json", WeightsError)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``‖actual - expected‖ / ‖expected‖``; infinite for another shape."""
    if actual.shape != expected.shape:
        return float("inf")
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@dataclass(frozen=True)
class Row:
    """One tensor of a bundle: its relative error and the bound for the dtype it was computed in."""

    name: str
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        # A NaN error is not below the bound.
        return self.error <= self.bound


class Computed(NamedTuple):
    """The computed tensors on the host, the backend that was used, and for a VAE its video in lower precisions.

    ``rows``: how they compare with one another, where nothing is expected.
    """

    tensors: dict[str, Tensor]
    backend: Backend
    precisions: tuple[Precision, ...] = ()
    taken: Taken | None = None
    rows: tuple[Row, ...] = ()


def _rollout(bundle: Bundle) -> Computed:
    """``latents.b``, ``memory_state.b`` and the expected ``flow.b.step`` of every block b."""
    with (
        closing(make_executor(bundle.device, bundle.options.graphs)) as executor,
        model_context(bundle.device, bundle.dtype),
    ):
        return _run_rollout(bundle, executor)


def _run_rollout(bundle: Bundle, executor: Executor) -> Computed:
    config, dtype = ModelConfig.from_flat(bundle.config), working_dtype(bundle.dtype)
    memory = None if config.memory is None else (dtype, config.transformer.head_dim)
    backend = choose_backend(bundle.options.backend, bundle.device, memory=memory)
    shapes = {MEMORY_PREFIX + name: shape for name, shape in memory_shapes(config).items()}
    weights = bundle.weights(transformer_shapes(config.transformer) | shapes)
    memory_encoder = FingerprintedTensors(below(weights, MEMORY_PREFIX), weights.source)
    networks = Networks(
        config,
        ModelTensors(weights, memory_encoder),
        bundle.options,
        backend,
        selected=attentions(config, bundle.device, dtype, backend.ops, cache=None),
    )
    mode = MemoryMode.OFF if config.memory is None else MemoryMode.EVOLVE
    rollout = build_rollout(config, networks, mode, executor)
    script = bundle.script()
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
    for block in range(script.num_blocks):
        for number, at in enumerate(script.prompt_switch_blocks, start=1):
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
    config, backend = VaeConfig.from_flat(bundle.config), bundle.backend
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
    with model_context(bundle.device, bundle.dtype):
        encoder = TextEncoder(config, weights, None, text_len=ids.shape[1], device=bundle.device, dtype=bundle.dtype)
        with closing(encoder):
            return Computed({"prompt_embeds": encoder.encode_ids(ids, mask).float().cpu()}, bundle.backend)


def _recipe(bundle: Bundle) -> Computed:
    """``latents.b`` of the first blocks, from published files through the public loader and a stream."""
    script = bundle.script()
    initial = bundle.inputs.get("initial_latents")
    stride = VaeConfig().spatial_stride
    *_, rows, columns = bundle.input("noise.0", rank=4).shape
    options = replace(
        bundle.options,
        checkpoint=bundle.path("checkpoint"),
        lora=None if bundle.config.get("lora") is None else bundle.path("lora"),
        recipe=bundle.config["recipe"],
        overrides=bundle.config.get("overrides"),
        width=stride * columns,
        height=stride * rows,
    )
    with (
        Runtime.from_pretrained(bundle.path("model"), **options.arguments()) as runtime,
        runtime.stream(
            prompt_embeds=bundle.input("prompt_embeds.0"),
            noise=bundle.noise,
            initial_latents=initial,
            include_initial=initial is None,
        ) as stream,
    ):
        given = stream.next_block  # blocks of the given latents, which the bundle does not count
        for number, block in enumerate(script.prompt_switch_blocks, start=1):
            stream.set_prompt(prompt_embeds=bundle.input(f"prompt_embeds.{number}"), block=given + block)
        made = {f"latents.{block}": next(stream).latents for block in range(script.num_blocks)}
        return Computed(made, Backend(load_ops(runtime.backend), runtime.backend_reason), taken=runtime.taken)


def _model(bundle: Bundle) -> Computed:
    """``video``, a few random latents decoded in one call, and in groups of several sizes: the same frames.

    The error of a grouping is that of its worst frame: in the error of the whole video a seam would be lost.
    """
    backend, bound = bundle.backend, bound_between(bundle.dtype)
    decoding = folder_decoding(bundle.folder, backend.ops, bundle.device)
    at_once, grouped = decoding.in_groups(bundle.dtype)
    videos = {f"video {name}": video for name, video in grouped.items()}
    rows = []
    for name, video in videos.items():
        frames = zip(video, at_once, strict=True)
        errors = [relative_error(*pair) for pair in frames] if video.shape == at_once.shape else [float("inf")]
        rows.append(Row(name, float(torch.tensor(errors).max()), bound))  # a NaN is the largest
    return Computed({"video": at_once, **videos}, backend, decoding.precisions(), rows=tuple(rows))


BUNDLES: dict[str, Callable[[Bundle], Computed]] = {
    "rollout": _rollout,
    "vae": _vae,
    "text_encoder": _text_encoder,
    RECIPE: _recipe,
}


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json``; raises ``WeightsError`` unless it is that of a bundle."""
    path = folder / "config.json"
    try:
        content = path.read_bytes()
    except OSError as error:
        found = f"no VAE and no config.json in it ({error.strerror})"
        raise WeightsError(f"{folder}: expected the folder of a golden bundle or of a model, found {found}") from None
    config = read_json(content, dict[str, Any], f"{path}: expected JSON", WeightsError)
    if config.get("kind") not in tuple(BUNDLES):  # which may be of any type
        raise WeightsError(f"{path}: expected a kind of {', '.join(BUNDLES)}; got {config.get('kind')!r}")
    return config


def find_bundles(folder: Path) -> list[Path]:
    """List the folders at and below ``folder`` whose ``config.json`` has a ``kind``, by their names, 2 before 10."""

    def has_kind(place: str) -> bool:
        try:
            content = Path(place, "config.json").read_bytes()
            return "kind" in read_json(content, dict[str, Any], place, WeightsError)
        except (OSError, WeightsError):
            return False  # somebody else's file

    def order(path: Path) -> list[str | int]:
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))]

    found = (Path(place) for place, _, files in os.walk(folder) if "config.json" in files and has_kind(place))
    return sorted(found, key=order)


@dataclass(frozen=True)
class BundleReport:
    """All tensors of one bundle, and of a VAE its video in lower precisions, for which there is no bound.

    ``taken``: the recipe and the weights that a recipe's bundle ran by.
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
    """Run the bundle in folder ``path``, or the VAE of the model in it, and compare every tensor.

    One that is expected and not computed is infinitely off. ``dump``: a folder; all computed tensors go to
    ``<dump>/<folder's name>/actual.safetensors``. ``graphs``: use CUDA graphs (None: on a GPU, yes). ``float8_except``:
    patterns of layers that stay in bfloat16 in dtype float8. Raises :class:`EchoError` if it cannot be run at all.
    """
    folder, place = Path(path), parse_device(device)
    is_model = holds_vae(folder)
    config = {"kind": MODEL} if is_model else read_config(folder)
    precision, kind = parse_dtype(dtype, place), config["kind"]
    if kind not in FLOAT8_KINDS:
        precision = working_dtype(precision)
    files = (folder / "inputs.safetensors", folder / "expected.safetensors")
    inputs, expected = ({}, {}) if is_model else map(open_tensors, files)
    options = RuntimeOptions(device=place, dtype=precision, backend=backend, graphs=graphs, float8_except=float8_except)
    bundle = Bundle(folder, config, inputs, expected, place, precision, options)
    try:
        computed = _model(bundle) if is_model else BUNDLES[kind](bundle)
    except KeyError as missing:
        raise WeightsError(f"{folder}/config.json lacks {missing.args[0]!r}") from None
    actual = computed.tensors
    bound = (RECIPE_BOUNDS if kind == RECIPE else BOUNDS)[precision]
    errors = {key: relative_error(actual[key], expected[key]) if key in actual else float("inf") for key in expected}
    rows = computed.rows or tuple(Row(key, error, bound) for key, error in errors.items())
    name = folder.resolve().name
    if dump is not None:
        target = Path(dump) / name
        try:
            target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EchoError(f"cannot make the folder {target}: {error.strerror}") from None
        whole = {key: tensor.contiguous() for key, tensor in actual.items()}
        write_whole(target / "actual.safetensors", save(whole))
    return BundleReport(name, kind, computed.backend, rows, computed.precisions, computed.taken)
