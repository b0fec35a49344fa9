"""Device and dtype names, checked."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from echo_rt.errors import BackendError, ConfigError
from echo_rt.options import DTYPE_NAMES, VAE_DTYPE_NAMES
from echo_rt.utils.process import require_cuda_usable

FLOAT8 = torch.float8_e4m3fn
# NVIDIA's first architecture whose tensor cores multiply it, as torch numbers them.
_FLOAT8_CAPABILITY = (8, 9)

# A model's dtype by name. float8 is that of its large products; what it otherwise computes in is working_dtype().
_MODEL_DTYPES: dict[str, torch.dtype] = {
    name: FLOAT8 if name == "float8" else getattr(torch, name) for name in DTYPE_NAMES
}
# Those that tensors are computed in.
DTYPES = {name: dtype for name, dtype in _MODEL_DTYPES.items() if dtype != FLOAT8}

# Versions of cuDNN, as numbers, whose 16-bit 3-D convolutions are wrong, or avoided by torch at a high price
# (pytorch issues 163539, 163581, 166643).
_CUDNN_FAULTY = range(90800, 91500)


def parse_device(device: str | torch.device | None) -> torch.device:
    """The torch device; None means the first CUDA GPU where there is one, else the CPU.

    Raises :class:`BackendError` for a device that is not there, :class:`ConfigError` for a name torch does not know.
    """
    if device is None:
        require_cuda_usable()  # or torch would say that there is no GPU, and the CPU be taken
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device must be 'cpu', 'cuda' or 'cuda:N'; got {str(device)!r}") from None
    if parsed.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be 'cpu', 'cuda' or 'cuda:N'; got {str(device)!r}")
    if parsed.type == "cuda":
        require_cuda_usable()
    if parsed.type == "cuda" and not torch.cuda.is_available():
        built = "is built without CUDA" if torch.version.cuda is None else "finds no usable GPU"
        raise BackendError(f"device {str(device)!r} was asked for, but this torch ({torch.__version__}) {built}")
    if parsed.type == "cuda" and (parsed.index or 0) >= torch.cuda.device_count():
        raise BackendError(f"device {str(device)!r} was asked for, but there are {torch.cuda.device_count()} GPUs")
    if str(parsed) == "cuda":
        # Which GPU is the current one is a fact of the thread; a model stays where it was loaded.
        parsed = torch.device("cuda", torch.cuda.current_device())
    return parsed


def require_products(device: torch.device) -> None:
    """Raises :class:`BackendError` for a GPU whose tensor cores do not multiply float8."""
    if device.type != "cuda":
        return
    found = torch.cuda.get_device_capability(device)
    if found < _FLOAT8_CAPABILITY:
        needed, own = ("sm_{}{}".format(*capability) for capability in (_FLOAT8_CAPABILITY, found))
        raise BackendError(
            f"dtype 'float8' needs a GPU that multiplies float8, {needed} or newer (RTX 40, L4, H100), and "
            f"{device} is {own}; choose dtype 'bfloat16'"
        )


def parse_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The model's dtype; None means bfloat16 on a GPU and float32 on a CPU.

    :class:`ConfigError` names the choices; :class:`BackendError` for float8 on a GPU that does not multiply it.
    """
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    for name, known in _MODEL_DTYPES.items():
        if dtype in (name, known):
            if known == FLOAT8:
                require_products(device)
            return known
    raise ConfigError(f"dtype must be one of {', '.join(DTYPE_NAMES)}; got {str(dtype)!r}")


def dtype_name(dtype: torch.dtype | str) -> str:
    """What a user calls a model's ``dtype``, itself or as torch writes it; as it is where no model has it."""
    return next((name for name, known in _MODEL_DTYPES.items() if str(known) == str(dtype)), str(dtype))


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a model of ``dtype`` keeps its state in and computes all in that is not a float8 product."""
    return torch.bfloat16 if dtype == FLOAT8 else dtype


def parse_vae_dtype(vae_dtype: str | torch.dtype | None, dtype: torch.dtype) -> torch.dtype:
    """What a video is decoded in beside a model in ``dtype``; None means the same. :class:`ConfigError` as above."""
    if vae_dtype is None:
        return working_dtype(dtype)
    for name in VAE_DTYPE_NAMES:
        if vae_dtype in (name, DTYPES[name]):
            return DTYPES[name]
    raise ConfigError(f"vae_dtype must be one of {', '.join(VAE_DTYPE_NAMES)}; got {str(vae_dtype)!r}")


# Torch captures one graph at a time in a process, and waiting for the whole device or emptying its cache, which the
# beginning of a capture does, spoils one that is under way, whichever thread it is in.
capturing = threading.RLock()


def capture(
    graph: torch.cuda.CUDAGraph, work: Callable[[], object], *, stream: torch.cuda.Stream, pool: Any | None = None
) -> None:
    """Has ``graph`` capture what ``work`` launches on ``stream``, in memory of ``pool``, or of its own.

    Raises what ``work`` raised, whatever torch then says of a capture that was broken off. After a failure torch may
    believe for ever that ``pool`` is being captured into, and refuse the next capture: its owner needs another one.
    """
    failed: BaseException | None = None
    try:
        # Thread-local: other threads may allocate and launch meanwhile.
        with capturing, torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            try:
                work()
            except BaseException as error:
                failed = error
                raise
    except BaseException as error:
        if failed is not None and failed is not error:
            raise failed from error
        raise
    finally:
        failed = None  # its traceback holds this frame, and all memory of the frames below


def give_memory_back(device: torch.device) -> None:
    """To the GPU, what torch holds and nobody uses: another library, or a graph, cannot be given it otherwise."""
    if device.type == "cuda":
        with capturing:
            torch.cuda.empty_cache()


# Kernels read whole 16-byte pieces.
_ALIGNMENT = 16


def placed(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``tensor`` on ``device`` in ``dtype`` where a kernel can read it: a mapped file aligns to 8 bytes only."""
    moved = tensor.to(device, dtype)
    return moved.clone() if not moved.is_meta and moved.data_ptr() % _ALIGNMENT else moved


def warn_of_faulty_convolutions(device: torch.device, dtype: torch.dtype) -> None:
    """A warning where this cuDNN is known to get the VAE's 16-bit convolutions wrong, or to need far more memory."""
    if device.type != "cuda" or dtype is torch.float32:
        return
    version = torch.backends.cudnn.version()
    if version in _CUDNN_FAULTY:
        warnings.warn(
            f"cuDNN {version} is known for faulty 16-bit 3-D convolutions, which the VAE consists of: "
            f"use a torch with cuDNN {_CUDNN_FAULTY.stop} or newer, or decode in float32 (vae_dtype)",
            stacklevel=3,
        )


class _FullPrecision:
    """float32 products in float32: by default cuDNN rounds its input to TF32, which is far from the goldens.

    The two switches are torch's, one for the whole process, so streams that overlap share one visit: the first in
    turns TF32 off, the last out puts back what it found.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._found = ("", "")

    @contextmanager
    def __call__(self) -> Iterator[None]:
        convolution = torch.backends.cudnn.conv  # type: ignore[attr-defined]
        product = torch.backends.cuda.matmul
        with self._lock:
            if self._inside == 0:
                self._found = (convolution.fp32_precision, product.fp32_precision)
                convolution.fp32_precision = product.fp32_precision = "ieee"
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    convolution.fp32_precision, product.fp32_precision = self._found


_full_precision = _FullPrecision()


@contextmanager
def model_context(device: torch.device, *dtypes: torch.dtype) -> Iterator[None]:
    """What a model computes in, whatever its caller has set: no gradients, no autocast, float32 that is float32.

    ``dtypes``: of its parts, which need not be the same.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        if device.type == "cuda" and torch.float32 in dtypes:
            with _full_precision():
                yield
        else:
            yield
