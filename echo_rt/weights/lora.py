"""LoRAs merged into the transformer's weights, one tensor at a time, each change checked against the tensor it is for.

``W' = W + strength * (alpha/rank * B @ A + difference)`` for each of them, in float32. The sum stays float32: it is
rounded once, to the dtype that is computed in. Alphas and ranks are what tensors, header fields, facts and PEFT's
configs state; places that disagree are an error.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from msgspec import Meta
from torch import Tensor

from echo_rt.errors import WeightsError
from echo_rt.options import Lora, lora_files
from echo_rt.utils.checked_json import convert, read_json
from echo_rt.utils.wording import counted
from echo_rt.weights.files import open_tensors
from echo_rt.weights.parts import HOLDERS, bare_name, split_memory
from echo_rt.weights.reading import read_object
from echo_rt.weights.shapes import MEMORY_PREFIX, count_layers, transformer_names
from echo_rt.weights.tensors import Fact, LazyTensors, Stored, TensorFile, below, first_names, lazy, selected

# What PEFT and diffusers call the file in a folder of theirs.
_FOLDER_FILES = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors")
LORA_SECTION = "generator_lora"  # the dict of a training checkpoint that is one
# What trainers of LoRAs put before a module's name, in any order and number.
_HOLDERS = (*HOLDERS, "transformer.", "pipe.dit.", "unet.", "lora_unet_", "lora_transformer_", "lycoris_")

# What a tensor is to its module; a difference is called by the tensor that it changes.
DOWN, UP, UP_BIAS, ALPHA, WEIGHT, BIAS = "down", "up", "up_bias", "alpha", "weight", "bias"
_DOWN_NAMES = r"lora_A|lora_down|lora\.down|lora_linear_layer\.down"
_UP_NAMES = r"lora_B|lora_up|lora\.up|lora_linear_layer\.up"
# Names of alpha: alone that of all modules, behind a module's name the alpha of that module.
ALPHA_FIELDS = ("lora_alpha", "network_alpha", "ss_network_alpha", "alpha")
# PEFT puts the adapter's name, mostly "default", between the factor and "weight", or leaves it out.
_ADAPTER = r"(?:\.(?!bias$)[^.]+)?"
_NAMINGS = {
    re.compile(pattern): part
    for pattern, part in (
        (rf"(.+?)\.(?:{_DOWN_NAMES}){_ADAPTER}(?:\.weight)?", DOWN),
        (rf"(.+?)\.(?:{_UP_NAMES}){_ADAPTER}(?:\.weight)?", UP),
        (rf"(.+?)\.(?:{_UP_NAMES}){_ADAPTER}\.bias", UP_BIAS),
        (r"(.+)\.(?:diff|w_norm)", WEIGHT),
        (r"(.+)\.(?:diff_b|b_norm)", BIAS),
        (rf"(?:(.+)\.)?(?:{'|'.join(ALPHA_FIELDS)})", ALPHA),
    )
}
# Other methods, which do not add a product of two factors, by how the names of their tensors begin.
_OTHER_METHODS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "oft_": "OFT",
    "lora_mid": "LoCon's Tucker decomposition",
}
# Modules that only image-to-video models have, in Wan's names and those of diffusers.
_IMAGE_MODULES = ("k_img", "v_img", "img_emb", "add_k_proj", "add_v_proj", "norm_added_k", "image_embedder")
# A part that is of no use without another one.
_PARTNERS = {DOWN: UP, UP: DOWN, UP_BIAS: UP}
# The precision of bfloat16, in which some trainers store alpha.
_ROUNDING = 2**-8
# The models that LoRAs are made for, by width.
_MODELS = {1536: "Wan2.1 1.3B", 3072: "Wan2.2 5B", 5120: "Wan 14B"}

# PEFT's config: its file beside the tensors, and the header field in which diffusers stores it as JSON.
_CONFIG_FILE, _CONFIG_IN_HEADER = "adapter_config.json", "lora_adapter_metadata"
# Values of sd-scripts that state nothing: every module has an alpha tensor then.
_NO_ALPHA = ("Dynamic", "None", "")
# Initializations that leave the base weights as they are; PEFT's others (PiSSA, OLoRA, ...) change them.
_PLAIN_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")


_Number = Annotated[float, Meta(gt=0, le=1e9)]
_Patterns = Annotated[dict[str, _Number], Meta(max_length=2**11)]
# Of a pattern that a crafted file could take hours to match: repeated groups, and more than two repetitions.
_LONGEST_PATTERN = 256
_SLOW = re.compile(r"\)[*+{]|([*+{].*){3}", re.DOTALL)


class LoraKey(NamedTuple):
    """A key taken apart: the module without prefixes (``""``: all modules), and the part of its change."""

    module: str
    part: str


def parse_lora_key(name: str) -> LoraKey | None:
    """Take the key ``name`` of a LoRA file apart; None for a key that is no part of a LoRA."""
    name = bare_name(name, _HOLDERS)
    # LightX2V's difference of a modulation, which is a bare parameter of the module.
    if name.endswith(".diff_m"):
        name = f"{name.removesuffix('.diff_m')}.modulation.diff"
    found = ((pattern.fullmatch(name), part) for pattern, part in _NAMINGS.items())
    return next((LoraKey(match[1] or "", part) for match, part in found if match), None)


def is_factor(name: str) -> bool:
    """Return whether a tensor of this name is a LoRA's factor, in any naming."""
    key = parse_lora_key(name)
    return key is not None and key.part in (DOWN, UP)


def _module_names(tensors: Collection[str]) -> dict[str, str]:
    """Every name, with ``_`` for ``.``, of the modules of these ``tensors`` (Wan's names) -> Wan's name.

    So one table holds Wan's names, those of diffusers and the flat ones of kohya's trainers.
    """
    modules: dict[str, str] = {}
    others = transformer_names(count_layers(tensors, "blocks."))
    for name in tensors:
        modules |= {_module_of(other).replace(".", "_"): _module_of(name) for other in (name, others[name])}
    return modules


def _module_of(tensor: str) -> str:
    """The module that a tensor belongs to; a bare parameter, such as a modulation, is its own."""
    return tensor.removesuffix(f".{WEIGHT}").removesuffix(f".{BIAS}")


# A summand of one tensor: a difference, or two factors (up, down) to multiply; and the scale of it.
Term = tuple[tuple[Tensor, ...], float]


@dataclass(frozen=True)
class MergedLora:
    """A transformer with LoRAs merged in, and what else their files bring.

    ``transformer`` computes a changed tensor anew whenever it is asked for, in float32: take each once. ``memory`` is
    the memory encoder of the file ``memory_path`` (names without prefix), which replaces that of the base checkpoint;
    both are ``None`` without one. ``loras`` are paths and strengths.
    """

    loras: tuple[tuple[Path, float], ...]
    transformer: Mapping[str, Tensor]
    memory: Mapping[str, Tensor] | None
    memory_path: Path | None


def _merged(base: Stored, terms: Sequence[Term], device: torch.device | str) -> Stored:
    def read() -> Tensor:
        total = base.read().to(device, torch.float32)
        for factors, scale in terms:
            wide = [factor.to(total.device, torch.float32) for factor in factors]
            if len(wide) == 1:
                total = torch.add(total, wide[0], alpha=scale)
            else:
                up, down = (factor.flatten(1) for factor in wide)
                total = torch.addmm(total.flatten(1), up, down, alpha=scale).view(total.shape)
        return total

    def origins() -> list[Tensor]:
        # The down factor first, which is the order of older snapshots.
        scaled = ((*reversed(factors), torch.tensor(scale, device="cpu")) for factors, scale in terms)
        return [base.read(), *(tensor for tensors in scaled for tensor in tensors)]

    return Stored(read, base.outline._replace(dtype=torch.float32), origins)


def merge_lora(
    transformer: Mapping[str, Tensor], lora: Lora, *, alpha: float | None = None, device: torch.device | str = "cpu"
) -> MergedLora:
    """``transformer`` (original names) with the LoRAs of ``lora`` merged in, in order; nothing is computed yet.

    A changed tensor is computed on ``device`` and stays there. Each path is a weight file, or a folder of PEFT or
    diffusers. Its keys are in any naming, perhaps below ``generator_lora``; beside them may be a
    ``query_memory_encoder``. Alpha is what the file says, ``alpha`` where it says nothing, and the rank of the factors
    where neither does.

    Errors: ``WeightsError``, naming keys, for a file without a LoRA, one of another model or method, factors that lack
    a partner or do not fit, any other tensor among them, alphas that disagree, and two memory encoders.
    """
    loras, base = lora_files(lora), lazy(transformer)
    files = [_LoraFile(path, base) for path, _ in loras]
    stated = {own for file in files for own in file.alphas.values()}
    if alpha is not None and None not in stated and stated != {alpha}:
        found = ", ".join(f"{own:g}" for own in stated if own is not None) or "no factors"
        paths = ", ".join(str(path) for path, _ in loras)
        raise WeightsError(f"{paths}: expected factors without an alpha, to take lora_alpha {alpha:g}, found {found}")
    terms: dict[str, list[Term]] = {}
    memory, memory_path = None, None
    for file, (path, strength) in zip(files, loras, strict=True):
        for name, term in file.terms(strength, alpha):
            terms.setdefault(name, []).append(term)
        if file.memory and memory:
            raise WeightsError(f"{path}: expected one LoRA with a memory encoder, {memory_path} has one too")
        if file.memory:
            memory, memory_path = file.memory, path
    merged = {name: _merged(base.entries[name], summands, device) for name, summands in terms.items()}
    return MergedLora(loras, LazyTensors({**base.entries, **merged}), memory, memory_path)


@dataclass(frozen=True)
class Stated:
    """A number (alpha or rank) that one place in a file states, for single modules or as the default of all.

    ``label`` names the place in messages. ``patterns`` are PEFT's, for the end of a module's name.
    """

    label: str
    default: float | None = None
    modules: Mapping[str, float] = field(default_factory=dict)
    patterns: Mapping[re.Pattern[str], float] = field(default_factory=dict)

    def of(self, module: str, written: str) -> float | None:
        """The number for ``module``, which the file calls ``written``; None where nothing is stated."""
        matched = (number for pattern, number in self.patterns.items() if pattern.fullmatch(written))
        return next(matched, self.modules.get(module, self.default))


def alphas_in(facts: Mapping[str, Fact], names: Mapping[str, str], source: str) -> list[Stated]:
    """The alphas among ``facts``, one place for each shared one; ``names`` as of :func:`_module_names`."""
    modules: dict[str, float] = {}
    shared: dict[str, float] = {}
    for name, value in sorted(facts.items()):
        key = parse_lora_key(name)
        if key is not None and key.part == ALPHA and value not in _NO_ALPHA:
            own = names.get(key.module.replace(".", "_"), key.module)
            place, by = (modules, own) if key.module else (shared, name)
            expected = f"{source}: expected {name} to be a number above 0, found {value!r:.80}"
            place[by] = read_json(str(value), _Number, expected, WeightsError)
    if modules and not shared:
        return [Stated("alphas of modules", None, modules)]
    return [Stated(label, default, modules) for label, default in shared.items()]


@dataclass(frozen=True)
class AdapterConfig:
    """PEFT's config, as far as merged weights depend on it; ``use_rslora``: alpha is over the root of the rank."""

    peft_type: str | None = None
    use_dora: bool | None = None
    use_rslora: bool | None = None
    init_lora_weights: bool | str | None = None
    lora_alpha: _Number | None = None
    r: _Number | None = None
    alpha_pattern: _Patterns | None = None
    rank_pattern: _Patterns | None = None

    def stated(self, label: str, source: str) -> tuple[Stated, Stated]:
        """The alphas and ranks; ``WeightsError`` for another method than LoRA, and for patterns that are none."""
        method = "DoRA" if self.use_dora else self.peft_type or "LORA"
        if method != "LORA":
            raise WeightsError(f"{source}: expected a LoRA, found {method:.80} (in {label})")
        if self.init_lora_weights not in _PLAIN_BEGINNINGS:
            raise WeightsError(
                f"{source}: expected a LoRA of unchanged base weights, found init_lora_weights "
                f"{self.init_lora_weights!r:.80} (in {label}); let PEFT convert it"
            )
        return (
            Stated(f"lora_alpha of {label}", self.lora_alpha, patterns=_compiled(self.alpha_pattern, label, source)),
            Stated(f"r of {label}", self.r, patterns=_compiled(self.rank_pattern, label, source)),
        )


def _compiled(patterns: Mapping[str, float] | None, label: str, source: str) -> dict[re.Pattern[str], float]:
    compiled = {}
    for pattern, number in (patterns or {}).items():
        try:
            if len(pattern) > _LONGEST_PATTERN or _SLOW.search(pattern):
                raise re.error("too slow to match")
            compiled[re.compile(rf"(.*\.)?({pattern})")] = number
        except (re.error, RecursionError, OverflowError) as error:
            what = "simple patterns of modules' names"
            raise WeightsError(f"{source}: expected {what} in {label}, found {pattern!a:.80} ({error})") from None
    return compiled


def adapter_configs(file: Path, facts: Mapping[str, Fact], source: str) -> dict[str, AdapterConfig]:
    """PEFT's configs beside ``file`` and in its header, by what messages call them."""
    configs: dict[str, AdapterConfig] = {}
    path = file.parent / _CONFIG_FILE
    if os.path.exists(path):
        configs[_CONFIG_FILE] = read_object(path, "PEFT's config of an adapter", AdapterConfig)
    text = facts.get(_CONFIG_IN_HEADER)
    if text is not None:
        expected = f"{source}: expected {_CONFIG_IN_HEADER} to be PEFT's config as a JSON object"
        fields = read_json(str(text), dict[str, Any], expected, WeightsError)
        fields = {name.removeprefix("transformer."): value for name, value in fields.items()}
        configs[_CONFIG_IN_HEADER] = convert(fields, AdapterConfig, expected, WeightsError)
    return configs


class _LoraFile:
    """An opened LoRA file that fits ``transformer`` (original names); ``memory`` is its memory encoder or None.

    ``ranks`` and ``alphas`` are those of the pairs of factors, by module; an alpha is None where the file states none.
    """

    def __init__(self, path: Path, transformer: LazyTensors) -> None:
        file = open_lora(path)
        self._source, self._transformer = str(file.path), transformer
        self._tensors, memory, facts = _split(file)
        self.memory = memory or None
        names = _module_names(transformer)
        self._changes: dict[str, dict[str, str]] = {}  # module -> part -> the file's name of the tensor
        self._written: dict[str, str] = {}  # module -> the file's name of it
        tensor_alphas = self._sort(names)
        self._check_changes()
        configs = adapter_configs(file.path, facts, self._source)
        stated = [config.stated(label, self._source) for label, config in configs.items()]
        alphas = [place for each in (tensor_alphas, facts) for place in alphas_in(each, names, self._source)]
        alphas += (alpha for alpha, _ in stated)
        stray = sorted({name for place in alphas for name in place.modules} - self._changes.keys())
        self._refuse(stray, "alphas of changed modules", "of others")
        self._rank_stabilized = any(config.use_rslora for config in configs.values())
        downs = {module: parts[DOWN] for module, parts in self._changes.items() if DOWN in parts}
        self.ranks = {module: self._shape(name)[0] for module, name in downs.items()}
        ranks = [*(rank for _, rank in stated), Stated("its factors", modules=self.ranks)]
        for module in downs:
            self._agreed("rank", ranks, module, 0)
        self.alphas = {module: self._agreed("alpha", alphas, module, _ROUNDING) for module in downs}

    def terms(self, strength: float, alpha: float | None) -> Iterator[tuple[str, Term]]:
        """The changed tensors with their terms; ``alpha`` is for the pairs of factors that the file states none for."""
        for module, parts in self._changes.items():
            scale = 0.0
            if module in self.ranks:
                rank = self.ranks[module]
                scale = strength * (self.alphas[module] or alpha or float(rank))
                scale /= math.sqrt(rank) if self._rank_stabilized else rank
                if abs(scale) > torch.finfo(torch.float32).max:
                    raise WeightsError(
                        f"{self._source}: expected strength and alpha whose product over the rank fits float32, "
                        f"found {scale:g} for {self._written[module]}"
                    )
                factors = (self._tensors[parts[UP]], self._tensors[parts[DOWN]])
                yield self._target(module, UP), (factors, scale)
            for part, factor in ((UP_BIAS, scale), (WEIGHT, strength), (BIAS, strength)):
                if part in parts:
                    yield self._target(module, part), ((self._tensors[parts[part]],), factor)

    def _agreed(self, what: str, places: Iterable[Stated], module: str, tolerance: float) -> float | None:
        """The number that ``places`` state for ``module``, or None; ``WeightsError`` where two of them disagree."""
        written = self._written[module]
        found = [(place.label, number) for place in places if (number := place.of(module, written)) is not None]
        for label, number in found[1:]:
            if not math.isclose(number, found[0][1], rel_tol=tolerance):
                raise WeightsError(
                    f"{self._source}: expected one {what} of {written}, "
                    f"found {found[0][1]:g} ({found[0][0]}) and {number:g} ({label})"
                )
        return found[0][1] if found else None

    def _shape(self, name: str) -> tuple[int, ...]:
        return self._tensors.entries[name].outline.shape

    def _target(self, module: str, part: str) -> str:
        """The tensor of ``module`` that ``part`` changes."""
        if part in (BIAS, UP_BIAS):
            return f"{module}.{BIAS}"
        return module if module in self._transformer else f"{module}.{WEIGHT}"

    def _sort(self, names: Mapping[str, str]) -> dict[str, float]:
        """Sort the tensors into changes by module; the alphas that are tensors, by name."""
        alphas: dict[str, float] = {}
        others: list[str] = []
        for name in self._tensors:
            method = next((method for start, method in _OTHER_METHODS.items() if f".{start}" in name), None)
            if method is not None:
                raise WeightsError(f"{self._source}: expected a LoRA, found {method}: {name}")
            key, (shape, dtype, dense) = parse_lora_key(name), self._tensors.entries[name].outline
            is_alpha = key is not None and key.part == ALPHA
            if key is None or not dense or not (math.prod(shape) == 1 if is_alpha else dtype.is_floating_point):
                others.append(name)
                continue
            if is_alpha:
                alphas[name] = self._tensors[name].item()
                continue
            module = names.get(key.module.replace(".", "_"), key.module)
            self._written.setdefault(module, key.module)
            first = self._changes.setdefault(module, {}).setdefault(key.part, name)
            if first != name:
                raise WeightsError(f"{self._source}: expected one adapter, found {first} and {name}")
        if not self._changes:
            found = counted(len(self._tensors), "tensor")
            raise WeightsError(f"{self._source}: expected a LoRA (lora_A and lora_B), found {found} without any")
        self._refuse(others, "LoRA factors only", "of something else")
        return alphas

    def _check_changes(self) -> None:
        """Raise ``WeightsError`` unless every change is whole and fits the tensor that it is for."""
        every = [(module, part, name) for module, parts in self._changes.items() for part, name in parts.items()]
        unpaired = [name for module, part, name in every if _PARTNERS.get(part, part) not in self._changes[module]]
        self._refuse(unpaired, "lora_A and lora_B in pairs", "without a partner")
        unknown = [name for module, part, name in every if self._target(module, part) not in self._transformer]
        images = [name for name in unknown if any(module in name for module in _IMAGE_MODULES)]
        self._refuse(images, "a LoRA of a text-to-video model", "of an image-to-video one")
        # Shapes before unknown names: a LoRA of a larger model has more blocks too, but its width says which model.
        for module, part, _ in every:
            if part != DOWN and self._target(module, part) in self._transformer:
                self._check_shape(module, part)
        self._refuse(unknown, "changes to this transformer", "of modules that it does not have")

    def _check_shape(self, module: str, part: str) -> None:
        target, parts = self._target(module, part), self._changes[module]
        names = [parts[UP], parts[DOWN]] if part == UP else [parts[part]]
        shapes = [self._shape(name) for name in names]
        goal = self._transformer.entries[target].outline.shape
        if part != UP:
            fits, what = shapes == [goal], f"a difference of {target}"
        else:
            what = "factors of a weight"
            rank = (*shapes[1], 0)[0]
            # The factors of a convolution are stored with its kernel, with ones in place of it, or as matrices.
            matrices = [(shape[0], math.prod(shape[1:])) for shape in shapes if len(shape) > 1]
            fits = len(goal) > 1 and rank > 0 and matrices == [(goal[0], rank), (rank, math.prod(goal[1:]))]
        if not fits:
            found = " and ".join(f"{name} {list(shape)}" for name, shape in zip(names, shapes, strict=True))
            dim = self._transformer.entries["patch_embedding.weight"].outline.shape[0]
            width = next((size for shape in shapes for size in shape if size in _MODELS and size != dim), None)
            model = f": a LoRA of {_MODELS[width]}, {width} wide, for a model {dim} wide" if width else ""
            raise WeightsError(f"{self._source}: expected {what} {list(goal)}, found {found}{model}")

    def _refuse(self, names: Sequence[str], expected: str, fault: str) -> None:
        if names:
            raise WeightsError(f"{self._source}: expected {expected}, found {len(names)} {fault}: {first_names(names)}")


def open_lora(path: Path) -> TensorFile:
    """Open a LoRA: the weights in a folder of PEFT or diffusers, or the file itself."""
    return open_tensors(next((file for name in _FOLDER_FILES if os.path.exists(file := path / name)), path))


def _split(file: TensorFile) -> tuple[LazyTensors, LazyTensors, Mapping[str, Fact]]:
    """The LoRA's tensors, those of a memory encoder without its prefix, and the LoRA's facts."""
    own, facts = below(file, f"{LORA_SECTION}."), file.facts
    if not own:
        return *split_memory(file, str(file.path)), facts
    # The other dicts of a training checkpoint (critic, optimizer) are no part of the generator.
    beside = selected(file, lambda name: bare_name(name).startswith(MEMORY_PREFIX) or name in ALPHA_FIELDS)
    prefix = f"{LORA_SECTION}."
    facts = {name.removeprefix(prefix): facts[name] for name in facts if name.startswith(prefix) or "." not in name}
    return *split_memory(LazyTensors({**own.entries, **beside.entries}), str(file.path)), facts
