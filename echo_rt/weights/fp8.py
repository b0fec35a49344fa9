"""Weights stored in float8, with or without scales, widened when they are read.

Scales have two spellings, both ComfyUI's: ``<module>.scale_weight`` beside one tensor ``scaled_fp8`` that marks the
file, and ``<module>.weight_scale`` beside ``<module>.comfy_quant``, the name of the format as bytes of JSON. Scales
of inputs (``scale_input``, ``input_scale``) are for float8 products of activations; no weight depends on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from echo_rt.errors import WeightsError
from echo_rt.utils.checked_json import read_json
from echo_rt.utils.wording import plain
from echo_rt.weights.tensors import LazyTensors, Outline, first_names, outline_of

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)

_SCALES = ("scale_weight", "weight_scale")
_FILE_MARK, _LAYER_MARK = "scaled_fp8", "comfy_quant"
_BESIDE = (*_SCALES, "scale_input", "input_scale", _FILE_MARK, _LAYER_MARK)
_FORMATS = ("float8_e4m3fn", "float8_e5m2")
_LONGEST_MARK = 2**16


@dataclass
class _Mark:
    format: str


class WidenedTensors(LazyTensors):
    """``tensors`` with the float8 ones among them in ``dtype``, times their scales; the rest as they are."""

    def __init__(self, tensors: Mapping[str, Tensor], scales: Mapping[str, str], dtype: torch.dtype) -> None:
        super().__init__({name: None for name in tensors if name.rpartition(".")[2] not in _BESIDE})
        self._tensors, self._scales, self._dtype = tensors, scales, dtype

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        if tensor.dtype not in FLOAT8:
            return tensor
        if name not in self._scales:
            return tensor.to(self._dtype)
        scale = self._tensors[self._scales[name]].float().flatten()
        return (tensor.float() * scale.reshape(-1, *[1] * (tensor.ndim - 1))).to(self._dtype)

    def outline(self, name: str) -> Outline:
        stored = outline_of(self._tensors, name)
        return stored._replace(dtype=self._dtype) if stored.dtype in FLOAT8 else stored


def widened(tensors: Mapping[str, Tensor], path: Path, dtype: torch.dtype) -> Mapping[str, Tensor]:
    """``tensors`` of the file ``path`` with float8 weights widened to ``dtype``; as they are where it has none.

    Errors: ``WeightsError`` for a file that says it is scaled and lacks scales, scales that fit no float8 weight, and
    layers in another quantized format.
    """
    float8 = {name for name in tensors if outline_of(tensors, name).dtype in FLOAT8}
    ends = {name: name.rpartition(".") for name in tensors}
    marked = any(last == _FILE_MARK for _, _, last in ends.values())
    layers = {name: f"{module}.weight" for name, (module, _, last) in ends.items() if last == _LAYER_MARK}
    scales = {f"{module}.weight": name for name, (module, _, last) in ends.items() if last in _SCALES}
    if not (float8 or marked or layers or scales):
        return tensors
    for name in layers:
        _check_format(tensors[name], name, path)
    for weight, scale in scales.items():
        if weight not in float8:
            found = plain(outline_of(tensors, weight).dtype) if weight in tensors else "none"
            raise WeightsError(f"{path}: expected {weight} in float8 beside {scale}, found {found}")
        shape, sizes = outline_of(tensors, weight).shape, outline_of(tensors, scale).shape
        rows = shape[0] if shape else 1
        if sizes not in ((), (1,), (1, 1), (rows,), (rows, *[1] * (len(shape) - 1))):
            raise WeightsError(
                f"{path}: expected {scale} to be one number or one of each of {rows} rows, found {list(sizes)}"
            )
    # Unless layers say of themselves that they are scaled, all are where one is, in a file without the mark too.
    every = marked or (bool(scales) and not layers)
    scaled = {name for name in float8 if name.endswith(".weight")} if every else float8.intersection(layers.values())
    lacking = sorted(scaled - scales.keys())
    if lacking:
        raise WeightsError(
            f"{path}: expected a scale for each weight of a scaled float8 file, found none for {len(lacking)} "
            f"({first_names(lacking)})"
        )
    return WidenedTensors(tensors, scales, dtype)


def _check_format(mark: Tensor, name: str, path: Path) -> None:
    expected = f"{path}: expected {name} to name a format as JSON"
    if mark.layout != torch.strided or mark.dtype != torch.uint8 or mark.numel() > _LONGEST_MARK:
        raise WeightsError(f"{expected}, found {list(mark.shape)} values of {plain(mark.dtype)}")
    found = read_json(bytes(mark.flatten().tolist()), _Mark, f"{expected}, found something else", WeightsError).format
    if found not in _FORMATS:
        raise WeightsError(
            f"{path}: expected 16- or 32-bit weights, float8 or a GGUF file, "
            f"found ComfyUI's format {found!r:.80} ({name})"
        )
