"""LoRA files: low-rank changes to the transformer's weights, merged into them one tensor at a time.

``W' = W + alpha/rank * B @ A`` in float32, in W's own type afterwards.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from echo_rt.errors import WeightsError
from echo_rt.utils.wording import counted
from echo_rt.weights.files import open_tensors
from echo_rt.weights.generator import LORA_SECTION, split_memory
from echo_rt.weights.shapes import MEMORY_PREFIX
from echo_rt.weights.tensors import Fact, RenamedTensors, TensorFile, first_names, without_wrappers

# PEFT puts the adapter's name, mostly "default", between the factor and "weight", or leaves it out.
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(\.[^.]+)?\.weight")
_ALPHA_KEYS = ("alpha", "lora_alpha")
_ALPHA = re.compile(r"((?P<module>.+)\.)?(lora_)?alpha")


@dataclass(frozen=True)
class _Change:
    """What is added to one weight: ``scale * up @ down``, down ``[rank, in]``, up ``[out, rank]``."""

    down: str
    up: str
    scale: float


@dataclass(frozen=True)
class MergedLora:
    """A transformer with a LoRA merged in, and what else its file brings.

    ``transformer`` computes a changed weight anew whenever it is asked for: take each once. ``memory`` is the LoRA
    file's own memory encoder (names without prefix), which replaces that of the base checkpoint; ``None`` without one.
    """

    path: Path
    transformer: Mapping[str, Tensor]
    memory: Mapping[str, Tensor] | None
    changed: int
    ranks: tuple[int, ...]


class _MergedTensors(Mapping[str, Tensor]):
    def __init__(
        self,
        base: Mapping[str, Tensor],
        lora: Mapping[str, Tensor],
        changes: Mapping[str, _Change],
        device: torch.device | str,
    ) -> None:
        self._base = base
        self._lora = lora
        self._changes = changes
        self._device = device

    def __getitem__(self, name: str) -> Tensor:
        weight = self._base[name]
        change = self._changes.get(name)
        if change is None:
            return weight
        wide, down, up = (
            tensor.to(self._device, torch.float32)
            for tensor in (weight, self._lora[change.down], self._lora[change.up])
        )
        return torch.addmm(wide, up, down, alpha=change.scale).to(weight.dtype)

    def origins(self, name: str) -> list[Tensor]:
        """What the tensor is made of: the weight of before, and the change's factors and scale where it has one."""
        change = self._changes.get(name)
        factors = (
            []
            if change is None
            else [self._lora[change.down], self._lora[change.up], torch.tensor(change.scale, device="cpu")]
        )
        return [self._base[name], *factors]

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)

    def __contains__(self, name: object) -> bool:
        return name in self._base


def merge_lora(
    transformer: Mapping[str, Tensor], path: str | Path, *, device: torch.device | str = "cpu"
) -> MergedLora:
    """``transformer`` (original names) with the LoRA in ``path`` merged in; nothing is computed yet.

    A changed weight is computed on ``device`` and stays there, the others come as they are in ``transformer``.

    The file is a dict with ``generator_lora`` and perhaps ``query_memory_encoder``, or PEFT's own keys bare. The rank
    is that of the factors; alpha is the rank unless the file says otherwise (``alpha``, ``lora_alpha``,
    ``<module>.alpha``).

    Errors: ``WeightsError``, naming keys, for a file without a LoRA, factors that fit no weight of the transformer,
    a factor without its partner, shapes that do not multiply, and any other tensor among them.
    """
    file = open_tensors(path)
    source = str(file.path)
    lora, memory = _split(file)
    pairs, alphas = _sort(lora, source)
    if not pairs:
        came = counted(len(file), "tensor")
        raise WeightsError(f"{source}: expected a LoRA (lora_A and lora_B), came {came} without any")
    alphas = _alphas_in(file.facts, source) | alphas
    unpaired = [name for pair in pairs.values() if len(pair) == 1 for name in pair.values()]
    _refuse(unpaired, f"{source}: expected lora_A and lora_B in pairs", "without a partner")
    unknown = [module for module in pairs if f"{module}.weight" not in transformer]
    _refuse(unknown, f"{source}: expected changes to this transformer", "to modules that it does not have")
    stray = [module for module in alphas if module and module not in pairs]
    _refuse(stray, f"{source}: expected alphas of changed modules", "of others")

    changes: dict[str, _Change] = {}
    ranks: set[int] = set()
    for module, pair in pairs.items():
        target = f"{module}.weight"
        rank = _rank(lora, pair, transformer[target].shape, source)
        alpha = alphas.get(module, alphas.get("", float(rank)))
        changes[target] = _Change(down=pair["A"], up=pair["B"], scale=alpha / rank)
        ranks.add(rank)
    return MergedLora(
        path=file.path,
        transformer=_MergedTensors(transformer, lora, changes, device),
        memory=memory or None,
        changed=len(changes),
        ranks=tuple(sorted(ranks)),
    )


def _split(file: TensorFile) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """The LoRA's tensors under bare names, and those of a memory encoder without its prefix."""
    prefix = f"{LORA_SECTION}."
    if not any(name.startswith(prefix) for name in file):
        return split_memory(file, str(file.path))
    # The other dicts of a training checkpoint (critic, optimizer) are no part of the generator.
    own = {name.removeprefix(prefix): name for name in file if name.startswith(prefix)}
    beside = {name: name for name in file if without_wrappers(name).startswith(MEMORY_PREFIX) or name in _ALPHA_KEYS}
    return split_memory(RenamedTensors(file, own | beside), str(file.path))


def _sort(lora: Mapping[str, Tensor], source: str) -> tuple[dict[str, dict[str, str]], dict[str, float]]:
    """By module: the names of its factors under ``A`` and ``B``, and the alphas that are tensors."""
    pairs: dict[str, dict[str, str]] = {}
    alphas: dict[str, float] = {}
    others: list[str] = []
    for name in lora:
        factor, alpha = _FACTOR.fullmatch(name), _ALPHA.fullmatch(name)
        if factor:
            pair = pairs.setdefault(factor["module"], {})
            if factor["factor"] in pair:
                raise WeightsError(f"{source}: expected one adapter, came {pair[factor['factor']]} and {name}")
            pair[factor["factor"]] = name
        elif alpha and lora[name].numel() == 1:
            alphas[alpha["module"] or ""] = _number(lora[name].item(), name, source)
        else:
            others.append(name)
    if pairs:
        _refuse(others, f"{source}: expected LoRA factors only", "of something else")
    return pairs, alphas


def _alphas_in(facts: Mapping[str, Fact], source: str) -> dict[str, float]:
    """Alphas that are no tensors, by module; the one under ``""`` is for all modules without their own."""
    alphas: dict[str, float] = {}
    for name, value in facts.items():
        alpha = _ALPHA.fullmatch(without_wrappers(name.removeprefix(f"{LORA_SECTION}.")))
        if alpha:
            alphas[alpha["module"] or ""] = _number(value, name, source)
    return alphas


def _rank(lora: Mapping[str, Tensor], pair: Mapping[str, str], shape: Sequence[int], source: str) -> int:
    """The rank of a pair of factors whose product has this shape; ``WeightsError`` for any other pair."""
    down, up = lora[pair["A"]].shape, lora[pair["B"]].shape
    rank = down[0] if len(down) == 2 else 0
    if len(shape) != 2 or rank < 1 or tuple(up) != (shape[0], rank) or down[1] != shape[1]:
        raise WeightsError(
            f"{source}: expected factors of a weight {list(shape)}, "
            f"came {pair['B']} {list(up)} and {pair['A']} {list(down)}"
        )
    return rank


def _number(value: Fact, name: str, source: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise WeightsError(f"{source}: expected {name} to be a number above 0, came {value!r}")
    return number


def _refuse(names: Sequence[str], expected: str, fault: str) -> None:
    if names:
        raise WeightsError(f"{expected}, came {len(names)} {fault}: {first_names(names)}")
