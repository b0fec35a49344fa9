"""``.gguf`` files, read through the package gguf: a tensor is dequantized when it is used."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from echo_rt.errors import BackendError, WeightsError
from echo_rt.utils.wording import one_line
from echo_rt.weights.reading import not_opened, reason_of
from echo_rt.weights.tensors import LazyTensors, Outline, Stored, TensorFile

GGUF_MAGIC = b"GGUF"
# Values of general.architecture: Wan's transformer, umT5 by both its names, and converters that name no model.
_ARCHITECTURES = ("wan", "t5", "t5encoder", "pig", "cow")
_ARCHITECTURE = "general.architecture"
_SHAPE_FIELD = "comfy.gguf.orig_shape."  # of a tensor that was reshaped to be quantized
_VALUES_AT_ONCE = 2**24
_STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_STORED |= {"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}


def open_gguf(path: Path, widen_to: torch.dtype) -> TensorFile:
    """The tensors of one file; quantized ones are computed in float32 and come as ``widen_to``, the others as stored.

    Errors: ``BackendError`` without the package gguf; ``WeightsError`` for a damaged file and for another model's.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise BackendError(
            f"{path}: expected the package gguf to read this GGUF file with, found none (pip install 'echo-rt[gguf]')"
        ) from None

    class Reader(GGUFReader):  # type: ignore[misc]
        """Ends where the file ends; its parent goes on through counts of any size in a damaged file."""

        def _get(self, offset: int, dtype: Any, count: int = 1, *args: Any, **kwargs: Any) -> Any:
            if offset + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError("it ends amid a value")
            return super()._get(offset, dtype, count, *args, **kwargs)

    try:
        reader = Reader(path, "c")  # torch wants memory that it may write to; the file stays as it is
        # Arrays are left alone: a tokenizer's vocabulary is long.
        found = {name: field.contents() for name, field in reader.fields.items() if len(field.types) == 1}
        facts = {name: value.item() if isinstance(value, np.generic) else value for name, value in found.items()}
        entries = {}
        for entry in reader.tensors:
            outline = Outline(_shape(reader, entry), _STORED.get(entry.tensor_type.name, widen_to))
            entries[entry.name] = Stored(partial(_read, entry, outline), outline)
        if sum(int(entry.n_bytes) for entry in reader.tensors) > path.stat().st_size:
            raise ValueError("its tensors lie upon one another")
    except Exception as error:  # the package fails with whatever damaged bytes lead to
        raise not_opened(path, error, "a GGUF file", f"a damaged or truncated one ({reason_of(error)})") from error
    architecture = facts.get(_ARCHITECTURE)
    if architecture is not None and architecture not in _ARCHITECTURES:
        raise WeightsError(f"{path}: expected a GGUF file of Wan2.1 or umT5, found one of {architecture!a:.60}")
    return TensorFile(path, LazyTensors(entries), facts)


def _read(entry: Any, outline: Outline) -> Tensor:
    try:
        if entry.data.dtype != np.uint8:
            return torch.from_numpy(entry.data).reshape(outline.shape)
        return _dequantized(entry, outline.dtype).reshape(outline.shape)
    except (NotImplementedError, TypeError, ValueError, ZeroDivisionError) as error:
        raise WeightsError(f"{entry.name}: expected a type that gguf dequantizes, {one_line(error)}") from error


def _dequantized(entry: Any, dtype: torch.dtype) -> Tensor:
    """The tensor's rows in ``dtype``, some at a time: umT5's token table is a thousand million values."""
    from gguf import quants

    rows = entry.data.reshape(-1, entry.data.shape[-1])
    step = max(1, _VALUES_AT_ONCE * len(rows) // entry.n_elements)
    values = torch.empty(len(rows), entry.n_elements // len(rows), dtype=dtype, device="cpu")
    for at in range(0, len(rows), step):
        values[at : at + step] = torch.from_numpy(quants.dequantize(rows[at : at + step], entry.tensor_type))
    return values


def _shape(reader: Any, entry: Any) -> tuple[int, ...]:
    """The tensor's shape as torch has it; GGUF counts dimensions from the last."""
    field = reader.get_field(f"{_SHAPE_FIELD}{entry.name}")
    sizes = tuple(int(size) for size in (reversed(entry.shape.tolist()) if field is None else field.contents()))
    if np.prod(sizes, dtype=object) != entry.n_elements:
        raise ValueError(f"{entry.name} has {entry.n_elements} values, not {sizes}")
    return sizes
