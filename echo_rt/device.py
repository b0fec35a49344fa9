"""Device and dtype names, checked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from echo_rt.errors import BackendError, ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_device(device: str | torch.device | None) -> torch.device:
    """The torch device; None means the first CUDA GPU where there is one, else the CPU.

    Raises :class:`BackendError` for a device that is not there, :class:`ConfigError` for a name torch does not know.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        parsed = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device must be 'cpu', 'cuda' or 'cuda:N'; got {str(device)!r}") from None
    if parsed.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be 'cpu', 'cuda' or 'cuda:N'; got {str(device)!r}")
    if parsed.type == "cuda" and not torch.cuda.is_available():
        built = "is built without CUDA" if torch.version.cuda is None else "finds no usable GPU"
        raise BackendError(f"device {str(device)!r} was asked for, but this torch ({torch.__version__}) {built}")
    if parsed.type == "cuda" and (parsed.index or 0) >= torch.cuda.device_count():
        raise BackendError(f"device {str(device)!r} was asked for, but there are {torch.cuda.device_count()} GPUs")
    return parsed


def parse_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The model's dtype; None means bfloat16 on a GPU and float32 on a CPU. :class:`ConfigError` names the choices."""
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    for name, known in DTYPES.items():
        if dtype in (name, known):
            return known
    raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}; got {str(dtype)!r}")


@contextmanager
def full_precision(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """float32 convolutions in float32: by default cuDNN rounds their input to TF32, which is far from the goldens.

    The flag is torch's, for the whole process; it is put back on the way out.
    """
    if device.type != "cuda" or dtype is not torch.float32:
        yield
        return
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
