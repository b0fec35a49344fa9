"""The KV buffer in a snapshot: without what can be computed again, a quarter of the file at the released size.

    rollout.kv.memory [1, 2, memory rows, H, d]     keys and values, which all layers share
    rollout.kv.sink   [layers, 1, sink rows, H, d]  values; the keys are rotated again from ``rollout.sink_k``
    rollout.kv.ring   [layers, 2, ring rows, H, d]  keys and values

Where that would not give the very bits, the memory is stored for every layer, or the sink with its keys: until ids
shift for the first time, sink keys are those of another kernel, which rounds once less. Snapshots of format 1 have all
of the buffer in one tensor, ``rollout.kv``. Layers that attend in float8 are not among these: ``rollout.kv_float8`` has
their whole buffer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

KV, MEMORY, SINK, RING = "rollout.kv", "rollout.kv.memory", "rollout.kv.sink", "rollout.kv.ring"
_INTEGERS = {2: torch.int16, 4: torch.int32}  # by element size


def split_kv(tensors: Mapping[str, Tensor], memory: int, sink: int) -> dict[str, Tensor]:
    """``tensors`` with three views in place of the KV buffer, if it is whole; numbers of rows of memory and sink."""
    kv = tensors.get(KV)
    if kv is None or kv.dim() != 5 or {MEMORY, SINK, RING} & set(tensors):
        return dict(tensors)
    rows = kv.split([memory, sink, kv.shape[2] - memory - sink], dim=2) if kv.shape[2] >= memory + sink else [kv] * 3
    return {name: tensor for name, tensor in tensors.items() if name != KV} | dict(
        zip((MEMORY, SINK, RING), rows, strict=True)
    )


def shapes_in_snapshots(name: str, shape: torch.Size) -> list[tuple[int, ...]]:
    """The shapes that a snapshot may have a tensor in; ``shape``: that of the live one."""
    shared = {MEMORY: 0, SINK: 1}.get(name)
    return [tuple(shape)] + ([] if shared is None else [(*shape[:shared], 1, *shape[shared + 1 :])])


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of a 16- or 32-bit dtype are equal to the bit; NaN equals itself here, 0.0 is not -0.0."""
    integers = _INTEGERS[one.element_size()]
    return torch.equal(one.view(integers), other.view(integers))


def copy_rows(target: Tensor, source: Tensor) -> None:
    """Copy between host and device. The buffer goes layer by layer: torch copies what is not contiguous twice."""
    source = source.expand_as(target)
    pairs = [(target, source)]
    if target.dim() == 5:
        pairs = [(to[side], of[side]) for to, of in zip(target, source, strict=True) for side in range(len(to))]
    for to, of in pairs:
        to.copy_(of, non_blocking=True)
