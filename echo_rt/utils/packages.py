"""Optional packages."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager

from echo_rt.errors import BackendError
from echo_rt.utils.wording import first_line


@contextmanager
def needing(package: str, purpose: str) -> Iterator[None]:
    """Guard an import: without ``package``, :class:`BackendError` names it and its purpose."""
    try:
        yield
    except ImportError as error:
        install = f"pip install {shlex.quote(package)}"  # brackets are patterns to zsh
        raise BackendError(f"{purpose} needs the package {package}: {first_line(error)} ({install})") from None
