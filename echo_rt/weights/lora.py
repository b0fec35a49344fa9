"""LoRAs merged into the transformer's weights, one tensor at a time.

``W' = W + strength * (alpha/rank * B @ A + difference)`` for each of them, in float32. The sum stays float32: it is
rounded once, to the dtype that is computed in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from echo_rt.errors import WeightsError
from echo_rt.options import Lora, lora_files
from echo_rt.weights.lora_file import LoraFile, Term
from echo_rt.weights.tensors import LazyTensors, Outline, outline_of


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


class _MergedTensors(LazyTensors):
    def __init__(
        self, base: Mapping[str, Tensor], terms: Mapping[str, Sequence[Term]], device: torch.device | str
    ) -> None:
        super().__init__(base)
        self._base, self._terms, self._device = base, terms, device

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._base[name]
        if name in self._terms:
            tensor = tensor.to(self._device, torch.float32)
            for term in self._terms[name]:
                tensor = term.added_to(tensor)
        return tensor

    def outline(self, name: str) -> Outline:
        base = outline_of(self._base, name)
        return base._replace(dtype=torch.float32) if name in self._terms else base

    def origins(self, name: str) -> list[Tensor]:
        return [self._base[name], *(origin for term in self._terms.get(name, ()) for origin in term.origins())]


def merge_lora(
    transformer: Mapping[str, Tensor], lora: Lora, *, alpha: float | None = None, device: torch.device | str = "cpu"
) -> MergedLora:
    """``transformer`` (original names) with the LoRAs of ``lora`` merged in, in order; nothing is computed yet.

    A changed tensor is computed on ``device`` and stays there, the others come as they are in ``transformer``.

    Each path is a weight file, or a folder of PEFT or diffusers. Its keys are in any naming of :mod:`.keymaps`,
    perhaps below ``generator_lora``; beside them may be a ``query_memory_encoder``. The rank is that of the factors.
    Alpha is what the file says (tensors, header, facts, PEFT's config), ``alpha`` where it says nothing, and the rank
    where neither does.

    Errors: ``WeightsError``, naming keys, for a file without a LoRA, one of another model or method, factors that lack
    a partner or do not fit, any other tensor among them, alphas that disagree, and two memory encoders.
    """
    loras = lora_files(lora)
    files = [LoraFile(path, transformer) for path, _ in loras]
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
    return MergedLora(loras, _MergedTensors(transformer, terms, device), memory, memory_path)
