"""What a runtime's process does to it: forks, pickling, signals, the interpreter's exit, and errors that hold memory.

A fork copies memory and no threads. Torch's pool of CPU threads is gone in it, and an operation that needs the pool
waits forever; CUDA refuses to work at all; and a lock that another thread held stays locked.
"""

from __future__ import annotations

import atexit
import functools
import inspect
import os
import signal
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar, NoReturn, ParamSpec, TypeVar

import torch

from echo_rt.errors import BackendError, ConfigError, EchoError, StreamError

P = ParamSpec("P")
R = TypeVar("R")
B = TypeVar("B", bound="Bound")

_SPAWN = "start the process with multiprocessing's 'spawn'"
_GRACE = 3.0  # seconds
# The process that first loaded a runtime: a fork inherits the number, which is not its own.
_first_loaded_in: int | None = None


class ProcessGuard:
    """Remembers the process that a runtime was loaded in, and whether it is closed; its streams share it."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self.closed = False

    @property
    def left(self) -> bool:
        """Whether this process is a fork."""
        return os.getpid() != self._process

    def require_here(self, what: str) -> None:
        """Raise :class:`StreamError` in a fork."""
        if self.left:
            raise StreamError(
                f"the {what} belongs to process {self._process}, and this is {os.getpid()}, a fork of it: "
                "load a runtime in the process that uses it"
            )

    def require(self, what: str) -> None:
        """Raise :class:`StreamError` in a fork, and where the runtime is closed."""
        self.require_here(what)
        if self.closed:
            raise StreamError("the runtime is closed; load another with Runtime.from_pretrained(...)")


class Bound:
    """Base of what belongs to one process: it cannot be copied or pickled. ``_instead``: what to do.

    ``_made_by``: the call that makes one, for whoever calls the class itself.
    """

    _instead: ClassVar[str]
    _made_by: ClassVar[str]

    def __new__(cls: type[B], *given: object, **options: object) -> B:
        try:
            inspect.signature(cls.__init__).bind(None, *given, **options)
        except TypeError:
            raise ConfigError(f"a {cls.__name__} is made by {cls._made_by}") from None
        return super().__new__(cls)

    def __reduce_ex__(self, protocol: object) -> NoReturn:  # copy asks for it too
        raise StreamError(f"a {type(self).__name__} cannot be copied or pickled: {self._instead}")


def require_cuda_usable() -> None:
    """Raise :class:`BackendError` in a fork of a process that uses CUDA."""
    if torch.cuda._is_in_bad_fork():
        raise BackendError(f"this process was forked from one that uses CUDA, which works in no fork: {_SPAWN}")


def note_loading(device: torch.device) -> None:
    """Note that a runtime loads on ``device``; :class:`BackendError` in a process where it would hang."""
    global _first_loaded_in
    if _first_loaded_in is None:
        _first_loaded_in = os.getpid()
    if _first_loaded_in != os.getpid() and device.type == "cpu" and torch.get_num_threads() > 1:
        raise BackendError(
            "this process was forked from one that has loaded a runtime, and torch's CPU threads hang in a fork: "
            f"{_SPAWN}, or call torch.set_num_threads(1) in it before anything else"
        )


class _Computing:
    """The threads that are computing; the interpreter's exit waits for them, and ends those that come later.

    The exit ends a daemon thread as soon as that comes back from a library. Torch's frames do not survive this, and the
    process would abort. A thread that has just computed may free tensors now, so it gets some seconds to end, or to
    come again.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._threads: dict[int, threading.Thread] = {}
        self._left: weakref.WeakKeyDictionary[threading.Thread, float] = weakref.WeakKeyDictionary()
        self._ended_by: int | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        me = threading.get_ident()
        if me in self._threads:  # a call within a call
            yield
            return
        with self._changed:
            if self._ended_by not in (None, me):
                raise SystemExit  # ends the thread without a word
            self._threads[me] = threading.current_thread()
        try:
            yield
        finally:
            with self._changed:
                self._left[self._threads.pop(me)] = time.monotonic()
                self._changed.notify_all()

    def end(self) -> None:
        with self._changed:
            self._ended_by = me = threading.get_ident()
            recent = [thread for thread, left in self._left.items() if time.monotonic() - left < _GRACE]
            busy = {*recent, *self._threads.values()} - {threading.current_thread()}
            self._changed.wait_for(lambda: self._threads.keys() <= {me})
        deadline = time.monotonic() + _GRACE
        for thread in busy:
            if not isinstance(thread, threading._DummyThread):  # one that Python did not start cannot be joined
                thread.join(max(0.0, deadline - time.monotonic()))


_computing = _Computing()
atexit.register(lambda: _computing.end())
os.register_at_fork(after_in_child=lambda: _computing.__init__())  # type: ignore[misc]  # it has no other thread


def computes(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a function that computes: the interpreter's exit waits for its end, and its errors hold no memory.

    A caller may load a smaller model in the ``except`` clause of an error about memory, where every frame of its
    traceback is alive: they drop their tensors. Torch's errors about memory are several subclasses of ``RuntimeError``.
    """

    @functools.wraps(function)
    def computing(*arguments: P.args, **options: P.kwargs) -> R:
        try:
            with _computing():
                return function(*arguments, **options)
        except (EchoError, RuntimeError, MemoryError) as error:
            free(error)
            del arguments, options  # this frame is one of them
            raise

    return computing


@contextmanager
def interrupts_last() -> Iterator[None]:
    """Let Ctrl-C, where it would raise ``KeyboardInterrupt``, wait for the end of the work inside; a second one raises.

    Work that changes buffers in place cannot be taken up again in its middle.
    """
    default = signal.default_int_handler
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not default:
        yield  # Python raises it in the main thread alone
        return
    came = False

    def note(number: int, frame: object) -> None:
        nonlocal came
        came = True
        signal.signal(signal.SIGINT, default)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, default)
    if came:
        raise KeyboardInterrupt


def free(error: BaseException) -> None:
    """Release the local variables of all finished frames behind ``error``."""
    behind: list[BaseException | None] = [error]
    seen: list[BaseException] = []
    while behind:
        one = behind.pop()
        if one is not None and not any(one is other for other in seen):  # libraries can chain errors into a ring
            seen.append(one)
            traceback.clear_frames(one.__traceback__)
            behind += [one.__cause__, one.__context__]
