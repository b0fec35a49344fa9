"""What a Python on the virtual GPU does at its start: it waits for the imports of torch and of the kernels."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from virtual_gpu.names import extension


class _Finder(MetaPathFinder):
    """Finds the compiled modules in the build for CUDA, and goes on where torch's or the kernels' import ends."""

    def __init__(self) -> None:
        self._then: dict[str, Callable[[], object]] = {"torch": _torch_is_there, "echo_rt._ops": _kernels_are_there}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, module = name.rpartition(".")
        if package == "echo_rt" and module in ("_C", "_ops"):
            spec = importlib.util.spec_from_file_location(name, extension("cuda", module))
        elif name in self._then:
            sys.meta_path.remove(self)  # or it would find itself
            spec = importlib.util.find_spec(name)
            sys.meta_path.insert(0, self)
        else:
            return None
        if spec is not None and name in self._then:
            _go_on(spec, self._then.pop(name))
        return spec


def _go_on(spec: ModuleSpec, then: Callable[[], object]) -> None:
    assert spec.loader is not None
    execute = spec.loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        then()

    spec.loader.exec_module = exec_module  # type: ignore[method-assign]


def _torch_is_there() -> None:
    import torch

    from virtual_gpu.device import device
    from virtual_gpu.operators import override_all
    from virtual_gpu.submission import pause

    device()  # made here, while there is one thread
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        override_all()
    torch.cuda._sleep = pause  # a kernel of torch's own, and no operator


def _kernels_are_there() -> None:
    from virtual_gpu.kernels import override_kernels

    override_kernels(extension("emulated", "_ops"))


def install() -> None:
    sys.meta_path.insert(0, _Finder())
