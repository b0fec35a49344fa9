"""Weights stored in float8, with or without scales, widened when they are read.

Scales have two spellings, both ComfyUI's: ``<module>.scale_weight`` beside one tensor ``scaled_fp8`` that marks the
file, and ``<module>.weight_scale`` beside ``<module>.comfy_quant``, the name of the format as bytes of JSON. Scales
of inputs (``scale_input``, ``input_scale``) are for float8 products of activations; no weight depends on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from echo_rt.errors import WeightsError
from echo_rt.utils.checked_json import read_json
from echo_rt.utils.wording import plain
from echo_rt.weights.tensors import LazyTensors, Outline, Stored, first_names

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)

_SCALES = ("scale_weight", "weight_scale")
_FILE_MARK, _LAYER_MARK = "scaled_fp8", "comfy_quant"
_BESIDE = (*_SCALES, "scale_input", "input_scale", _FILE_MARK, _LAYER_MARK)
_LONGEST_MARK = 2**16


@dataclass
class _Mark:
    format: str


def widened(tensors: LazyTensors, path: Path, dtype: torch.dtype) -> LazyTensors:
    """``tensors`` of the file ``path`` with float8 weights widened to ``dtype``; as they are where it has none.

    Errors: ``WeightsError`` for a file that says it is scaled and lacks scales, scales that fit no float8 weight, and
    layers in another quantized format.
    """
    outlines = {name: entry.outline for name, entry in tensors.entries.items()}
    float8 = {name for name, outline in outlines.items() if outline.dtype in FLOAT8}
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
            found = plain(outlines[weight].dtype) if weight in tensors else "none"
            raise WeightsError(f"{path}: expected {weight} in float8 beside {scale}, found {found}")
        shape, sizes, kind = outlines[weight].shape, outlines[scale].shape, outlines[scale].dtype
        rows = shape[0] if shape else 1
        if not kind.is_floating_point or sizes not in ((), (1,), (1, 1), (rows,), (rows, *[1] * (len(shape) - 1))):
            raise WeightsError(
                f"{path}: expected {scale} to be one real number or one of each of {rows} rows, "
                f"found {list(sizes)} of {plain(kind)}"
            )
    # Unless layers say of themselves that they are scaled, all are where one is, in a file without the mark too.
    every = marked or (bool(scales) and not layers)
    scaled = {name for name in float8 if name.endswith(".weight")} if every else float8.intersection(layers.values())
    if lacking := sorted(scaled - scales.keys()):
        raise WeightsError(
            f"{path}: expected a scale for each weight of a scaled float8 file, found none for {len(lacking)} "
            f"({first_names(lacking)})"
        )
    entries = {name: tensors.entries[name] for name, (_, _, last) in ends.items() if last not in _BESIDE}
    for name in float8 & entries.keys():
        scale_entry = tensors.entries[scales[name]] if name in scales else None
        read = partial(_widened, tensors.entries[name], scale_entry, dtype)
        entries[name] = Stored(read, Outline(outlines[name].shape, dtype, outlines[name].dense))
    return LazyTensors(entries)


def _widened(weight: Stored, scale: Stored | None, dtype: torch.dtype) -> Tensor:
    tensor = weight.read()
    if scale is None:
        return tensor.to(dtype)
    return (tensor.float() * scale.read().float().reshape(-1, *[1] * (tensor.ndim - 1))).to(dtype)


def _check_format(mark: Tensor, name: str, path: Path) -> None:
    expected = f"{path}: expected {name} to name a format as JSON"
    if mark.layout != torch.strided or mark.dtype != torch.uint8 or mark.numel() > _LONGEST_MARK:
        raise WeightsError(f"{expected}, found {list(mark.shape)} values of {plain(mark.dtype)}")
    found = read_json(bytes(mark.flatten().tolist()), _Mark, f"{expected}, found something else", WeightsError).format
    if found not in map(plain, FLOAT8):
        raise WeightsError(
            f"{path}: expected 16- or 32-bit weights, float8 or a GGUF file, "
            f"found ComfyUI's format {found!r:.80} ({name})"
        )
