"""A long run of a stream that watches itself: figures, promises, a report. :func:`run` does a :class:`SoakConfig`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from echo_rt.soak.config import Limits, SoakConfig

if TYPE_CHECKING:
    from echo_rt.soak.session import Outcome, run

__all__ = ["Limits", "Outcome", "SoakConfig", "run"]


def __getattr__(name: str) -> Any:
    if name not in ("Outcome", "run"):
        raise AttributeError(f"module 'echo_rt.soak' has no attribute {name!r}")
    from echo_rt.soak import session  # not before: the command line's help needs no torch

    return getattr(session, name)
