"""Failures that hold no memory, however libraries have chained them."""

from __future__ import annotations

import weakref

import pytest
import torch
from streaming import within

from echo_rt.utils.process import computes


def test_what_every_error_behind_a_failure_holds_is_let_go() -> None:
    """The one it was raised from, and the other one that was being handled."""
    held: list[weakref.ref[torch.Tensor]] = []

    def fails(words: str) -> Exception:
        memory = torch.empty(1)
        held.append(weakref.ref(memory))
        try:
            raise RuntimeError(words)
        except RuntimeError as error:
            return error

    @computes
    def work() -> None:
        cause = fails("the cause")
        try:
            raise fails("handled")
        except RuntimeError:
            memory = torch.empty(1)
            held.append(weakref.ref(memory))
            raise RuntimeError("told") from cause

    with pytest.raises(RuntimeError, match="told") as caught:
        work()
    assert caught.value.__cause__ is not None and caught.value.__context__ is not caught.value.__cause__
    assert [memory() for memory in held] == [None] * 3


def test_errors_in_a_ring() -> None:
    @computes
    def work() -> None:
        first, second = RuntimeError("first"), RuntimeError("second")
        first.__cause__, second.__cause__ = second, first
        raise first

    with pytest.raises(RuntimeError, match="first"):
        within(60, work)
