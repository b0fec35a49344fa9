"""The backends that implement the operations: which are available, and which one a model gets."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import cast

import torch

from echo_rt.errors import BackendError, not_one_of
from echo_rt.ops.schema import Ops
from echo_rt.utils.build_info import __version__
from echo_rt.utils.wording import plain

BACKENDS = ("torch", "emulated", "cuda")
BACKEND_VARIABLE = "ECHO_RT_BACKEND"


def available_backends() -> dict[str, str]:
    """Map each backend's name to ``"available"``, or to why it is not and what to do about it.

    ``emulated`` executes the CUDA kernels on the host: slow, for tests and development.
    """
    built, problem = _kernels_built()
    if built == "cuda":
        emulated = "this build has the kernels for the GPU instead; ECHO_RT_BUILD=emulated when installing chooses"
    else:
        emulated = problem or "available"
    if torch.version.cuda is None:
        cuda = f"needs a CUDA build of torch, and this is {torch.__version__}; install one, then echo-rt again"
    elif built == "emulated":
        cuda = "this build has the emulated kernels; with nvcc on the PATH (or CUDA_HOME set), install echo-rt again"
    elif problem:
        cuda = problem
    else:
        cuda = (
            "available" if torch.cuda.is_available() else "torch sees no GPU; install an NVIDIA driver, see nvidia-smi"
        )
    return {"torch": "available", "emulated": emulated, "cuda": cuda}


def _kernels_built() -> tuple[str, str]:
    """Return the backend that the kernels were compiled for, and ""; or "" and why there are none."""
    rebuild = "install echo-rt again: pip install --no-build-isolation ."
    try:
        import echo_rt._ops as _ops
    except ModuleNotFoundError:
        return "", (
            "this build has no kernels, as torch was not there when it was compiled (or ECHO_RT_BUILD was none); with "
            f"torch, setuptools, pybind11 and a C++ compiler installed, {rebuild}"
        )
    except ImportError as error:
        reason = str(error).partition("\n")[0]
        return "", f"the kernels do not load: {reason}; they may be compiled for another torch: {rebuild}"
    if __version__ != _ops.VERSION:
        return "", f"the kernels are those of version {_ops.VERSION}, and this is {__version__}; {rebuild}"
    # torch keeps its C++ interface from patch to patch, not from one minor version to the next.
    compiled, found = (version.split(".")[:2] for version in (_ops.TORCH, torch.__version__))
    if compiled != found:
        return "", f"the kernels were compiled with torch {_ops.TORCH}, and this is {torch.__version__}; {rebuild}"
    return _ops.BACKEND, ""


def load_ops(backend: str) -> Ops:
    """Return the operations of ``backend``; :class:`BackendError` if it is unknown or not available."""
    if backend not in BACKENDS:
        raise BackendError(not_one_of("backend", BACKENDS, backend))
    status = available_backends()[backend]
    if status != "available":
        raise BackendError(f"backend {backend!r} is not available: {status}")
    if backend == "torch":
        from echo_rt.ops import reference

        return cast(Ops, reference)
    from echo_rt.ops import kernels

    return cast(Ops, kernels)


@dataclass(frozen=True)
class Backend:
    """The operations that a model gets, and why.

    ``by_name``: its user asked for them; ``fallback``: they are torch's on a GPU, as no kernels can be used.
    """

    ops: Ops
    reason: str
    by_name: bool = False
    fallback: bool = False

    @property
    def name(self) -> str:
        """Name of the backend, one of :data:`BACKENDS`."""
        return self.ops.name


def choose_backend(
    requested: str | None,
    device: torch.device,
    *,
    memory: tuple[torch.dtype, int] | None = None,
    prescribed: str | None = None,
) -> Backend:
    """Choose the backend ``requested`` by name, or else ``prescribed`` by a snapshot, or else by the environment.

    Where none is named: ``cuda`` on a GPU that the kernels were built for, ``torch`` elsewhere and where the kernels do
    not support the memory update. ``memory``: dtype and head size of a memory that evolves, or None. Raises
    :class:`BackendError` where the named one is not available or does not run: there is no fallback for it.
    """
    if requested is not None:
        return Backend(_able(requested, device, memory), "asked for by name", by_name=True)
    if prescribed is not None:
        try:
            return Backend(_able(prescribed, device, memory), "as in the snapshot")
        except BackendError as error:
            raise BackendError(
                f"{error}. The snapshot's video was made with it; "
                "name another with backend= (--backend) to go on, rounded otherwise"
            ) from error
    if named := os.environ.get(BACKEND_VARIABLE):
        try:
            return Backend(_able(named, device, memory), f"{BACKEND_VARIABLE} names it")
        except BackendError as error:
            raise BackendError(f"{BACKEND_VARIABLE}: {error}") from error
    if device.type != "cuda":
        return Backend(load_ops("torch"), f"the device is {device}")
    try:
        return Backend(_able("cuda", device, memory), f"the kernels are built for {device}")
    except BackendError as error:
        return Backend(load_ops("torch"), str(error).partition("; choose memory")[0], fallback=True)


def _able(name: str, device: torch.device, memory: tuple[torch.dtype, int] | None) -> Ops:
    """Return the operations of ``name``; :class:`BackendError` where they do not run on ``device``."""
    check_device(ops := load_ops(name), device)
    if memory is not None:
        check_memory(ops, *memory)
    return ops


def check_memory(ops: Ops, dtype: torch.dtype, head_dim: int) -> None:
    """Raise :class:`BackendError` where the backend has no memory update for ``dtype`` and head size.

    Called when a model is loaded: the first update comes only blocks later.
    """
    if ops.name == "torch":
        return
    from echo_rt.ops.kernels import HEAD_SIZES

    if dtype == torch.float32 or head_dim not in HEAD_SIZES:
        raise BackendError(
            f"backend {ops.name!r} updates the memory in bfloat16 or float16 with heads of {HEAD_SIZES}, "
            f"got {plain(dtype)} and {head_dim}; choose memory 'prior' or 'off', or backend 'torch'"
        )


def check_device(ops: Ops, device: torch.device) -> None:
    """Raise :class:`BackendError` where the backend's operations cannot run on ``device``.

    Called when a model is loaded: on a GPU that the kernels were not compiled for, the first launch would fail.
    """
    needed = {"emulated": "cpu", "cuda": "cuda"}.get(ops.name, device.type)
    if device.type != needed:
        raise BackendError(
            f"backend {ops.name!r} runs on device {needed!r}, got {str(device)!r}; choose another of them"
        )
    if ops.name != "cuda":
        return
    import echo_rt._ops as _ops

    major, minor = torch.cuda.get_device_capability(device)
    built = _ops.CUDA_ARCHS.split()
    if not any(_runs_on(architecture, major, minor) for architecture in built):
        raise BackendError(
            f"this build has kernels for {', '.join(f'sm_{a}' for a in built)}, and {device} is sm_{major}{minor}; "
            "where this GPU is visible, install echo-rt again: pip install --no-build-isolation ."
        )


def _runs_on(architecture: str, major: int, minor: int) -> bool:
    """Whether machine code for ``"80"`` or ``"90a"`` runs on a GPU; the build has no PTX to translate."""
    number = int(architecture.rstrip("a"))
    if architecture.endswith("a"):
        return number == 10 * major + minor
    return number // 10 == major and number % 10 <= minor
