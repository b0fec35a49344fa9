"""Alphas and ranks that LoRA files state beside their tensors: in header fields, facts and PEFT's configs."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from echo_rt.errors import WeightsError
from echo_rt.utils.checked_json import convert, read_json
from echo_rt.weights.keymaps import ALPHA, known, parse_lora_key
from echo_rt.weights.reading import read_object
from echo_rt.weights.tensors import Fact

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


def _positive(value: Any, name: str, source: str) -> float:
    """``value`` as a finite number above 0; raises ``WeightsError``."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 < number < math.inf:
        raise WeightsError(f"{source}: expected {name} to be a number above 0, found {value!r:.80}")
    return number


def alphas_in(facts: Mapping[str, Fact], names: Mapping[str, str], source: str) -> list[Stated]:
    """The alphas among ``facts``, one place for each shared one; ``names`` as of :func:`.keymaps.module_names`."""
    modules: dict[str, float] = {}
    shared: dict[str, float] = {}
    for name, value in sorted(facts.items()):
        key = parse_lora_key(name)
        if key is not None and key.part == ALPHA and value not in _NO_ALPHA:
            place, by = (modules, known(key.module, names)) if key.module else (shared, name)
            place[by] = _positive(value, name, source)
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
            compiled[re.compile(rf"(.*\.)?({pattern})")] = number
        except (re.error, RecursionError, OverflowError):
            slow = True
        else:
            slow = len(pattern) > _LONGEST_PATTERN or bool(_SLOW.search(pattern))
        if slow:
            raise WeightsError(
                f"{source}: expected simple patterns of modules' names in {label}, found {pattern!a:.80}"
            )
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
