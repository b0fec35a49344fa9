"""echo-rt's own kernels on the virtual GPU: launched by their bindings, computed by the emulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from virtual_gpu.device import device
from virtual_gpu.names import EMULATED
from virtual_gpu.operators import override
from virtual_gpu.submission import submit, tensors_of


def override_kernels(emulated: Path) -> int:
    """Every operator of ``echo_rt``, whose CUDA build is loaded, by that of the library ``emulated``."""
    torch.ops.load_library(emulated)
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("echo_rt::")]
    for name in names:
        _override(name.partition("::")[2])
    return len(names)


def _override(name: str) -> None:
    op = getattr(torch.ops.echo_rt, name).default
    compute = getattr(getattr(torch.ops, EMULATED), name).default
    original = torch.library.get_kernel(op, "CUDA")

    def launch(keys: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        # The binding checks its arguments, makes its results and launches; the launch is checked, and computes nothing.
        with device().launches_computed_beside():
            made = original.call_boxed(keys, *args, **kwargs)
        submit(f"echo_rt::{name}", compute, args, kwargs, tensors_of(made))
        return made

    override(op, launch, with_keyset=True)
