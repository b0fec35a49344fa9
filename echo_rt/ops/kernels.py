"""The hand-written kernels as a backend: ``cuda`` on a GPU, ``emulated`` where the same sources run on the host.

Importing this module loads ``echo_rt._ops``, which registers ``torch.ops.echo_rt.*`` (schemas: ``bindings/ops.cpp``).
The module is a namespace over them, with one function for each of :data:`echo_rt.ops.schema.OPERATIONS`; the bindings
check the arguments and raise ValueError. Its definition tells ``torch.compile`` and ``torch.export`` what each returns.
"""

from __future__ import annotations

import torch

from echo_rt import _ops
from echo_rt.ops import reference
from echo_rt.ops.schema import OPERATIONS

name: str = _ops.BACKEND

# Head sizes that memory_attention has tensor-core tiles for.
HEAD_SIZES = (64, 128)

for _operation in OPERATIONS:
    globals()[_operation] = getattr(torch.ops.echo_rt, _operation).default
    torch.library.register_fake(f"echo_rt::{_operation}", getattr(reference, _operation))
