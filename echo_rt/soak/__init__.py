"""A long run of a stream that watches itself: figures, promises, a report. :func:`run` does a :class:`SoakConfig`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from echo_rt.soak.config import Limits, SoakConfig
    from echo_rt.soak.session import Outcome, run

__all__ = ["Limits", "Outcome", "SoakConfig", "run"]

_HOMES = {"Limits": "config", "SoakConfig": "config", "Outcome": "session", "run": "session"}


def __getattr__(name: str) -> Any:
    # The command line's help reads the defaults of SoakConfig and needs no torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'echo_rt.soak' has no attribute {name!r}")
    return getattr(import_module(f"echo_rt.soak.{_HOMES[name]}"), name)
