"""Devices, dtypes, graph capture, and the torch settings that a model computes under."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from echo_rt.errors import BackendError, ConfigError, not_one_of
from echo_rt.options import DTYPE_ALIASES, DTYPE_NAMES, VAE_DTYPE_NAMES
from echo_rt.utils.process import require_cuda_usable
from echo_rt.utils.wording import warn_caller

FLOAT8 = torch.float8_e4m3fn
# Compute capability of the first GPUs whose tensor cores multiply float8.
_FLOAT8_CAPABILITY = (8, 9)

# A model's dtype by name. float8 applies to its large matmuls; working_dtype() to everything else.
_MODEL_DTYPES: dict[str, torch.dtype] = {
    name: FLOAT8 if name == "float8" else getattr(torch, name) for name in DTYPE_NAMES
}
# Dtypes that tensors are computed in.
DTYPES = {name: dtype for name, dtype in _MODEL_DTYPES.items() if dtype != FLOAT8}

# cuDNN versions, as numbers, whose 16-bit 3-D convolutions are wrong, or which torch avoids at a high cost in memory
# (pytorch issues 163539, 163581, 166643).
_CUDNN_FAULTY = range(90800, 91500)


def parse_device(device: str | torch.device | None) -> torch.device:
    """Return the torch device; None means the current CUDA GPU if there is one, else the CPU.

    Raises :class:`BackendError` for a device that does not exist, :class:`ConfigError` for an unknown name.
    """
    if device is None:
        require_cuda_usable()  # or torch would find no GPU, and the CPU would be chosen
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError):
        parsed = None
    if parsed is None or parsed.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be 'cpu', 'cuda' or 'cuda:N'; got {str(device)!r}")
    if parsed.type == "cpu":
        return parsed
    require_cuda_usable()
    asked = f"device {str(device)!r} was asked for, but"
    if not torch.cuda.is_available():
        built = "is built without CUDA" if torch.version.cuda is None else "finds no usable GPU"
        raise BackendError(f"{asked} this torch ({torch.__version__}) {built}")
    if (parsed.index or 0) >= torch.cuda.device_count():
        raise BackendError(f"{asked} there are {torch.cuda.device_count()} GPUs")
    # Each thread has its own current GPU; a model stays where it was loaded.
    return parsed if parsed.index is not None else torch.device("cuda", torch.cuda.current_device())


def require_products(device: torch.device) -> None:
    """Raise :class:`BackendError` for a GPU whose tensor cores do not multiply float8."""
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
    """Return the model's dtype; None means bfloat16 on a GPU and float32 on a CPU.

    :class:`ConfigError` names the choices; :class:`BackendError` for float8 on a GPU that does not multiply it.
    """
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    parsed = _one_of(DTYPE_NAMES, dtype, "dtype")
    if parsed == FLOAT8:
        require_products(device)
    return parsed


def _one_of(names: Sequence[str], dtype: str | torch.dtype, option: str) -> torch.dtype:
    full = DTYPE_ALIASES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    for name in names:
        if full in (name, _MODEL_DTYPES[name]):
            return _MODEL_DTYPES[name]
    short = (alias for alias, name in DTYPE_ALIASES.items() if name in names)
    raise ConfigError(not_one_of(option, (*names, *short), str(dtype)))


def dtype_name(dtype: torch.dtype | str) -> str:
    """Name of a model's ``dtype`` as users write it; any other dtype as torch writes it."""
    return next((name for name, known in _MODEL_DTYPES.items() if str(known) == str(dtype)), str(dtype))


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of a model's state and of everything but its float8 matmuls."""
    return torch.bfloat16 if dtype == FLOAT8 else dtype


def parse_vae_dtype(vae_dtype: str | torch.dtype | None, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the decoder; None means that of the model. :class:`ConfigError` names the choices."""
    return working_dtype(dtype) if vae_dtype is None else _one_of(VAE_DTYPE_NAMES, vae_dtype, "vae_dtype")


# Torch captures one graph at a time per process. The beginning of a capture synchronizes the device and empties its
# cache, which breaks a capture that is under way in any thread.
capturing = threading.RLock()


def capture(
    graph: torch.cuda.CUDAGraph, work: Callable[[], object], *, stream: torch.cuda.Stream, pool: Any | None = None
) -> None:
    """Capture in ``graph`` what ``work`` launches on ``stream``, in memory of ``pool``, or of its own.

    Raises the error of ``work`` rather than torch's about the aborted capture. After a failure torch may consider
    ``pool`` as being captured into forever, and refuse the next capture: its owner needs another pool.
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
        failed = None  # its traceback holds this frame, and the memory of all frames below


def give_memory_back(device: torch.device) -> None:
    """Return torch's unused cached memory to the GPU, for other libraries and for graphs."""
    if device.type == "cuda":
        with capturing:
            torch.cuda.empty_cache()


# Kernels read 16-byte vectors.
_ALIGNMENT = 16


def placed(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return ``tensor`` on ``device`` in ``dtype``, aligned for the kernels: a mapped file aligns to 8 bytes only."""
    moved = tensor.to(device, dtype)
    return moved.clone() if not moved.is_meta and moved.data_ptr() % _ALIGNMENT else moved


def warn_of_faulty_convolutions(device: torch.device, dtype: torch.dtype) -> None:
    """Warn of a cuDNN whose 16-bit convolutions of the VAE are known to be wrong, or to need far more memory."""
    if device.type != "cuda" or dtype is torch.float32:
        return
    version = torch.backends.cudnn.version()
    if version in _CUDNN_FAULTY:
        warn_caller(
            f"cuDNN {version} is known for faulty 16-bit 3-D convolutions, which the VAE consists of: "
            f"use a torch with cuDNN {_CUDNN_FAULTY.stop} or newer, or decode in float32 (vae_dtype)"
        )


class _FullPrecision:
    """Full precision in float32: by default cuDNN rounds its input to TF32, which is far from the goldens.

    The two switches are process-wide, so overlapping streams share them: the first one to enter turns TF32 off, the
    last one to leave restores what it found.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._convolution: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
        self._product = torch.backends.cuda.matmul
        self._inside = 0
        self._found = ("", "")

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._found = (self._convolution.fp32_precision, self._product.fp32_precision)
                self._convolution.fp32_precision = self._product.fp32_precision = "ieee"
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._convolution.fp32_precision, self._product.fp32_precision = self._found


_full_precision = _FullPrecision()


@contextmanager
def model_context(device: torch.device, *dtypes: torch.dtype) -> Iterator[None]:
    """Let a model with parts in ``dtypes`` compute without gradients, autocast or TF32, whatever its caller has set."""
    precise = _full_precision if device.type == "cuda" and torch.float32 in dtypes else nullcontext()
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False), precise:
        yield
