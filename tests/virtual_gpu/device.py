"""The virtual GPU as Python sees it: its memory, its queues, and what it has to say of wrong use."""

from __future__ import annotations

import atexit
import ctypes
import itertools
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

from virtual_gpu.names import POLICY, RUNTIME, SEED

_COMPUTE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_long)
_FORGET = ctypes.CFUNCTYPE(None, ctypes.c_long)


class Device:
    """The one virtual GPU of the process."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(RUNTIME))
        self._library.virtual_gpu_submit.argtypes = [
            ctypes.c_void_p,
            ctypes.c_long,
            ctypes.c_char_p,
            ctypes.POINTER(ctypes.c_void_p),
            ctypes.POINTER(ctypes.c_size_t),
            ctypes.c_size_t,
        ]
        self._library.virtual_gpu_launches_are_computed_beside.argtypes = [ctypes.c_bool]
        self._library.virtual_gpu_choose_policy.argtypes = [ctypes.c_char_p, ctypes.c_uint]
        self._library.virtual_gpu_choose_policy.restype = ctypes.c_bool
        self._library.virtual_gpu_launches.restype = ctypes.c_long
        self._library.virtual_gpu_complaints.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
        self._library.virtual_gpu_complaints.restype = ctypes.c_size_t
        self._numbers = itertools.count(1)
        self._work: dict[int, Callable[[], None]] = {}
        # Kept: the library has their addresses alone.
        self._callbacks = (_COMPUTE(self._compute), _FORGET(self._forget))
        self._library.virtual_gpu_set_worker(*self._callbacks)
        # Nothing may be left to compute when the interpreter is gone: the rest now, and what comes still at once.
        atexit.register(self.choose_policy, "eager")

    def submit(self, name: str, work: Callable[[], None], memory: Iterable[Tensor]) -> None:
        """Put ``work`` into the current stream, or into the graph it is captured into.

        ``memory`` are the tensors of the host that alias the device's: all of it must still be allocated when it runs.
        """
        ranges = [(tensor.data_ptr(), bytes_spanned(tensor)) for tensor in memory if tensor.numel()]
        addresses = (ctypes.c_void_p * len(ranges))(*(address for address, _ in ranges))
        lengths = (ctypes.c_size_t * len(ranges))(*(length for _, length in ranges))
        number = next(self._numbers)
        self._work[number] = work
        stream = torch.cuda.current_stream().cuda_stream
        error = self._library.virtual_gpu_submit(stream, number, name.encode(), addresses, lengths, len(ranges))
        torch.cuda.check_error(error)

    @contextmanager
    def launches_computed_beside(self) -> Iterator[None]:
        """Kernels may be launched here: what they would compute is submitted as well."""
        self._library.virtual_gpu_launches_are_computed_beside(True)
        try:
            yield
        finally:
            self._library.virtual_gpu_launches_are_computed_beside(False)

    def choose_policy(self, name: str, seed: int = 0) -> None:
        """When work runs from now on: ``eager``, ``lazy`` or ``random``."""
        if not self._library.virtual_gpu_choose_policy(name.encode(), seed):
            raise ValueError(f"the policy must be eager, lazy or random; got {name!r}")

    @property
    def launches(self) -> int:
        """How many kernels were launched so far, as nvcc compiled them."""
        return int(self._library.virtual_gpu_launches())

    def take_complaints(self) -> list[str]:
        """What was used wrongly since this was last asked, in the order of the calls."""
        length = self._library.virtual_gpu_complaints(None, 0)
        text = ctypes.create_string_buffer(length + 1)
        self._library.virtual_gpu_complaints(text, len(text))
        self._library.virtual_gpu_forget_complaints()
        return text.value.decode().splitlines()

    def _compute(self, number: int) -> int:
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._work[number]()
        except BaseException:  # there is no caller to raise it to: the device fails, as after a kernel's fault
            sys.stderr.write(f"virtual GPU: {traceback.format_exc()}")
            return 1
        return 0

    def _forget(self, number: int) -> None:
        with suppress(KeyError):
            del self._work[number]


def bytes_spanned(tensor: Tensor) -> int:
    """From a tensor's first byte to its last."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (steps + 1) * tensor.itemsize


def alias(tensor: Tensor) -> Tensor:
    """The tensor of the CPU on the memory of ``tensor``, which it does not keep: a GPU's work does not, either."""
    if tensor.numel() == 0:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    length = bytes_spanned(tensor)
    memory = (ctypes.c_char * length).from_address(tensor.data_ptr())
    flat = torch.frombuffer(memory, dtype=torch.uint8, count=length)
    return flat.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), 0)


_device: Device | None = None


def device() -> Device:
    """The virtual GPU. Only where it is active."""
    global _device
    if _device is None:
        _device = Device()
        _device.choose_policy(os.environ[POLICY], int(os.environ[SEED]))
    return _device
