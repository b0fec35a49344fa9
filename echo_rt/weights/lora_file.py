"""One LoRA file: its changes to the transformer, each checked against the tensor that it changes."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from echo_rt.errors import WeightsError
from echo_rt.utils.wording import counted
from echo_rt.weights.files import open_tensors
from echo_rt.weights.generator import LORA_SECTION, holds_memory, split_memory
from echo_rt.weights.json_files import read_object
from echo_rt.weights.lora_alpha import AdapterConfig, Stated, agreed, alphas_in, config_in, positive
from echo_rt.weights.lora_keys import (
    ALPHA,
    ALPHA_FIELDS,
    BIAS,
    DOWN,
    UP,
    UP_BIAS,
    WEIGHT,
    is_of_images,
    known,
    module_names,
    other_method,
    parse_key,
)
from echo_rt.weights.shapes import MEMORY_PREFIX
from echo_rt.weights.tensors import Fact, RenamedTensors, TensorFile, first_names, without_wrappers

# What PEFT and diffusers call the file in a folder of theirs, and PEFT its config.
_FOLDER_FILES = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors")
_ADAPTER_CONFIG = "adapter_config.json"
# A part that is of no use without another one.
_PARTNERS = {DOWN: UP, UP: DOWN, UP_BIAS: UP}
# The models that LoRAs are made for, by width.
_MODELS = {1536: "Wan2.1 1.3B", 3072: "Wan2.2 5B", 5120: "Wan 14B"}


@dataclass(frozen=True)
class Term:
    """A summand of one tensor: ``scale`` times a difference, or times the product of two factors (up, down)."""

    factors: tuple[Tensor, ...]
    scale: float

    def added_to(self, total: Tensor) -> Tensor:
        """``total`` (float32) plus this term, on the device of ``total``."""
        wide = [factor.to(total.device, torch.float32) for factor in self.factors]
        if len(wide) == 1:
            return torch.add(total, wide[0], alpha=self.scale)
        up, down = (factor.flatten(1) for factor in wide)
        return torch.addmm(total.flatten(1), up, down, alpha=self.scale).view(total.shape)

    def origins(self) -> list[Tensor]:
        """All tensors that the term depends on; the down factor first, which is the order of older snapshots."""
        return [*reversed(self.factors), torch.tensor(self.scale, device="cpu")]


@dataclass
class _Change:
    """The tensors that change one module: part -> name in the file. ``written`` is the file's name of the module."""

    written: str
    parts: dict[str, str] = field(default_factory=dict)


class LoraFile:
    """An opened LoRA file that fits ``transformer`` (original names); ``memory`` is its memory encoder or None.

    Raises ``WeightsError``, as :func:`echo_rt.weights.lora.merge_lora` explains.
    """

    def __init__(self, path: Path, transformer: Mapping[str, Tensor]) -> None:
        file = open_tensors(_file_of(path))
        self._source, self._transformer = str(file.path), transformer
        self._tensors, memory, facts = _split(file)
        self.memory = memory or None
        names = module_names(transformer)
        self._changes, in_tensors = self._sort(names)
        configs = [config for config in (_config_beside(file.path), config_in(facts, self._source)) if config]
        self._alphas = [in_tensors, *alphas_in(facts, names, self._source), *(config.alpha for config in configs)]
        self._rank_stabilized = any(config.rank_stabilized for config in configs)
        stray = sorted({name for stated in self._alphas for name in stated.modules} - self._changes.keys())
        self._refuse(stray, "alphas of changed modules", "of others")
        self._check_ranks([config.rank for config in configs])

    def ranks(self) -> set[int]:
        """The ranks of the pairs of factors."""
        return {self._rank(change) for change in self._changes.values() if DOWN in change.parts}

    def alphas(self) -> set[float | None]:
        """The alphas that the file states for its pairs of factors; None stands for a pair without one."""
        return {self._alpha(module) for module, change in self._changes.items() if DOWN in change.parts}

    def terms(self, strength: float, alpha: float | None) -> Iterator[tuple[str, Term]]:
        """The changed tensors with their terms; ``alpha`` is for the pairs of factors that the file states none for."""
        for module, change in self._changes.items():
            scale = 0.0
            if DOWN in change.parts:
                rank = self._rank(change)
                divisor = math.sqrt(rank) if self._rank_stabilized else rank
                scale = strength * (self._alpha(module) or alpha or float(rank)) / divisor
                yield self._target(module, UP), Term((self._part(change, UP), self._part(change, DOWN)), scale)
            for part, factor in ((UP_BIAS, scale), (WEIGHT, strength), (BIAS, strength)):
                if part in change.parts:
                    yield self._target(module, part), Term((self._part(change, part),), factor)

    def _part(self, change: _Change, part: str) -> Tensor:
        return self._tensors[change.parts[part]]

    def _rank(self, change: _Change) -> int:
        return self._part(change, DOWN).shape[0]

    def _alpha(self, module: str) -> float | None:
        return agreed(self._alphas, module, self._changes[module].written, "alpha", self._source)

    def _target(self, module: str, part: str) -> str:
        """The tensor of ``module`` that ``part`` changes."""
        if part in (BIAS, UP_BIAS):
            return f"{module}.{BIAS}"
        return module if module in self._transformer else f"{module}.{WEIGHT}"

    def _sort(self, names: Mapping[str, str]) -> tuple[dict[str, _Change], Stated]:
        """The changes by module, and the alphas that are tensors."""
        changes: dict[str, _Change] = {}
        alphas: dict[str, float] = {}
        others: list[str] = []
        for name, tensor in self._tensors.items():
            if method := other_method(name):
                raise WeightsError(f"{self._source}: expected a LoRA, found {method}: {name}")
            key = parse_key(name)
            if key is None or not (_is_scalar(tensor) if key.part == ALPHA else _is_dense_float(tensor)):
                others.append(name)
                continue
            module = known(key.module, names)
            if key.part == ALPHA:
                alphas[module] = positive(tensor.item(), name, self._source)
                continue
            parts = changes.setdefault(module, _Change(key.module)).parts
            if key.part in parts:
                raise WeightsError(f"{self._source}: expected one adapter, found {parts[key.part]} and {name}")
            parts[key.part] = name
        if not changes:
            came = counted(len(self._tensors), "tensor")
            raise WeightsError(f"{self._source}: expected a LoRA (lora_A and lora_B), found {came} without any")
        self._refuse(others, "LoRA factors only", "of something else")
        self._check(changes)
        return changes, Stated("its alpha tensors", alphas.pop("", None), alphas)

    def _check(self, changes: Mapping[str, _Change]) -> None:
        """Raises ``WeightsError`` unless every change is whole and fits the tensor that it is for."""
        unpaired: list[str] = []
        unknown: list[str] = []
        for module, change in changes.items():
            for part, name in change.parts.items():
                if _PARTNERS.get(part, part) not in change.parts:
                    unpaired.append(name)
                if self._target(module, part) not in self._transformer:
                    unknown.append(name)
        self._refuse(unpaired, "lora_A and lora_B in pairs", "without a partner")
        images = [name for name in unknown if is_of_images(name)]
        self._refuse(images, "a LoRA of a text-to-video model", "of an image-to-video one")
        # Shapes before unknown names: a LoRA of a larger model has more blocks too, but its width says which model.
        for module, change in changes.items():
            for part in change.parts:
                if part != DOWN and self._target(module, part) in self._transformer:
                    self._check_shape(self._target(module, part), change, part)
        self._refuse(unknown, "changes to this transformer", "of modules that it does not have")

    def _check_shape(self, target: str, change: _Change, part: str) -> None:
        names = [change.parts[each] for each in ((UP, DOWN) if part == UP else (part,))]
        shapes = [tuple(self._tensors[name].shape) for name in names]
        goal = tuple(self._transformer[target].shape)
        if part != UP:
            fits, what = shapes == [goal], f"a difference of {target}"
        else:
            what = "factors of a weight"
            rank = (*shapes[1], 0)[0]
            # The factors of a convolution are stored with its kernel, with ones in place of it, or as matrices.
            matrices = [(shape[0], math.prod(shape[1:])) for shape in shapes if len(shape) > 1]
            fits = len(goal) > 1 and rank > 0 and matrices == [(goal[0], rank), (rank, math.prod(goal[1:]))]
        if not fits:
            came = " and ".join(f"{name} {list(shape)}" for name, shape in zip(names, shapes, strict=True))
            dim = self._transformer["patch_embedding.weight"].shape[0]
            width = next((size for shape in shapes for size in shape if size in _MODELS and size != dim), None)
            model = f": a LoRA of {_MODELS[width]}, {width} wide, for a model {dim} wide" if width else ""
            raise WeightsError(f"{self._source}: expected {what} {list(goal)}, found {came}{model}")

    def _check_ranks(self, places: Sequence[Stated]) -> None:
        """Raises ``WeightsError`` where the factors do not have the ranks that PEFT's configs state."""
        for module, change in self._changes.items():
            for place in places:
                stated = place.of(module, change.written)
                if DOWN in change.parts and stated not in (None, self._rank(change)):
                    raise WeightsError(
                        f"{self._source}: expected {change.written} of rank {stated:g}, as {place.label} says, "
                        f"found {self._rank(change)}"
                    )

    def _refuse(self, names: Sequence[str], expected: str, fault: str) -> None:
        if names:
            raise WeightsError(f"{self._source}: expected {expected}, found {len(names)} {fault}: {first_names(names)}")


def _is_scalar(tensor: Tensor) -> bool:
    return tensor.numel() == 1 and tensor.layout == torch.strided and not tensor.is_meta


def _is_dense_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_meta


def lora_holds_memory(path: Path) -> bool:
    """Whether a memory encoder is in the LoRA at ``path``; ``WeightsError`` where it cannot be opened."""
    return holds_memory(open_tensors(_file_of(path)))


def _file_of(path: Path) -> Path:
    """The weights in a folder of PEFT or diffusers; any other path as it is."""
    return next((file for name in _FOLDER_FILES if os.path.exists(file := path / name)), path)


def _config_beside(file: Path) -> AdapterConfig | None:
    path = file.parent / _ADAPTER_CONFIG
    if not os.path.exists(path):
        return None
    return AdapterConfig.read(read_object(path, "PEFT's config of an adapter"), _ADAPTER_CONFIG, str(file))


def _split(file: TensorFile) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Fact]]:
    """The LoRA's tensors, those of a memory encoder without its prefix, and the LoRA's facts."""
    prefix = f"{LORA_SECTION}."
    if not any(name.startswith(prefix) for name in file):
        return *split_memory(file, str(file.path)), file.facts
    # The other dicts of a training checkpoint (critic, optimizer) are no part of the generator.
    own = {name.removeprefix(prefix): name for name in file if name.startswith(prefix)}
    beside = {name: name for name in file if without_wrappers(name).startswith(MEMORY_PREFIX) or name in ALPHA_FIELDS}
    facts = {
        name.removeprefix(prefix): fact
        for name, fact in file.facts.items()
        if name.startswith(prefix) or "." not in name
    }
    return *split_memory(RenamedTensors(file, own | beside), str(file.path)), facts
