"""Alphas and ranks that LoRA files state beside their tensors: in header fields, facts and PEFT's configs."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from echo_rt.errors import WeightsError
from echo_rt.weights.files import read_object
from echo_rt.weights.keymaps import ALPHA, known, parse_lora_key
from echo_rt.weights.tensors import Fact

# PEFT's config: its file beside the tensors, and the header field in which diffusers stores it as JSON.
_CONFIG_FILE, _CONFIG_IN_HEADER = "adapter_config.json", "lora_adapter_metadata"
# Values of sd-scripts that state nothing: every module has an alpha tensor then.
_NO_ALPHA = ("Dynamic", "None", "")
# Initializations that leave the base weights as they are; PEFT's others (PiSSA, OLoRA, ...) change them.
_PLAIN_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Stated:
    """A number (alpha or rank) that one place in a file states, for single modules or as the default of all.

    ``label`` names the place in messages. ``patterns`` are PEFT's: regular expressions for the end of a module's name.
    """

    label: str
    default: float | None = None
    modules: Mapping[str, float] = field(default_factory=dict)
    patterns: Mapping[str, float] = field(default_factory=dict)

    def of(self, module: str, written: str) -> float | None:
        """The number for ``module``, which the file calls ``written``; None where nothing is stated."""
        for pattern, number in self.patterns.items():
            if re.fullmatch(rf"(.*\.)?({pattern})", written):
                return number
        return self.modules.get(module, self.default)


def _positive(value: Any, name: str, source: str) -> float:
    """``value`` as a finite number above 0; raises ``WeightsError``."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise WeightsError(f"{source}: expected {name} to be a number above 0, found {value!r}")
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


class AdapterConfig(NamedTuple):
    """Alphas and ranks of PEFT's config; ``rank_stabilized``: alpha is divided by the square root of the rank."""

    alpha: Stated
    rank: Stated
    rank_stabilized: bool


def adapter_configs(file: Path, facts: Mapping[str, Fact], source: str) -> list[AdapterConfig]:
    """PEFT's configs beside ``file`` and in its header; ``WeightsError`` for another method than LoRA."""
    configs: dict[str, Mapping[str, Any]] = {}
    path = file.parent / _CONFIG_FILE
    if os.path.exists(path):
        configs[_CONFIG_FILE] = read_object(path, "PEFT's config of an adapter")
    text = facts.get(_CONFIG_IN_HEADER)
    if text is not None:
        try:
            fields = json.loads(str(text)).items()
        except (ValueError, AttributeError, RecursionError):
            raise WeightsError(
                f"{source}: expected {_CONFIG_IN_HEADER} to be a JSON object, found {text!a:.80}"
            ) from None
        configs[_CONFIG_IN_HEADER] = {name.removeprefix("transformer."): value for name, value in fields}
    return [_adapter_config(fields, label, source) for label, fields in configs.items()]


def _adapter_config(fields: Mapping[str, Any], label: str, source: str) -> AdapterConfig:
    method = "DoRA" if fields.get("use_dora") else fields.get("peft_type") or "LORA"
    if method != "LORA":
        raise WeightsError(f"{source}: expected a LoRA, found {method} (in {label})")
    if fields.get("init_lora_weights") not in _PLAIN_BEGINNINGS:
        raise WeightsError(
            f"{source}: expected a LoRA of unchanged base weights, found init_lora_weights "
            f"{fields['init_lora_weights']!r} (in {label}); let PEFT convert it"
        )
    alpha, rank = (
        _stated(fields, name, pattern, f"{name} of {label}", source)
        for name, pattern in (("lora_alpha", "alpha_pattern"), ("r", "rank_pattern"))
    )
    return AdapterConfig(alpha, rank, bool(fields.get("use_rslora")))


def _stated(fields: Mapping[str, Any], name: str, pattern: str, label: str, source: str) -> Stated:
    value, patterns = fields.get(name), fields.get(pattern) or {}
    try:
        checked = {key: _positive(number, f"{label} ({key})", source) for key, number in patterns.items()}
        for key in checked:
            re.compile(key)
    except (AttributeError, re.error) as error:
        raise WeightsError(f"{source}: expected {pattern} to map patterns of names to numbers ({error})") from None
    return Stated(label, None if value is None else _positive(value, label, source), patterns=checked)
