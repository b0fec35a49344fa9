"""After a failure, only the traceback's lines are kept, not what the frames held: weights, buffers, half a block."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from echo_rt.errors import EchoError

P = ParamSpec("P")
R = TypeVar("R")


def frees_frames(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, whose failures hold no memory.

    A caller loads a smaller model where it is told that memory is short, or another one where it is told that this one
    cannot be: in its ``except`` clause. There the exception is alive, with every frame it came through, and each of
    them would keep its tensors. Torch says ``RuntimeError`` for want of memory, in several ways and subclasses.
    """

    @functools.wraps(function)
    def freeing(*arguments: P.args, **options: P.kwargs) -> R:
        try:
            return function(*arguments, **options)
        except (EchoError, RuntimeError, MemoryError) as error:
            free(error)
            del arguments, options  # this frame is one of them
            raise

    return freeing


def free(error: BaseException) -> None:
    """What the frames behind ``error`` hold, as far as they are over."""
    behind: list[BaseException | None] = [error]
    seen: list[BaseException] = []
    while behind:
        one = behind.pop()
        if one is None or any(one is other for other in seen):  # which libraries can chain into a ring
            continue
        seen.append(one)
        traceback.clear_frames(one.__traceback__)
        behind += [one.__cause__, one.__context__]
